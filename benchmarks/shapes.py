"""Problems named after the models whose latents they have, and what a rollout of them cannot do without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.roofline import Work
from piflow.noise_schedule import NoiseSchedule, segment_sizes

FULL_DEPTH = {
    "qwen-image": {"transformer_blocks": 60},
    "flux": {"transformer_blocks": 19, "single_transformer_blocks": 38},
    "flux-2": {"transformer_blocks": 8, "single_transformer_blocks": 48},
    "imagenet-dit-xl": {"transformer_blocks": 28},
}
"""Transformer blocks of the networks, by the list that holds them."""


@dataclass(frozen=True)
class GMShape:
    """Latents (batch, K, C, *spatial), the substeps of a rollout, the schedule's shift.

    packed: whether the transformer emits them as tokens of 2 x 2 pixels.
    """

    batch: int
    k: int
    c: int
    spatial: tuple[int, ...]
    n_steps: int
    shift: float = 3.2
    packed: bool = False

    def problem(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of gm_rollout from sigma 1 on: states in float32, the network output in `dtype`."""
        g = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        x = draw(self.batch, self.c, *self.spatial).to(device)
        logweights = draw(self.batch, self.k, 1, *self.spatial).log_softmax(1)
        raw_t = torch.linspace(1, 1 - self.n_steps / 128, self.n_steps + 1)
        return {
            "x_start": x,
            "sigmas": NoiseSchedule(self.shift).sigma(raw_t).to(device).expand(self.batch, -1),
            "x_src": x,
            "sigma_src": torch.ones(self.batch, device=device),
            "means": draw(self.batch, self.k, self.c, *self.spatial).to(device, dtype),
            "logstds": torch.full((self.batch,), -2.0, device=device),
            "logweights": logweights.to(device, dtype),
        }


@dataclass(frozen=True)
class DXShape:
    """Latents (batch, *spatial, C) in tokens, as Kandinsky 6 has them; the grid's points and the substeps of a step."""

    batch: int
    n_grid: int
    c: int
    spatial: tuple[int, ...]
    n_steps: int
    shift: float = 5.0
    segment_size: float = segment_sizes(10, final_step_size_scale=0.5)[0]

    def problem(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of dx_rollout in the packed layout, from sigma 1 on."""
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(self.batch, *self.spatial, self.c, generator=g).to(device)
        raw_t = torch.linspace(1, 1 - self.segment_size, self.n_steps + 1, dtype=torch.float64)
        grid = torch.randn(self.batch, *self.spatial, self.n_grid, self.c, generator=g)
        return {
            "x_start": x,
            "sigmas": NoiseSchedule(self.shift).sigma(raw_t).to(device).expand(self.batch, -1),
            "x_src": x,
            "sigma_src": torch.ones(self.batch, device=device),
            "grid": grid.to(device, dtype),
            "segment_size": torch.full((self.batch,), self.segment_size, device=device),
            "shift": torch.full((self.batch,), self.shift, device=device),
            "eps": 1e-6,
            "layout": "packed",
        }


GM_SHAPES = {
    "qwen-image-1024": GMShape(1, 8, 16, (128, 128), 37, packed=True),
    "flux-1024": GMShape(1, 8, 16, (128, 128), 128, packed=True),
    "flux-2-1024": GMShape(1, 8, 32, (128, 128), 37, packed=True),
    "imagenet-256-batch-1": GMShape(1, 32, 4, (32, 32), 128, shift=1.0),
    "imagenet-256-batch-16": GMShape(16, 32, 4, (32, 32), 128, shift=1.0),
    "imagenet-256-batch-64": GMShape(64, 32, 4, (32, 32), 128, shift=1.0),
    "imagenet-256-batch-512": GMShape(512, 32, 4, (32, 32), 128, shift=1.0),
}
"""37 substeps: the first of four segments at 128 substeps in all, the last segment half as long. 128: one segment."""

DX_SHAPES = {
    "kandinsky-6-lite": DXShape(1, 10, 16, (31, 64, 96), 13),
    "kandinsky-6-pro": DXShape(1, 10, 16, (31, 60, 108), 13),
}
"""121 frames, which the video VAE takes four at a time after the first and 8 x 8 pixels: at the default size of
diffusers' pipeline, 512 x 768, and at that of its example for Pro, 480 x 864. The first of 10 steps."""


def gm_work(shape: GMShape, dtype: torch.dtype, n_states: int = 3) -> Work:
    """A forward rollout, in Gram or channel space, whichever takes fewer multiply-adds.

    n_states: (B, C, *S) tensors read or written, by default x_start, x_src and the result.
    """
    k, c, n = shape.k, shape.c, shape.n_steps
    pixels = shape.batch * torch.Size(shape.spatial).numel()
    network = k * (c + 1) * dtype.itemsize
    gram, channel = k * (k + 1) * c / 2 + 2 * k * c + n * k * k, 2 * k * c * n
    return Work(pixels * (network + n_states * c * 4), pixels * (min(gram, channel) + 8 * k * n), pixels * k * n)


def gm_backward_work(shape: GMShape, dtype: torch.dtype, n_states: int = 5) -> Work:
    """Its adjoint: the network output is read and its gradient written, and by default two states and a cotangent
    are read and two gradients of states written.

    The recursion runs once more, for nobody kept its weights, and once in reverse.
    """
    pixels = shape.batch * torch.Size(shape.spatial).numel()
    forward = gm_work(shape, dtype)
    moved = pixels * (2 * shape.k * (shape.c + 1) * dtype.itemsize + n_states * shape.c * 4)
    return Work(moved, 2 * forward.multiply_adds, forward.exponentials)


def dx_work(shape: DXShape, dtype: torch.dtype, n_states: int = 3) -> Work:
    """A forward rollout: one weighted sum of the grid and the states."""
    elements = shape.batch * torch.Size(shape.spatial).numel() * shape.c
    return Work(elements * (shape.n_grid * dtype.itemsize + n_states * 4), elements * (shape.n_grid + n_states - 1))


def dx_backward_work(shape: DXShape, dtype: torch.dtype) -> Work:
    """Its adjoint: the cotangent is read, the gradients of grid and states are written."""
    return dx_work(shape, dtype)
