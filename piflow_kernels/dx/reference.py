"""Textbook DX policy (docs/collapses.md; pi-Flow, arXiv 2510.14974, section 4): what the tests believe.

Plain differentiable PyTorch in whatever dtype comes in. Canonical arguments, see `piflow_kernels.arguments`:

    x_t, x_src, x_start  (B, C, *S)          grid                 (B, N_g, C, *S)   velocity space
    sigma_t, sigma_src   (B,)                segment_size, shift  (B,)
    sigmas               (B, N + 1)          mode                 "grid" or "polynomial"
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..gm.reference import per_pixel

Mode = Literal["grid", "polynomial"]


def unshift(sigma: Tensor, shift: Tensor) -> Tensor:
    """Raw time of a noise level, r = sigma / (shift + (1 - shift) sigma); the inverse of the timestep shift."""
    return sigma / (shift + (1 - shift) * sigma)


def dx_weights(
    sigma_t: Tensor,
    sigma_src: Tensor,
    segment_size: Tensor,
    shift: Tensor,
    n_grid: int,
    mode: Mode,
    eps: float,
) -> Tensor:
    """Weights of the grid's x_0 estimates at sigma_t (any trailing shape broadcast against (B, ...)): (..., N_g)."""
    r, r_src = unshift(sigma_t, shift), unshift(sigma_src, shift)
    index = torch.arange(n_grid, device=sigma_t.device)
    if mode == "polynomial":
        return (r_src - r)[..., None] ** index
    r_dst = (r_src - segment_size).clamp(min=0)
    length = (r_src - r_dst).clamp(min=eps)
    tau = ((r - r_dst) / length).clamp(0, 1) * (n_grid - 1)
    low = tau.floor().clamp(max=max(n_grid - 2, 0))
    fraction = (tau - low)[..., None]
    low = low[..., None]
    return torch.where(index == low, 1 - fraction, 0.0) + torch.where(index == low + 1, fraction, 0.0)


def dx_velocity(
    x_t: Tensor,
    sigma_t: Tensor,
    x_src: Tensor,
    sigma_src: Tensor,
    grid: Tensor,
    segment_size: Tensor,
    shift: Tensor,
    mode: Mode,
    eps: float,
) -> Tensor:
    """u = (x_t - x_0(sigma_t)) / max(sigma_t, eps) with x_0_n = x_src - sigma_src v_n, (B, C, *S)."""
    weights = dx_weights(sigma_t, sigma_src, segment_size, shift, grid.shape[1], mode, eps)
    x_0_grid = x_src[:, None] - per_pixel(sigma_src, grid) * grid
    x_0 = (
        per_pixel(weights.flatten(), x_0_grid.flatten(0, 1)).reshape(*weights.shape, *[1] * (grid.dim() - 2)) * x_0_grid
    ).sum(1)
    return (x_t - x_0) / per_pixel(sigma_t, x_t).clamp(min=eps)


def dx_rollout(
    x_start: Tensor,
    sigmas: Tensor,
    x_src: Tensor,
    sigma_src: Tensor,
    grid: Tensor,
    segment_size: Tensor,
    shift: Tensor,
    mode: Mode,
    eps: float,
) -> Tensor:
    """Euler: x <- x + (sigma_{n+1} - sigma_n) u(x, sigma_n) over the N substeps, (B, C, *S)."""
    x = x_start
    for n in range(sigmas.shape[1] - 1):
        u = dx_velocity(x, sigmas[:, n], x_src, sigma_src, grid, segment_size, shift, mode, eps)
        x = x + per_pixel(sigmas[:, n + 1] - sigmas[:, n], x) * u
    return x
