"""Scalars per sample of the collapsed GM rollout (docs/collapses.md), in float64: all that does not move per pixel.

A rollout from `delta = x_start - x_src` never leaves the span of x_src, delta and the component velocities v_k = vbar
+ vt_k:

    x_n - x_start = e_n x_src + (d_n - 1) delta + beta_n vbar + sum_k b_{n,k} vt_k

One substep at level sigma over ds updates the coefficients with a softmax over components of the logits

    L = logweights + p_h (vt . x_src) + p_hd (vt . delta) + p_m (vt . vbar) + p_q |vt|^2 + p_G (vt . sum_j b_j vt_j)
    b <- A b + B softmax(L),   beta <- A beta + B,   d <- A d,   1 + e <- A (1 + e) + F
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """What an implementation needs besides the tensors.

    steps: (B, N, 7) with A, B, p_h, p_hd, p_m, p_q, p_G of each substep.
    out: (B, 4) with the weights of x_src, delta, vbar and sum_k b_k vt_k in the result.
    """

    steps: Tensor
    out: Tensor


def scan(gain: Tensor, gift: Tensor, start: Tensor) -> Tensor:
    """y_{n+1} = gain_n y_n + gift_n for y_0 = start: all of y_0 .. y_N, (..., N + 1)."""
    states = [start]
    for a, b in zip(gain.unbind(-1), gift.unbind(-1)):
        states.append(torch.addcmul(b, a, states[-1]))
    return torch.stack(states, dim=-1)


def gm_coefficients(
    sigma: Tensor, ds: Tensor, divisor: Tensor | None, sigma_src: Tensor, variance: Tensor, eps: float
) -> Coefficients:
    """Coefficients of x_N (divisor None) or of the mean velocity -(x_N - x_start) / divisor.

    sigma, ds: (B, N). divisor, sigma_src, variance: (B,), variance = S = T exp(2 logstds) sigma_src^2 at temperature T.
    All float64; a complex variance carries a tangent through (see `gm_coefficients_and_tangent`).
    """
    s, variance = sigma_src[:, None], variance[:, None]
    s_clamped = s.clamp(min=eps)
    sigma = sigma.clamp(min=eps)
    a, a_s = (1 - sigma) / sigma, (1 - s_clamped) / s_clamped
    gap = (s_clamped - sigma) / (s_clamped * sigma)  # a - a_s without cancellation
    zeta = gap * (a + a_s)
    precision = 1 + variance * zeta
    clamped = precision.real <= eps
    denominator = torch.where(clamped, eps, precision)
    # D - S a / sigma; with 1 / sigma = 1 + a the squares, up to 1 / eps^2, cancel here and not in floating point.
    shrink = torch.where(clamped, eps - variance * a / sigma, 1 - variance * (a + a_s**2))

    gain = 1 + (ds / sigma) * shrink / denominator
    gift = ds * s / (sigma * denominator)
    drift = ds / (sigma * denominator) * (variance * a_s / s_clamped - 1)

    # One scan for d, beta and 1 + e, which obey the same recursion with different gifts.
    gifts = torch.stack([torch.zeros_like(gift), gift, drift])
    start = torch.tensor([1.0, 0.0, 1.0], dtype=gift.dtype, device=gift.device)[:, None].expand(3, gift.shape[0])
    d, beta, one_plus_e = scan(gain.expand_as(gifts), gifts, start)

    scale = -s / denominator
    ratio = a / sigma
    steps = torch.stack(
        [
            gain,
            gift,
            scale * (gap + ratio * (one_plus_e[:, :-1] - 1)),
            scale * ratio * d[:, :-1],
            scale * (ratio * beta[:, :-1] + zeta * s),
            scale * zeta * s / 2,
            scale * ratio,
        ],
        dim=-1,
    )
    moved = 0 if divisor is None else 1
    out = torch.stack([one_plus_e[:, -1] - moved, d[:, -1] - moved, beta[:, -1], torch.ones_like(d[:, -1])], dim=-1)
    return Coefficients(steps, out if divisor is None else out / -divisor[:, None])


def gm_coefficients_and_tangent(
    sigma: Tensor,
    ds: Tensor,
    divisor: Tensor | None,
    sigma_src: Tensor,
    logstds: Tensor,
    temperature: float,
    eps: float,
) -> tuple[Coefficients, Coefficients]:
    """Coefficients and their derivatives with respect to logstds, (B, N, 7) and (B, 4) each.

    The derivative is a complex step: the formulas are sums, products and quotients of the variance, dS / dlogstd = 2
    S rides in the imaginary part, and with a step this small nothing of it reaches the real part. One text serves
    value and derivative.
    """
    step = 1e-60
    variance = temperature * variance_of(logstds, sigma_src)
    value = gm_coefficients(sigma, ds, divisor, sigma_src, torch.complex(variance, 2 * step * variance), eps)
    return Coefficients(*(part.real for part in value)), Coefficients(*(part.imag / step for part in value))


def variance_of(logstds: Tensor, sigma_src: Tensor) -> Tensor:
    """S = exp(2 logstds) sigma_src^2, the components' variance in x_0."""
    return (2 * logstds).exp() * sigma_src**2
