"""The public DX operators: checks and choice of implementation."""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from .. import arguments as arg
from ..arguments import Backend, Layout
from ..gm.reference import mean_velocity
from . import reference
from .autograd import check_values, differentiable_dx_integrate
from .launch import Rollout
from .reference import Mode


class TimeGrid(NamedTuple):
    """Canonical arguments of every DX operator: what `piflow_kernels.arguments` calls so."""

    x_src: Tensor
    sigma_src: Tensor
    grid: Tensor
    segment_size: Tensor
    shift: Tensor
    mode: Mode
    packed: bool

    def unpack(self, state: Tensor) -> Tensor:
        """(B, *S, C) -> (B, C, *S), a view; spatial states are canonical already."""
        return state.movedim(-1, 1) if self.packed else state

    def pack(self, state: Tensor) -> Tensor:
        return state.movedim(1, -1) if self.packed else state


def positive(name: str, value: float | Tensor, batch: int, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        arg.check_positive(name, value)
    return arg.constant(arg.per_sample(name, value, batch, device))


def canonical_grid(
    x_src: Tensor,
    sigma_src: Tensor | float,
    grid: Tensor,
    segment_size: Tensor | float,
    shift: Tensor | float,
    mode: Mode,
    layout: Layout,
    eps: float,
) -> TimeGrid:
    arg.check_layout(layout)
    arg.check_positive("eps", eps)
    if mode not in get_args(Mode):
        raise ValueError(f"mode: expected one of {get_args(Mode)}, got {mode!r}")
    device = arg.check_network("grid", grid).device
    packed = layout == "packed"
    if grid.dim() not in (4, 5, 6):
        expected = "(B, *S, N, C)" if packed else "(B, N, C, *S)"
        raise ValueError(f"grid: expected {expected} with one to three spatial axes, got {arg.shape_of(grid)}")
    state_shape = (*grid.shape[:-2], grid.shape[-1]) if packed else (grid.shape[0], *grid.shape[2:])
    arg.check_state("x_src", x_src, state_shape, device)
    if packed:
        grid = grid.movedim((-2, -1), (1, 2))
    if grid.shape[1] == 0 or grid.shape[2] == 0:
        raise ValueError(f"grid: expected at least one grid point and one channel, got {arg.shape_of(grid)}")
    batch = grid.shape[0]
    time_grid = TimeGrid(
        x_src=x_src,
        sigma_src=arg.constant(arg.per_sample("sigma_src", sigma_src, batch, device)),
        grid=grid,
        segment_size=positive("segment_size", segment_size, batch, device),
        shift=positive("shift", shift, batch, device),
        mode=mode,
        packed=packed,
    )
    return time_grid._replace(x_src=time_grid.unpack(x_src))


def integrate(
    name: str,
    x_start: Tensor,
    sigmas: Tensor,
    local: Tensor | None,
    x_src: Tensor,
    time_grid: TimeGrid,
    eps: float,
    min_delta: float | None,
    backend: Backend | None,
    check: bool,
    target: Tensor | None = None,
) -> Tensor:
    """Dispatch of every DX operator; states are the caller's, and the result is laid out like them, or (B,)."""
    device = time_grid.grid.device
    arg.check_state(name, x_start, arg.shape_of(x_src), device)
    dtype = arg.computing_dtype(x_start, x_src, time_grid.grid, *(() if target is None else (target,)))
    if backend == "inductor":
        raise ValueError(
            "backend: 'inductor' compiles GM operators only; a DX rollout is one sum as fast as memory, use 'torch'"
        )
    backend = arg.resolve_backend(backend, device, dtype)
    arg.check_flag("check", check)
    x_start, canonical_src = time_grid.unpack(x_start).to(dtype), time_grid.x_src.to(dtype)
    if target is not None:
        target = time_grid.unpack(arg.check_state("target", target, arg.shape_of(x_src), device)).to(dtype)
    sigmas = arg.constant(sigmas)
    tensors = (time_grid.sigma_src, time_grid.grid, time_grid.segment_size, time_grid.shift)
    options = (time_grid.mode, eps, min_delta)
    if backend != "reference":
        result = differentiable_dx_integrate(
            x_start, sigmas, local, canonical_src, *tensors, target, *options, backend, check
        )
        return time_grid.pack(result) if target is None else result

    check_values(Rollout(x_start, sigmas, local, canonical_src, *tensors, target, *options), check)
    sigmas = sigmas.to(torch.float64)
    network: Any = (canonical_src, *(value.to(dtype) for value in tensors), time_grid.mode, eps)
    end = reference.dx_rollout(x_start, sigmas.to(dtype), *network) if sigmas.shape[1] > 1 else x_start.clone()
    if min_delta is None:
        return time_grid.pack(end)
    velocity = reference.dx_velocity(x_start, sigmas[:, 0].to(dtype), *network)
    if min_delta > 0:
        velocity = mean_velocity(x_start, end, velocity, sigmas, local, min_delta)
    return time_grid.pack(velocity) if target is None else (velocity - target).square().flatten(1).mean(1)


def dx_velocity(
    x_t: Tensor,
    sigma_t: Tensor | float,
    x_src: Tensor,
    sigma_src: Tensor | float,
    grid: Tensor,
    segment_size: Tensor | float,
    shift: Tensor | float,
    mode: Mode = "grid",
    eps: float = 1e-4,
    *,
    layout: Layout = "spatial",
    backend: Backend | None = None,
    check: bool = False,
) -> Tensor:
    """Velocity of the DX policy, u = (x_t - x_0(sigma_t)) / max(sigma_t, eps) (arXiv 2510.14974; docs/collapses.md).

    Args:
        x_t: state (B, C, *S) with one to three spatial axes, or (B, *S, C) in the packed layout; float32 (float64 on
            the CPU).
        sigma_t: noise level in [0, 1], (B,) or broadcastable to (B, 1, ...).
        x_src, sigma_src: state and noise level at which the network was evaluated.
        grid: velocities as the network predicts them, (B, N, C, *S) or packed (B, *S, N, C); index 0 of a grid is the
            segment's end; float32, bfloat16, float16 (or float64).
        segment_size: length of the segment in raw time, float or (B,).
        shift: timestep shift between raw time and noise level, float or (B,).
        mode: "grid" (linear between grid points) or "polynomial" (coefficients of powers of raw_t_src - raw_t).
        eps: lower bound of sigma in the denominator and of the segment's length.
        layout: "spatial" or "packed".
        backend: None, "reference", "torch" or "triton".
        check: also check values on a GPU, where reading them synchronises.

    Returns:
        The velocity, shaped as x_t, float32 (float64 where states or grid are). Differentiable once with respect to
        grid, x_src and x_t.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    time_grid = canonical_grid(x_src, sigma_src, grid, segment_size, shift, mode, layout, eps)
    sigma = arg.per_sample("sigma_t", sigma_t, grid.shape[0], grid.device)[:, None]
    return integrate("x_t", x_t, sigma, None, x_src, time_grid, eps, 0.0, backend, check)


def dx_rollout(
    x_start: Tensor,
    sigmas: Tensor,
    x_src: Tensor,
    sigma_src: Tensor | float,
    grid: Tensor,
    segment_size: Tensor | float,
    shift: Tensor | float,
    mode: Mode = "grid",
    eps: float = 1e-4,
    *,
    layout: Layout = "spatial",
    backend: Backend | None = None,
    check: bool = False,
) -> Tensor:
    """End state of an Euler rollout of the DX policy over the substeps of `sigmas`: one weighted sum.

    Args:
        x_start: state at sigmas[:, 0]; shapes and the remaining arguments as in `dx_velocity`.
        sigmas: noise levels visited, (N + 1,), (1, N + 1) or (B, N + 1); non-increasing, sigmas[:, 0] <= sigma_src,
            within [0, 1] (all to 1e-6). Equal neighbours are a substep that does nothing, so samples with fewer
            substeps share a batch.

    Returns:
        The state at sigmas[:, -1], shaped as x_start, float32 (float64 where states or grid are). Differentiable once
        with respect to grid, x_src and x_start.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    time_grid = canonical_grid(x_src, sigma_src, grid, segment_size, shift, mode, layout, eps)
    levels = arg.noise_levels(sigmas, grid.shape[0], grid.device)
    return integrate("x_start", x_start, levels, None, x_src, time_grid, eps, None, backend, check)


def dx_mean_velocity(
    x_start: Tensor,
    sigmas: Tensor,
    x_src: Tensor,
    sigma_src: Tensor | float,
    grid: Tensor,
    segment_size: Tensor | float,
    shift: Tensor | float,
    local: Tensor | None = None,
    mode: Mode = "grid",
    eps: float = 1e-4,
    min_delta: float = 1e-4,
    *,
    layout: Layout = "spatial",
    backend: Backend | None = None,
    check: bool = False,
) -> Tensor:
    """Mean velocity over a window, (x_start - x_end) / max(sigma_start - sigma_end, min_delta).

    Where `local` (B,) bool holds, or the first and last level are equal, the velocity at the start. Arguments, result
    and errors otherwise as in `dx_rollout`.
    """
    time_grid = canonical_grid(x_src, sigma_src, grid, segment_size, shift, mode, layout, eps)
    arg.check_positive("min_delta", min_delta)
    levels = arg.noise_levels(sigmas, grid.shape[0], grid.device)
    local = arg.check_mask("local", local, (grid.shape[0],), grid.device)
    return integrate("x_start", x_start, levels, local, x_src, time_grid, eps, min_delta, backend, check)


def dx_mean_velocity_loss(
    x_start: Tensor,
    sigmas: Tensor,
    x_src: Tensor,
    sigma_src: Tensor | float,
    grid: Tensor,
    segment_size: Tensor | float,
    shift: Tensor | float,
    target: Tensor,
    local: Tensor | None = None,
    mode: Mode = "grid",
    eps: float = 1e-4,
    min_delta: float = 1e-4,
    *,
    layout: Layout = "spatial",
    backend: Backend | None = None,
    check: bool = False,
) -> Tensor:
    """Mean square error of `dx_mean_velocity` against `target` over channels and space, per sample: (B,).

    Differentiable also with respect to `target`, which is shaped as x_start.
    """
    time_grid = canonical_grid(x_src, sigma_src, grid, segment_size, shift, mode, layout, eps)
    arg.check_state("target", target, arg.shape_of(x_src), grid.device)
    arg.check_positive("min_delta", min_delta)
    levels = arg.noise_levels(sigmas, grid.shape[0], grid.device)
    local = arg.check_mask("local", local, (grid.shape[0],), grid.device)
    return integrate("x_start", x_start, levels, local, x_src, time_grid, eps, min_delta, backend, check, target)
