"""Textbook GMFlow policy (docs/collapses.md; arXiv 2510.14974, section 4 and appendix): what the tests believe.

Plain differentiable PyTorch in whatever dtype comes in. Canonical arguments, see `piflow_kernels.arguments`:

    x_t, x_src, x_start  (B, C, *S)          means       (B, K, C, *S)   velocity space
    sigma_t, sigma_src   (B,)                logweights  (B, K, 1, *S)   log-probabilities or raw logits
    sigmas               (B, N + 1)          logstds     (B,)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..substeps import starts_local


def per_pixel(scalar: Tensor, state: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), in the dtype of `state`."""
    return scalar.to(state.dtype).reshape(-1, *[1] * (state.dim() - 1))


def mean_velocity(
    x_start: Tensor, x_end: Tensor, velocity: Tensor, sigmas: Tensor, local: Tensor | None, min_delta: float
) -> Tensor:
    """(x_start - x_end) / max(sigma_start - sigma_end, min_delta), or the velocity at the start."""
    delta = (sigmas[:, 0] - sigmas[:, -1]).clamp(min=min_delta)
    at_start = starts_local(sigmas, local).reshape(-1, *[1] * (x_start.dim() - 1))
    return torch.where(at_start, velocity, (x_start - x_end) / per_pixel(delta, x_start))


def gm_velocity(
    x_t: Tensor,
    sigma_t: Tensor,
    x_src: Tensor,
    sigma_src: Tensor,
    means: Tensor,
    logstds: Tensor,
    logweights: Tensor,
    eps: float,
) -> Tensor:
    """u = (x_t - E[x_0 | x_t]) / sigma_t, (B, C, *S)."""
    sigma = per_pixel(sigma_t, x_t).clamp(min=eps)
    s = per_pixel(sigma_src, x_t)
    s_clamped = s.clamp(min=eps)
    a, a_s = (1 - sigma) / sigma, (1 - s_clamped) / s_clamped
    zeta = a**2 - a_s**2
    nu = a * x_t / sigma - a_s * x_src / s_clamped
    variance = (2 * per_pixel(logstds, x_t)).exp() * s**2
    denominator = (1 + variance * zeta).clamp(min=eps)

    mu = x_src[:, None] - s[:, None] * means
    match = (mu * nu[:, None]).sum(2, keepdim=True) - zeta[:, None] * (mu**2).sum(2, keepdim=True) / 2
    w = torch.softmax(logweights + match / denominator[:, None], dim=1)
    x_0 = (variance * nu + (w * mu).sum(1)) / denominator
    return (x_t - x_0) / sigma


def gm_rollout(
    x_start: Tensor,
    sigmas: Tensor,
    x_src: Tensor,
    sigma_src: Tensor,
    means: Tensor,
    logstds: Tensor,
    logweights: Tensor,
    eps: float,
) -> Tensor:
    """Euler: x <- x + (sigma_{n+1} - sigma_n) u(x, sigma_n) over the N substeps, (B, C, *S)."""
    x = x_start
    for n in range(sigmas.shape[1] - 1):
        u = gm_velocity(x, sigmas[:, n], x_src, sigma_src, means, logstds, logweights, eps)
        x = x + per_pixel(sigmas[:, n + 1] - sigmas[:, n], x) * u
    return x
