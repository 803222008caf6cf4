"""Scalars per sample of the collapsed DX rollout (docs/collapses.md), in float64.

x_0 depends on time only, so an Euler rollout is linear in what it starts from and in the network output:

    result = o_start x_start + o_src x_src + sum_n w_n v_n
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import Mode, dx_weights


class Coefficients(NamedTuple):
    """o_start (B,), o_src (B,), w (B, N_g)."""

    start: Tensor
    src: Tensor
    grid: Tensor


def dx_coefficients(
    sigma: Tensor,
    ds: Tensor,
    divisor: Tensor | None,
    sigma_src: Tensor,
    segment_size: Tensor,
    shift: Tensor,
    n_grid: int,
    mode: Mode,
    eps: float,
) -> Coefficients:
    """Coefficients of x_N (divisor None) or of the mean velocity -(x_N - x_start) / divisor.

    sigma, ds: (B, N). divisor, sigma_src, segment_size, shift: (B,). All float64.
    """
    rate = ds / sigma.clamp(min=eps)  # x <- (1 + rate) x - rate x_0
    survival = torch.cat([1 + rate, rate.new_ones(len(rate), 1)], dim=1).flip(1).cumprod(1).flip(1)  # of step n..N
    pull = -rate * survival[:, 1:]
    weights = dx_weights(sigma, sigma_src[:, None], segment_size[:, None], shift[:, None], n_grid, mode, eps)
    per_point = torch.einsum("bn,bng->bg", pull, weights)
    start, src, grid = survival[:, 0], per_point.sum(1), -sigma_src[:, None] * per_point
    if divisor is None:
        return Coefficients(start, src, grid)
    return Coefficients((1 - start) / divisor, -src / divisor, -grid / divisor[:, None])
