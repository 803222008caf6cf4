"""Launch of the Triton kernels. Imports triton only where a kernel is first needed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from typing import Any, Literal

import torch
from torch import Tensor

from .gm.coefficients import Coefficients
from .gm.torch_path import gram_space_is_cheaper

LARGEST_GRAM = 8
"""Components up to which K (K + 1) / 2 + 3 K live values per pixel stay in registers (DESIGN 2.2)."""

LARGEST_TILE, MOST_CHANNELS = 128, 16
"""Velocities and channels per pixel up to which channel space stays in registers."""


def kernel_form(n_components: int, n_channels: int, n_steps: int) -> Literal["gram", "channel"] | None:
    """The cheaper form among those that fit in registers; None where this version has no kernel."""
    gram = n_components <= LARGEST_GRAM
    padded = 1 << (n_components - 1).bit_length()
    channel = padded * n_channels <= LARGEST_TILE and n_channels <= MOST_CHANNELS
    if gram and (not channel or gram_space_is_cheaper(n_components, n_channels, n_steps)):
        return "gram"
    return "channel" if channel else None


def why_triton_cannot_run(device: torch.device) -> str | None:
    """The reason why kernels cannot run for tensors on `device`; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; on Linux `pip install triton>=3.6` installs it"
    if device.type == "cuda":
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"tensors are on {device}, it needs them on a GPU (or TRITON_INTERPRET=1 to interpret kernels on the CPU)"


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def as_pixels(tensor: Tensor, leading: int) -> Tensor:
    """(..., *S) -> (..., R, W): the last spatial axis, and the others together. A view where the strides allow it."""
    spatial = tensor.shape[leading:]
    return tensor.reshape(*tensor.shape[:leading], -1, spatial[-1])


def launch_gm_integrate(
    x_start: Tensor, x_src: Tensor, means: Tensor, logweights: Tensor, coefficients: Coefficients
) -> Tensor:
    """`piflow_kernels.gm.torch_path.gm_integrate` as one kernel. Canonical arguments, float32 states.

    Raises:
        ValueError: for float64 (kernels compute in float32) and for (K, C) that no kernel of this version covers.
    """
    import triton

    from .gm import kernels

    batch, n_components, n_channels = means.shape[:3]
    n_steps = coefficients.steps.shape[1]
    form = kernel_form(n_components, n_channels, n_steps)
    if x_start.dtype == torch.float64:
        raise ValueError("backend: 'triton' computes in float32, but an input is float64; use 'torch' or 'reference'")
    if form is None:
        raise ValueError(
            f"backend: 'triton' has no GM kernel for K = {n_components}, C = {n_channels} in this version; use 'torch'"
        )
    result = torch.empty_like(x_start)
    if result.numel() == 0:
        return result
    x_start, x_src, pixels = (as_pixels(state, 2) for state in (x_start, x_src, result))
    means, logweights = as_pixels(means, 3), as_pixels(logweights, 3)[:, :, 0]
    n_pixels, width = pixels.shape[2] * pixels.shape[3], pixels.shape[3]
    steps, out = (part.to(torch.float32).contiguous() for part in coefficients)

    # The interpreter pays per program, a GPU for registers: few large programs there, a warp's worth of pixels here.
    block = min(triton.next_power_of_2(n_pixels), 4096) if is_interpreted() else (128 if form == "gram" else 32)
    grid = (triton.cdiv(n_pixels, block), batch)
    kernel: Any = kernels.gm_gram_rollout_kernel if form == "gram" else kernels.gm_channel_rollout_kernel
    tile = {} if form == "gram" else {"K_TILE": triton.next_power_of_2(n_components)}
    strides = [s for tensor in (x_start, x_src, means, logweights, pixels) for s in tensor.stride()]
    with torch.cuda.device(means.device) if means.is_cuda else contextlib.nullcontext():
        kernel[grid](
            x_start, x_src, means, logweights, steps, out, pixels, n_pixels, width, n_steps, *strides,
            K=n_components, C=n_channels, BLOCK=block, num_warps=4, **tile,
        )  # fmt: skip
    if pixels.data_ptr() != result.data_ptr():  # strides that no (R, W) view describes
        result.copy_(pixels.reshape(result.shape))
    return result
