"""Few-step sampling with a flow map, deterministic or stochastic (torch only; pi-Flow, arXiv 2510.14974, appendix).

A step from noise level s to the next one n follows the policy further down than n, to the destination d, and adds noise
back. With h >= 0 (0: an ODE, no noise; infinity: always down to x_0) the share of the noise that is kept is

    m = ( n (1 - s) / (s (1 - n)) )^(h^2),     d = m n / (1 - n + m n),     d / (1 - d) = m n / (1 - n)
    x_n = (1 - n + m n) x_d + n sqrt(1 - m^2) noise
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class FlowMap(NamedTuple):
    """sigmas (nfe + 1,): levels of the network evaluations, then 0; sigmas_dst, kept (nfe,): d and m of each step."""

    sigmas: Tensor
    sigmas_dst: Tensor
    kept: Tensor


def flow_map(sigmas: Tensor, h: float) -> FlowMap:
    """Destinations d and kept shares m for the levels `sigmas` (nfe,) of the network evaluations, in their dtype.

    Levels that rounding has put above 1 (some shifts warp raw time 1 to 1 + 1.2e-7) are set to 1: beyond it m is the
    root of a negative number.
    """
    sigmas = torch.cat([sigmas.clamp(max=1), sigmas.new_zeros(1)])
    current, following = sigmas[:-1], sigmas[1:]
    kept = ((1 - current) * following / ((1 - following) * current)) ** (h * h)
    sigmas_dst = kept * following / ((1 - following) + kept * following)
    return FlowMap(sigmas, sigmas_dst, kept)


def flow_map_step(x_dst: Tensor, sigma_next: Tensor, kept: Tensor, noise: Tensor) -> Tensor:
    """State at `sigma_next` from the state x_dst at the destination and fresh noise, both (B, C, *S); scalars 0-d."""
    scale = (1 - sigma_next) + kept * sigma_next
    return scale * x_dst + sigma_next * (1 - kept.square()).clamp(min=0).sqrt() * noise


def check_h(h: float | str) -> float:
    """h as a number: "inf" is how a JSON configuration says infinity."""
    try:
        value = float(h)
    except (TypeError, ValueError):
        value = math.nan
    if math.isnan(value) or value < 0:
        raise ValueError(f"h: expected a number, at least 0 ('inf' included), got {h!r}")
    return value
