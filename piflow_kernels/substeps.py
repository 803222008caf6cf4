"""Substeps of a rollout and of a mean-velocity window, shared by the policies."""

from __future__ import annotations

import torch
from torch import Tensor


def substeps(sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """Levels at which the policy is asked and the steps taken from there, each (B, N), of levels (B, N + 1)."""
    return sigmas[:, :-1], sigmas.diff(dim=1)


def starts_local(sigmas: Tensor, local: Tensor | None) -> Tensor:
    """(B,) bool: where the mean velocity is the velocity at the start."""
    still = sigmas[:, 0] == sigmas[:, -1]
    return still if local is None else still | local


def local_substeps(sigmas: Tensor, local: Tensor | None, min_delta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Substeps and the divisor that make -(x_N - x_start) / divisor the mean velocity, (B, N), (B, N), (B,).

    Where the velocity at the start is wanted, the only step is one of length -1 from the first level: its
    displacement is minus the velocity there, without a difference of nearly equal numbers.
    """
    at_start = starts_local(sigmas, local)
    first, last = sigmas[:, :1], sigmas[:, -1:]
    sigma, ds = substeps(sigmas if sigmas.shape[1] > 1 else sigmas.expand(-1, 2))
    once = torch.zeros_like(ds)
    once[:, 0] = -1
    divisor = torch.where(at_start, 1.0, (first - last)[:, 0].clamp(min=min_delta))
    return torch.where(at_start[:, None], first, sigma), torch.where(at_start[:, None], once, ds), divisor


def steps_of(sigmas: Tensor, local: Tensor | None, min_delta: float | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Levels, steps and divisor of the end state (min_delta None) or of the mean velocity."""
    return (*substeps(sigmas), None) if min_delta is None else local_substeps(sigmas, local, min_delta)
