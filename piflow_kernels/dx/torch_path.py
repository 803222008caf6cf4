"""The collapsed DX rollout (docs/collapses.md) in plain PyTorch: one weighted sum over the network output."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..gm.reference import per_pixel
from .coefficients import Coefficients

CHUNK_TOKENS = 1 << 14
"""Tokens per thread and operation."""


@lru_cache(8)
def bags(length: int, n_grid: int) -> tuple[Tensor, Tensor]:
    """Bag i of `embedding_bag` holds rows i n_grid, ..., (i + 1) n_grid - 1. Kept, for a step takes little longer."""
    index = torch.arange(length * n_grid, dtype=torch.int32)
    return index, index[::n_grid].contiguous()


def token_sums(tokens: Tensor, weights: Tensor, kept: list[tuple[float, Tensor]], result: Tensor) -> Tensor:
    """result = sum_i a_i state_i + sum_n weights_n tokens_n for one sample; float32, or float64 throughout.

    tokens: (T, N, C), any dtype, contiguous as transformers emit them. weights: (N,). kept: (a, state (T, C)) pairs.
    The sum over n is that of `embedding_bag`, which reads every row of C values once and in order.
    """
    n_grid, n_channels = tokens.shape[1:]
    length = max(min(CHUNK_TOKENS * torch.get_num_threads(), len(tokens)), 1)
    index, offsets = bags(length, n_grid)
    repeated = weights.repeat(length)
    chunks = (part.split(length) for part in (tokens, result, *(state for _, state in kept)))
    for rows, written, *states in zip(*chunks):
        size = rows.shape[0] * n_grid
        table = rows.to(weights.dtype).reshape(size, n_channels)
        total, *_ = torch.embedding_bag(
            table, index[:size], offsets[: len(rows)], mode=0, per_sample_weights=repeated[:size]
        )
        for (scale, _), state in zip(kept, states):
            total = torch.add(total, state, alpha=scale, out=written)
    return result


def dx_integrate(
    x_start: Tensor, x_src: Tensor, grid: Tensor, coefficients: Coefficients, *, target: Tensor | None = None
) -> Tensor:
    """o_start x_start + o_src x_src + sum_n w_n v_n, laid out as x_start; its mean square error (B,) given a target."""
    result = weighted_sum(x_start, x_src, grid, coefficients)
    if target is None:
        return result
    return result.sub_(target).square_().sum(tuple(range(1, result.dim()))) / result[:1].numel()


def weighted_sum(x_start: Tensor, x_src: Tensor, grid: Tensor, coefficients: Coefficients) -> Tensor:
    """One pass over the grid where layouts allow."""
    batch, n_grid = grid.shape[:2]
    weights = coefficients.grid.to(x_start.dtype)
    result = torch.empty_like(x_start)
    tokens = grid.movedim((1, 2), (-2, -1))
    states = [state.movedim(1, -1) for state in (result, x_start, x_src)]
    if x_start.numel() and all(part.is_contiguous() for part in (tokens, *states)):
        scales = zip(coefficients.start.tolist(), coefficients.src.tolist())
        samples = zip(tokens.flatten(1, -3), weights, scales, *(state.flatten(1, -2) for state in states))
        for sample_tokens, w, (start, src), out, x_0, x_s in samples:
            token_sums(sample_tokens, w, [(start, x_0), (src, x_s)], out)
        return result

    torch.mul(x_start, per_pixel(coefficients.start, x_start), out=result)
    result.addcmul_(x_src, per_pixel(coefficients.src, x_start))
    if x_start.numel() and grid.dtype == weights.dtype and grid.is_contiguous() and result.is_contiguous():
        result.view(batch, 1, -1).baddbmm_(weights[:, None], grid.view(batch, n_grid, -1))
        return result
    for n in range(n_grid):
        result.addcmul_(grid[:, n].to(weights.dtype), per_pixel(weights[:, n], result))
    return result


def dx_integrate_backward(
    grad: Tensor,
    x_start: Tensor,
    x_src: Tensor,
    grid: Tensor,
    coefficients: Coefficients,
    *,
    target: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Adjoints of x_start, x_src, grid and the target, given that of the result."""
    target_bar = None
    if target is not None:
        error = weighted_sum(x_start, x_src, grid, coefficients).sub_(target)
        grad = error.mul_(per_pixel(grad * 2 / error[:1].numel(), error))
        target_bar = torch.neg(grad, out=torch.empty_like(target))
    start_bar = torch.mul(grad, per_pixel(coefficients.start, grad), out=torch.empty_like(x_start))
    src_bar = torch.mul(grad, per_pixel(coefficients.src, grad), out=torch.empty_like(x_src))
    weights = coefficients.grid.to(x_start.dtype)
    grid_bar = torch.empty_like(grid)
    for n in range(grid.shape[1]):
        grid_bar[:, n] = grad * per_pixel(weights[:, n], grad)
    return start_bar, src_bar, grid_bar, target_bar
