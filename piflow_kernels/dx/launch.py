"""Launch of the DX kernels: `piflow_kernels.dx.torch_path` on a GPU. Imports triton only where a kernel is needed."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..configs import FAMILIES, coefficient_options, family_of, next_power_of_2
from ..launch import block_of, cdiv, check_count, on_device_of

COEFFICIENT_CHUNK = 128
"""Substeps whose coefficients one pass of the scan makes."""


class Rollout(NamedTuple):
    """Canonical arguments of the DX operators, see `piflow_kernels.arguments`.

    x_start, x_src, target: (B, C, *S) float32. grid: (B, N_g, C, *S), any float dtype. sigmas: (B, N + 1), local,
    sigma_src, segment_size, shift: (B,).
    """

    x_start: Tensor
    sigmas: Tensor
    local: Tensor | None
    x_src: Tensor
    sigma_src: Tensor
    grid: Tensor
    segment_size: Tensor
    shift: Tensor
    target: Tensor | None
    mode: str
    eps: float
    min_delta: float | None


class Walk(NamedTuple):
    """How memory is walked: sizes of three axes, and strides of each tensor (batch, [grid point,] three axes)."""

    sizes: list[int]
    strides: list[list[int]]


def walk(like: Tensor, *tensors: Tensor) -> Walk | None:
    """The axes behind the batch, in the order of memory of `like` (B, C, *S), merged where all tensors allow it.

    Tensors are shaped as `like`, or (B, N_g, C, *S). None where more than three axes remain.
    """
    order = sorted(range(1, like.dim()), key=lambda axis: -like.stride()[axis])
    extras = [tensor.dim() - like.dim() for tensor in tensors]
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for axis in order:
        size = like.shape[axis]
        step = [tensor.stride(axis + extra) for tensor, extra in zip(tensors, extras)]
        if size == 1:
            continue
        if sizes and all(outer[-1] == size * inner for outer, inner in zip(strides, step)):
            sizes[-1] *= size
            for outer, inner in zip(strides, step):
                outer[-1] = inner
        else:
            sizes.append(size)
            for outer, inner in zip(strides, step):
                outer.append(inner)
    if len(sizes) > 3:
        return None
    missing = 3 - len(sizes)
    leading = [list(tensor.stride()[: 1 + extra]) for tensor, extra in zip(tensors, extras)]
    return Walk([1] * missing + sizes, [a + [0] * missing + b for a, b in zip(leading, strides)])


def coefficients(r: Rollout) -> Tensor:
    """Weights of x_start, x_src and the grid points, (B, N_g + 2) float32."""
    from .kernels import dx_coefficients_kernel

    batch, n_grid = r.grid.shape[:2]
    n_levels = r.sigmas.shape[1]
    n_steps = n_levels - 1 if r.min_delta is None else max(n_levels - 1, 1)
    weights = r.x_start.new_empty(batch, n_grid + 2)
    local = r.sigma_src if r.local is None else r.local
    dx_coefficients_kernel[(batch,)](
        r.sigmas, local, r.sigma_src, r.segment_size, r.shift, weights,
        n_levels, n_steps, r.eps, r.min_delta or 0.0,
        *r.sigmas.stride(), local.stride(0), r.sigma_src.stride(0), r.segment_size.stride(0), r.shift.stride(0),
        MEAN=r.min_delta is not None, HAS_LOCAL=r.local is not None, POLYNOMIAL=r.mode == "polynomial",
        N=n_grid, N_TILE=next_power_of_2(n_grid), CHUNK=COEFFICIENT_CHUNK,
        **coefficient_options(FAMILIES[family_of(r.grid.device)]),
    )  # fmt: skip
    return weights


def dx_integrate(r: Rollout) -> Tensor:
    """End state or velocity, shaped and laid out as x_start; with a target its mean square error per sample, (B,)."""
    with on_device_of(r.grid):
        return dx_weighted_sum(r.x_start, r.x_src, r.grid, coefficients(r), r.target)


def dx_weighted_sum(x_start: Tensor, x_src: Tensor, grid: Tensor, weights: Tensor, target: Tensor | None) -> Tensor:
    """w_0 x_start + w_1 x_src + sum_n w_{2+n} v_n with weights (B, N_g + 2); its mean square error given a target."""
    from .kernels import dx_rollout_kernel

    batch = grid.shape[0]
    if x_start.numel() == 0:
        return torch.empty_like(x_start) if target is None else x_start.new_full((batch,), math.nan)
    n_elements = check_count("x_src: elements", x_start[0].numel())
    family = FAMILIES[family_of(grid.device)]
    block = block_of(n_elements, family.dx_block)
    n_blocks = cdiv(n_elements, block)
    result = torch.empty_like(x_start) if target is None else x_start.new_empty(batch, n_blocks)
    compared, written = (x_start, result) if target is None else (target, x_start)
    path = walk(x_start, x_start, x_src, grid, compared, written)
    if path is None:
        compact = None if target is None else target.contiguous()
        plain = dx_weighted_sum(x_start.contiguous(), x_src.contiguous(), grid.contiguous(), weights, compact)
        return plain if target is not None else result.copy_(plain)
    dx_rollout_kernel[(n_blocks * batch,)](
        x_start, x_src, grid, compared, weights, result,
        n_elements, *path.sizes[1:], n_blocks, *itertools.chain(*path.strides),
        N=grid.shape[1], BLOCK=block, HAS_TARGET=target is not None, num_warps=family.dx_warps,
    )  # fmt: skip
    return result if target is None else result.sum(1) / n_elements


class Adjoints(NamedTuple):
    """Of the tensors of a `Rollout` that take gradients."""

    x_start: Tensor
    x_src: Tensor
    grid: Tensor
    target: Tensor | None


def dx_integrate_backward(grad: Tensor, r: Rollout) -> Adjoints:
    """Adjoints, given that of the result: shaped as x_start or, with a target, (B,)."""
    from .kernels import dx_backward_kernel

    results = Adjoints(
        torch.empty_like(r.x_start),
        torch.empty_like(r.x_src),
        torch.empty_like(r.grid),
        None if r.target is None else torch.empty_like(r.target),
    )
    if r.x_start.numel() == 0:
        return results
    n_elements = check_count("x_src: elements", r.x_start[0].numel())
    family = FAMILIES[family_of(r.grid.device)]
    block = block_of(n_elements, family.dx_block)
    n_blocks = cdiv(n_elements, block)
    target = r.x_start if r.target is None else r.target
    written = [results.x_start, results.x_src, results.grid]
    written.append(results.x_start if results.target is None else results.target)
    g = grad if r.target is None else r.x_start
    path = walk(r.x_start, g, r.x_start, r.x_src, r.grid, target, *written)
    if path is None:
        tensors = {"x_start": r.x_start, "x_src": r.x_src, "grid": r.grid, "target": r.target}
        compact: Any = {name: None if value is None else value.contiguous() for name, value in tensors.items()}
        plain = dx_integrate_backward(grad.contiguous(), r._replace(**compact))
        for result, bar in zip(results, plain):
            if result is not None and bar is not None:
                result.copy_(bar)
        return results
    strides = path.strides if r.target is None else [[grad.stride(0), 0, 0, 0], *path.strides[1:]]
    with on_device_of(r.grid):
        dx_backward_kernel[(n_blocks * r.grid.shape[0],)](
            grad, r.x_start, r.x_src, r.grid, target, coefficients(r), *written,
            2 / n_elements, n_elements, *path.sizes[1:], n_blocks, *itertools.chain(*strides),
            N=r.grid.shape[1], BLOCK=block, HAS_TARGET=r.target is not None, num_warps=family.dx_warps,
        )  # fmt: skip
    return results
