"""Launch of the Triton kernels. Imports triton only where a kernel is first needed."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .dx.coefficients import Coefficients as DXCoefficients
from .gm.coefficients import Coefficients as GMCoefficients
from .gm.torch_path import Adjoints, gram_space_is_cheaper

LARGEST_GRAM = 8
"""Components up to which K (K + 1) / 2 + 3 K live values per pixel stay in registers (DESIGN 2.2)."""

LARGEST_TILE, MOST_CHANNELS = 128, 16
"""Velocities and channels per pixel up to which channel space stays in registers."""

Form = Literal["gram", "channel", "streamed"]


def kernel_form(n_components: int, n_channels: int, n_steps: int) -> Form:
    """The cheaper of Gram and channel space among those that fit in registers; where neither does, streamed."""
    gram = n_components <= LARGEST_GRAM
    channel = next_power_of_2(n_components) * n_channels <= LARGEST_TILE and n_channels <= MOST_CHANNELS
    if gram and (not channel or gram_space_is_cheaper(n_components, n_channels, n_steps)):
        return "gram"
    return "channel" if channel else "streamed"


@dataclass(frozen=True)
class LaunchConfig:
    """Pixels (or elements) of one program, its warps, and the constants that a form needs besides K and C."""

    block: int
    num_warps: int
    tiles: dict[str, int]


def gm_launch_config(form: Form, n_components: int, n_channels: int) -> LaunchConfig:
    """How a kernel of this form is launched on a GPU: a rule from K and C, nothing is tried at run time."""
    if form == "gram":
        return LaunchConfig(128, 4, {})
    if form == "channel":
        return LaunchConfig(32, 4, {"K_TILE": next_power_of_2(n_components)})
    c_tile = next_power_of_2(n_channels)
    # At most eight elements of a tile to a thread: the adjoint's dozen tiles with their addresses stay in registers.
    block = min(2048 // c_tile, 32)
    return LaunchConfig(block, max(c_tile * block // 256, 1), {"C_TILE": c_tile})


DX_LAUNCH = LaunchConfig(1024, 4, {})

INTERPRETED_BLOCK = 4096
"""The interpreter pays per program, so it gets few large ones."""


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def why_triton_cannot_run(device: torch.device) -> str | None:
    """The reason why kernels cannot run for tensors on `device`; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; on Linux `pip install triton>=3.6` installs it"
    if device.type == "cuda" or (device.type == "cpu" and is_interpreted()):
        return None
    return f"tensors are on {device}, it needs them on a GPU (or TRITON_INTERPRET=1 to interpret kernels on the CPU)"


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def check_float32(dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        raise ValueError("backend: 'triton' computes in float32, but an input is float64; use 'torch' or 'reference'")


def as_pixels(tensor: Tensor, leading: int) -> Tensor:
    """(..., *S) -> (..., R, W): the last spatial axis, and the others together. A view where the strides allow it."""
    spatial = tensor.shape[leading:]
    return tensor.reshape(*tensor.shape[:leading], math.prod(spatial[:-1]), spatial[-1])


class Output:
    """A tensor to be written shaped and laid out like `like`, and its (R, W) form that the kernel writes."""

    def __init__(self, like: Tensor, leading: int) -> None:
        self.result = torch.empty_like(like)
        self.pixels = as_pixels(self.result, leading)

    def get(self) -> Tensor:
        if self.pixels.data_ptr() != self.result.data_ptr():  # strides that no (R, W) view describes
            self.result.copy_(self.pixels.reshape(self.result.shape))
        return self.result


def strides_of(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()]


def launch_gm_integrate(
    x_start: Tensor, x_src: Tensor, means: Tensor, logweights: Tensor, coefficients: GMCoefficients
) -> Tensor:
    """`piflow_kernels.gm.torch_path.gm_integrate` as one kernel. Canonical arguments, float32 states."""
    from .gm import kernels

    check_float32(x_start.dtype)
    batch, k, c = means.shape[:3]
    n_steps = coefficients.steps.shape[1]
    form = kernel_form(k, c, n_steps)
    kernel: Any = {
        "gram": kernels.gm_gram_rollout_kernel,
        "channel": kernels.gm_channel_rollout_kernel,
        "streamed": kernels.gm_streamed_rollout_kernel,
    }[form]
    config = gm_launch_config(form, k, c)
    output = Output(x_start, 2)
    if x_start.numel() == 0:
        return output.get()
    x_start, x_src = as_pixels(x_start, 2), as_pixels(x_src, 2)
    means, logweights = as_pixels(means, 3), as_pixels(logweights, 3)[:, :, 0]
    n_pixels, width = x_start.shape[2] * x_start.shape[3], x_start.shape[3]
    steps, out = (part.to(torch.float32).contiguous() for part in coefficients)
    block = min(next_power_of_2(n_pixels), INTERPRETED_BLOCK) if is_interpreted() else config.block
    with on_device_of(means):
        kernel[cdiv(n_pixels, block), batch](
            x_start, x_src, means, logweights, steps, out, output.pixels, n_pixels, width, n_steps,
            *strides_of(x_start, x_src, means, logweights, output.pixels),
            K=k, C=c, BLOCK=block, num_warps=config.num_warps, **config.tiles,
        )  # fmt: skip
    return output.get()


def launch_gm_integrate_backward(
    grad: Tensor, x_start: Tensor, x_src: Tensor, means: Tensor, logweights: Tensor, coefficients: GMCoefficients
) -> Adjoints:
    """`piflow_kernels.gm.torch_path.gm_integrate_backward` as one kernel and an ordered sum of partial sums."""
    from .gm import kernels

    check_float32(x_start.dtype)
    batch, k, c = means.shape[:3]
    n_steps = coefficients.steps.shape[1]
    config = gm_launch_config("streamed", k, c)
    kernel: Any = kernels.gm_streamed_backward_kernel
    outputs = Output(x_start, 2), Output(x_src, 2), Output(means, 3), Output(logweights, 3)
    grad, x_start, x_src = (as_pixels(state, 2) for state in (grad, x_start, x_src))
    means, logweights = as_pixels(means, 3), as_pixels(logweights, 3)[:, :, 0]
    bars = [output.pixels for output in outputs[:3]] + [outputs[3].pixels[:, :, 0]]
    n_pixels, width = x_start.shape[2] * x_start.shape[3], x_start.shape[3]
    steps, out = (part.to(torch.float32).contiguous() for part in coefficients)
    block = min(next_power_of_2(n_pixels), INTERPRETED_BLOCK) if is_interpreted() else config.block
    n_blocks = cdiv(n_pixels, block)
    history, stream = (x_start.new_empty(batch, n_steps, c, n_pixels) for _ in range(2))
    stats = x_start.new_empty(batch, n_steps, 3, n_pixels)
    steps_bar, out_bar = x_start.new_empty(batch, n_blocks, n_steps, 7), x_start.new_empty(batch, n_blocks, 4)
    with on_device_of(means):
        kernel[n_blocks, batch](
            grad, x_start, x_src, means, logweights, steps, out,
            *bars, steps_bar, out_bar, history, stream, stats,
            n_pixels, width, n_steps, n_blocks,
            *strides_of(grad, x_start, x_src, means, logweights, *bars),
            K=k, C=c, BLOCK=block, num_warps=config.num_warps, **config.tiles,
        )  # fmt: skip
    sums = GMCoefficients(*(part.to(torch.float64).sum(1) for part in (steps_bar, out_bar)))
    d_start, d_src, d_means, d_logweights = (output.get() for output in outputs)
    return Adjoints(d_start, d_src, d_means, d_logweights, sums)


class Walk:
    """Tensors (B, C, *S) seen as (B, X, Y, Z), the axes in the order in which memory of `like` is walked."""

    def __init__(self, like: Tensor) -> None:
        strides = like.stride()
        self.axes = sorted(range(1, like.dim()), key=lambda axis: -strides[axis])

    def over(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The tensor with its axes reordered, and that as three axes behind the batch and, in a grid, its points."""
        extra = tensor.dim() - len(self.axes) - 1
        moved = tensor.permute(*range(1 + extra), *(axis + extra for axis in self.axes))
        flat = moved[(slice(None),) * (1 + extra) + (None,) * (3 - len(self.axes))]
        return moved, flat.flatten(1 + extra, -3) if len(self.axes) > 3 else flat


def finish(moved: Tensor, flat: Tensor) -> None:
    """Bring what a kernel wrote into `flat` to its tensor, where no view could describe it."""
    if flat.data_ptr() != moved.data_ptr():
        moved.copy_(flat.reshape(moved.shape))


def dx_weights_of(coefficients: DXCoefficients) -> Tensor:
    """(B, N + 2) float32: of x_start, x_src and the grid points."""
    parts = [coefficients.start[:, None], coefficients.src[:, None], coefficients.grid]
    return torch.cat(parts, dim=1).to(torch.float32).contiguous()


def launch_dx_integrate(x_start: Tensor, x_src: Tensor, grid: Tensor, coefficients: DXCoefficients) -> Tensor:
    """`piflow_kernels.dx.torch_path.dx_integrate` as one kernel. Canonical arguments, float32 states."""
    from .dx import kernels

    check_float32(x_start.dtype)
    result = torch.empty_like(x_start)
    if x_start.numel() == 0:
        return result
    weights = dx_weights_of(coefficients)
    walk = Walk(x_start)
    (_, start), (_, src), (_, points) = (walk.over(tensor) for tensor in (x_start, x_src, grid))
    moved, target = walk.over(result)
    n_elements = start[0].numel()
    block = min(next_power_of_2(n_elements), 1 << 16) if is_interpreted() else DX_LAUNCH.block
    with on_device_of(grid):
        kernels.dx_rollout_kernel[cdiv(n_elements, block), grid.shape[0]](
            start, src, points, weights, target, n_elements, *start.shape[2:],
            *strides_of(start, src, points, target),
            N=grid.shape[1], BLOCK=block, num_warps=DX_LAUNCH.num_warps,
        )  # fmt: skip
    finish(moved, target)
    return result


def launch_dx_integrate_backward(
    grad: Tensor, x_start: Tensor, x_src: Tensor, grid: Tensor, coefficients: DXCoefficients
) -> tuple[Tensor, Tensor, Tensor]:
    """`piflow_kernels.dx.torch_path.dx_integrate_backward` as one kernel."""
    from .dx import kernels

    check_float32(x_start.dtype)
    results = torch.empty_like(x_start), torch.empty_like(x_src), torch.empty_like(grid)
    if x_start.numel() == 0:
        return results
    weights = dx_weights_of(coefficients)
    walk = Walk(x_start)
    _, g = walk.over(grad)
    written = [walk.over(result) for result in results]
    start_bar, src_bar, grid_bar = (flat for _, flat in written)
    n_elements = g[0].numel()
    block = min(next_power_of_2(n_elements), 1 << 16) if is_interpreted() else DX_LAUNCH.block
    with on_device_of(grid):
        kernels.dx_backward_kernel[cdiv(n_elements, block), grid.shape[0]](
            g, weights, start_bar, src_bar, grid_bar, n_elements, *g.shape[2:],
            *strides_of(g, start_bar, src_bar, grid_bar),
            N=grid.shape[1], BLOCK=block, num_warps=DX_LAUNCH.num_warps,
        )  # fmt: skip
    for moved, flat in written:
        finish(moved, flat)
    return results
