"""What the launches of the Triton kernels share: where they can run, and tensors as rows and columns of pixels."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from typing import Any

import torch
from torch import Tensor

from .configs import next_power_of_2

INTERPRETED_BLOCK = 4096
"""The interpreter pays per program, so it gets few large ones."""


def why_triton_cannot_run(device: torch.device) -> str | None:
    """The reason why kernels cannot run for tensors on `device`; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; on Linux `pip install 'triton>=3.6'` installs it"
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return "this GPU has no float64, in which the coefficients are computed"
    if device.type in ("cuda", "xpu") or (device.type == "cpu" and is_interpreted()):
        return None
    return f"tensors are on {device}, it needs them on a GPU (or TRITON_INTERPRET=1 to interpret kernels on the CPU)"


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device; where that is another than the tensors', switch to theirs."""
    device = tensor.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    if device.type == "xpu" and device.index != torch.xpu.current_device():
        return torch.xpu.device(device)
    return contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def block_of(n_elements: int, configured: int) -> int:
    return min(next_power_of_2(n_elements), INTERPRETED_BLOCK) if is_interpreted() else configured


def rows_and_columns(tensor: Tensor, leading: int) -> list[int] | None:
    """Strides of (..., *S) as (..., R, W), W the last spatial axis and R the others together; None where R has none."""
    strides = list(tensor.stride())
    spatial = strides[leading:]
    if len(spatial) == 1:
        return [*strides[:leading], 0, spatial[0]]
    if len(spatial) == 3:
        depth, height = tensor.shape[leading : leading + 2]
        if height == 1:
            spatial = [spatial[0], spatial[2]]
        elif depth == 1 or spatial[0] == height * spatial[1]:
            spatial = spatial[1:]
        else:
            return None
    return [*strides[:leading], *spatial]


class Pixels:
    """A tensor that a kernel reads, and its strides as rows and columns; a copy only where there are none."""

    def __init__(self, tensor: Tensor, leading: int) -> None:
        strides = rows_and_columns(tensor, leading)
        self.tensor = tensor if strides is not None else tensor.contiguous()
        self.strides = strides or rows_and_columns(self.tensor, leading) or []


class Output:
    """A tensor to be written, shaped and laid out like `like`, and its strides as rows and columns."""

    def __init__(self, like: Tensor, leading: int) -> None:
        self.result = torch.empty_like(like)
        strides = rows_and_columns(self.result, leading)
        self.tensor = self.result if strides is not None else self.result.contiguous()
        self.strides = strides or rows_and_columns(self.tensor, leading) or []

    def get(self) -> Tensor:
        if self.tensor is not self.result:
            self.result.copy_(self.tensor)
        return self.result


MOST_PIXELS = 2**31 - 2**16
"""Of a sample, or elements of its state: their index is a 32-bit number, offsets into tensors are 64-bit ones."""


def check_count(name: str, count: int) -> int:
    if count > MOST_PIXELS:
        raise ValueError(f"{name}: expected at most {MOST_PIXELS} per sample for backend 'triton', got {count}")
    return count


def pixel_counts(state: Tensor) -> tuple[int, int]:
    """Pixels of a sample of (B, C, *S), and of one row of it."""
    return check_count("x_src: pixels", math.prod(state.shape[2:])), state.shape[-1]
