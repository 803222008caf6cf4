"""The DX operators as torch.library sees them; see `piflow_kernels.gm.autograd`, whose conventions they share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import arguments as arg
from ..registration import differentiable, operator, without_autocast
from ..substeps import steps_of
from . import launch, torch_path
from .coefficients import Coefficients, dx_coefficients
from .launch import Rollout

TENSORS = (
    "Tensor x_start, Tensor sigmas, Tensor? local, Tensor x_src, Tensor sigma_src, Tensor grid, Tensor segment_size, "
    "Tensor shift, Tensor? target"
)
OPTIONS = "str mode, float eps, float? min_delta, str backend"
LEAVES = (0, 3, 5, 8)
"""Positions of x_start, x_src, grid and target."""


def check_values(r: Rollout, check: bool) -> None:
    arg.check_values(r.sigmas, r.sigma_src, r.min_delta == 0, check)
    if r.sigmas.device.type == "cpu" or check:
        for name, value in (("segment_size", r.segment_size), ("shift", r.shift)):
            if not bool(((value > 0) & value.isfinite()).all()):
                raise ValueError(f"{name}: expected positive finite numbers, got {value.tolist()}")


def coefficients_of(r: Rollout) -> Coefficients:
    steps = steps_of(r.sigmas.to(torch.float64), r.local, r.min_delta)
    sigma_src, segment_size, shift = (value.to(torch.float64) for value in (r.sigma_src, r.segment_size, r.shift))
    mode: Any = r.mode
    return dx_coefficients(*steps, sigma_src, segment_size, shift, r.grid.shape[1], mode, r.eps)


def integrate(*args: Any) -> Tensor:
    *values, backend, check = args
    r = Rollout(*values)
    check_values(r, check)
    with without_autocast(r.x_start):
        if backend == "triton":
            return launch.dx_integrate(r)
        return torch_path.dx_integrate(r.x_start, r.x_src, r.grid, coefficients_of(r), target=r.target)


def integrate_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *values, backend = args
    r = Rollout(*values)
    with without_autocast(r.x_start):
        if backend == "triton":
            *bars, target_bar = launch.dx_integrate_backward(grad, r)
        else:
            *bars, target_bar = torch_path.dx_integrate_backward(
                grad, r.x_start, r.x_src, r.grid, coefficients_of(r), target=r.target
            )
    return (*bars, r.x_start.new_empty(r.x_start.shape[0], 0) if target_bar is None else target_bar)


def fake(*args: Any) -> Tensor:
    r = Rollout(*args[:-2])
    return torch.empty_like(r.x_start) if r.target is None else r.x_start.new_empty(r.x_start.shape[0])


def fake_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    r = Rollout(*args[:-1])
    target_bar = r.x_start.new_empty(r.x_start.shape[0], 0) if r.target is None else torch.empty_like(r.target)
    return (*(torch.empty_like(leaf) for leaf in (r.x_start, r.x_src, r.grid)), target_bar)


dx_integrate = operator(f"dx_integrate({TENSORS}, {OPTIONS}, bool check) -> Tensor", integrate, fake)
dx_integrate_backward = operator(
    f"dx_integrate_backward(Tensor grad, {TENSORS}, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    integrate_backward,
    fake_backward,
)


def call(
    x_start: Tensor,
    sigmas: Tensor,
    local: Tensor | None,
    x_src: Tensor,
    sigma_src: Tensor,
    grid: Tensor,
    segment_size: Tensor,
    shift: Tensor,
    target: Tensor | None,
    mode: str,
    eps: float,
    min_delta: float | None,
    backend: str,
    check: bool,
) -> Tensor:
    return dx_integrate(
        x_start,
        sigmas,
        local,
        x_src,
        sigma_src,
        grid,
        segment_size,
        shift,
        target,
        mode,
        eps,
        min_delta,
        backend,
        check,
    )


differentiable_dx_integrate = differentiable(
    call, dx_integrate_backward, LEAVES, n_tensors=9, policy="DX", name="dx_integrate"
)
