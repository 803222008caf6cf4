"""The GM operators as torch.library sees them: a functional operator, its adjoint, the derivative that joins them.

Canonical arguments (`piflow_kernels.arguments`). min_delta: None gives the end state, a number the mean velocity with
the noise difference bounded by it, and with one level the velocity there. A target turns the result into the mean
square error against it, per sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import arguments as arg
from ..registration import differentiable, operator, without_autocast
from ..substeps import steps_of
from . import launch, torch_path
from .coefficients import gm_coefficients, gm_coefficients_and_tangent, variance_of
from .launch import Rollout

TENSORS = (
    "Tensor x_start, Tensor sigmas, Tensor? local, Tensor x_src, Tensor sigma_src, Tensor means, Tensor logstds, "
    "Tensor logweights, Tensor? keep, Tensor? target"
)
OPTIONS = "float temperature, float eps, float? min_delta, str backend"
LEAVES = (0, 3, 5, 6, 7, 9)
"""Positions of x_start, x_src, means, logstds, logweights and target."""


def cpu_implementation(backend: str) -> Callable[..., Tensor]:
    if backend == "torch":
        return torch_path.gm_integrate
    from . import inductor_path  # imports the compiler, which only those who ask for it pay

    return inductor_path.gm_integrate


def in_double(r: Rollout) -> tuple[tuple[Tensor, Tensor, Tensor | None], Tensor, Tensor, Tensor | None]:
    """Substeps, sigma_src and logstds in float64, and the components that stay, at least one of each sample."""
    steps = steps_of(r.sigmas.to(torch.float64), r.local, r.min_delta)
    keep = None if r.keep is None else r.keep | ~r.keep.any(dim=1, keepdim=True)
    return steps, r.sigma_src.to(torch.float64), r.logstds.to(torch.float64), keep


def no_target(r: Rollout) -> Tensor:
    """In place of a target's adjoint: an operator returns a tensor."""
    return r.x_start.new_empty(r.x_start.shape[0], 0)


def integrate(*args: Any) -> Tensor:
    *values, backend, check = args
    r = Rollout(*values)
    arg.check_values(r.sigmas, r.sigma_src, r.min_delta == 0, check)
    with without_autocast(r.x_start):
        if backend == "triton":
            return launch.gm_integrate(r)
        steps, sigma_src, logstds, keep = in_double(r)
        coefficients = gm_coefficients(*steps, sigma_src, r.temperature * variance_of(logstds, sigma_src), r.eps)
        return cpu_implementation(backend)(
            r.x_start, r.x_src, r.means, r.logweights, coefficients,
            keep=keep, temperature=r.temperature, target=r.target,
        )  # fmt: skip


def integrate_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *values, backend = args
    r = Rollout(*values)
    with without_autocast(r.x_start):
        if backend == "triton":
            *adjoints, target_bar = launch.gm_integrate_backward(grad, r)
            return (*adjoints, no_target(r) if target_bar is None else target_bar)
        steps, sigma_src, logstds, keep = in_double(r)
        coefficients, tangent = gm_coefficients_and_tangent(*steps, sigma_src, logstds, r.temperature, r.eps)
        bars = torch_path.gm_integrate_backward(
            grad, r.x_start, r.x_src, r.means, r.logweights, coefficients,
            keep=keep, temperature=r.temperature, target=r.target,
        )  # fmt: skip
        logstds_bar = torch.zeros_like(logstds)
        for bar, slope in zip(bars.coefficients, tangent):
            logstds_bar += (bar * slope).flatten(1).sum(1)
        target_bar = no_target(r) if bars.target is None else bars.target
        return bars.x_start, bars.x_src, bars.means, logstds_bar.to(r.logstds.dtype), bars.logweights, target_bar


def fake(*args: Any) -> Tensor:
    r = Rollout(*args[:-2])
    return torch.empty_like(r.x_start) if r.target is None else r.x_start.new_empty(r.x_start.shape[0])


def fake_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    r = Rollout(*args[:-1])
    leaves = (r.x_start, r.x_src, r.means, r.logstds, r.logweights)
    target_bar = no_target(r) if r.target is None else torch.empty_like(r.target)
    return (*(torch.empty_like(leaf) for leaf in leaves), target_bar)


gm_integrate = operator(f"gm_integrate({TENSORS}, {OPTIONS}, bool check) -> Tensor", integrate, fake)
gm_integrate_backward = operator(
    f"gm_integrate_backward(Tensor grad, {TENSORS}, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    integrate_backward,
    fake_backward,
)


def call(
    x_start: Tensor,
    sigmas: Tensor,
    local: Tensor | None,
    x_src: Tensor,
    sigma_src: Tensor,
    means: Tensor,
    logstds: Tensor,
    logweights: Tensor,
    keep: Tensor | None,
    target: Tensor | None,
    temperature: float,
    eps: float,
    min_delta: float | None,
    backend: str,
    check: bool,
) -> Tensor:
    return gm_integrate(
        x_start, sigmas, local, x_src, sigma_src, means, logstds, logweights, keep, target, temperature, eps, min_delta,
        backend, check,
    )  # fmt: skip


differentiable_gm_integrate = differentiable(
    call, gm_integrate_backward, LEAVES, n_tensors=10, policy="GM", name="gm_integrate"
)
