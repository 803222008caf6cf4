"""Problems named after the models whose latents they have, and what a rollout of them cannot do without."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from piflow.noise_schedule import NoiseSchedule


@dataclass(frozen=True)
class GMShape:
    """Latents (batch, K, C, *spatial), the substeps of a rollout, the schedule's shift, and where the rollout ends."""

    batch: int
    k: int
    c: int
    spatial: tuple[int, ...]
    n_steps: int
    shift: float = 3.2

    def problem(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor | float]:
        """Arguments of gm_rollout from sigma 1 on: states in float32, the network output in `dtype`."""
        g = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        x = draw(self.batch, self.c, *self.spatial).to(device)
        logweights = draw(self.batch, self.k, 1, *self.spatial).log_softmax(1)
        raw_t = torch.linspace(1, 1 - self.n_steps / 128, self.n_steps + 1)
        return {
            "x_start": x,
            "sigmas": NoiseSchedule(self.shift).sigma(raw_t).to(device),
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
    segment_size: float = 0.1

    def problem(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor | float | str]:
        """Arguments of dx_rollout in the packed layout, from sigma 1 on."""
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(self.batch, *self.spatial, self.c, generator=g).to(device)
        raw_t = torch.linspace(1, 1 - self.segment_size, self.n_steps + 1, dtype=torch.float64)
        grid = torch.randn(self.batch, *self.spatial, self.n_grid, self.c, generator=g)
        return {
            "x_start": x,
            "sigmas": NoiseSchedule(self.shift).sigma(raw_t).to(device),
            "x_src": x,
            "sigma_src": torch.ones(self.batch, device=device),
            "grid": grid.to(device, dtype),
            "segment_size": torch.full((self.batch,), self.segment_size, device=device),
            "shift": torch.full((self.batch,), self.shift, device=device),
            "eps": 1e-6,
            "layout": "packed",
        }


GM_SHAPES = {
    "qwen-image-1024": GMShape(1, 8, 16, (128, 128), 37),
    "flux-1024": GMShape(1, 8, 16, (128, 128), 128),
    "flux-2-1024": GMShape(1, 8, 128, (64, 64), 37),
    "imagenet-256-batch-16": GMShape(16, 32, 4, (32, 32), 128, shift=1.0),
    "imagenet-256-batch-512": GMShape(512, 32, 4, (32, 32), 128, shift=1.0),
}
DX_SHAPES = {
    "kandinsky-6-lite": DXShape(1, 10, 16, (8, 60, 108), 13),
    "kandinsky-6-pro": DXShape(1, 10, 16, (31, 60, 108), 13),
}


@dataclass(frozen=True)
class Work:
    """Bytes that must be moved once, multiply-adds and exponentials of a forward rollout (DESIGN 2.4)."""

    bytes: int
    multiply_adds: float
    exponentials: float

    def floor_seconds(self, bytes_per_second: float, fma_per_second: float, exp_per_second: float) -> float:
        """The larger of moving and computing."""
        computing = max(self.multiply_adds / fma_per_second, self.exponentials / exp_per_second)
        return max(self.bytes / bytes_per_second, computing)


def gm_work(shape: GMShape, dtype: torch.dtype) -> Work:
    """In Gram or channel space, whichever takes fewer multiply-adds."""
    k, c, n = shape.k, shape.c, shape.n_steps
    pixels = shape.batch * torch.Size(shape.spatial).numel()
    network = k * (c + 1) * dtype.itemsize
    gram, channel = k * (k + 1) * c / 2 + 2 * k * c + n * k * k, 2 * k * c * n
    return Work(pixels * (network + 3 * c * 4), pixels * (min(gram, channel) + 8 * k * n), pixels * k * n)


def dx_work(shape: DXShape, dtype: torch.dtype) -> Work:
    elements = shape.batch * torch.Size(shape.spatial).numel() * shape.c
    return Work(elements * (shape.n_grid * dtype.itemsize + 3 * 4), elements * (shape.n_grid + 2), 0)
