"""What all policies share (pi-Flow, arXiv 2510.14974, section 4)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from numbers import Real
from typing import Literal, Self

import torch
from torch import Tensor

from piflow.noise_schedule import NoiseSchedule


class Policy(ABC):
    """A velocity field u(x_t, sigma_t) fixed by one network evaluation at (x_src, sigma_src). Never changed in place.

    States are (B, C, *S) with one to three spatial axes (or packed tokens), noise levels (B,), `sigmas` (B, N + 1) the
    levels visited. Distillation and sampling know a policy by these methods only.
    """

    x_src: Tensor
    sigma_src: Tensor

    @abstractmethod
    def velocity(self, x_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Velocity at (x_t, sigma_t), the shape of x_t."""

    @abstractmethod
    def rollout(self, x_start: Tensor, sigmas: Tensor) -> Tensor:
        """State reached from `x_start` by Euler steps through the noise levels `sigmas` (B, N + 1)."""

    @abstractmethod
    def mean_velocity(self, x_start: Tensor, sigmas: Tensor, local: Tensor | None = None) -> Tensor:
        """(x_start - x_end) / (sigma_start - sigma_end) of a rollout; the velocity at the start where `local` (B,)."""

    @abstractmethod
    def mean_velocity_loss(
        self, x_start: Tensor, sigmas: Tensor, target: Tensor, local: Tensor | None = None
    ) -> Tensor:
        """Mean square of mean_velocity - target over channels and space, per sample: (B,)."""

    @abstractmethod
    def detach(self) -> Self:
        """The same policy, through which no gradient flows to the network."""

    @abstractmethod
    def with_temperature(self, temperature: float | None) -> Self:
        """The policy with its component distribution sharpened by `temperature` < 1 (1 or more: unchanged)."""

    @abstractmethod
    def with_dropout(self, p: float, generator: torch.Generator | None = None, draw: Tensor | None = None) -> Self:
        """The policy with each component of each sample dropped with probability `p`; if all are dropped, none is."""

    def integrate(
        self,
        x_start: Tensor,
        raw_t_start: Tensor,
        raw_t_end: Tensor,
        schedule: NoiseSchedule,
        total_substeps: int,
        seq_len: int | None = None,
    ) -> Tensor:
        """Rollout between raw times (B,), with `total_substeps` substeps for the whole of [0, 1]."""
        sigmas = schedule.substep_sigmas(raw_t_start, raw_t_end, total_substeps, seq_len)
        return self.rollout(x_start, sigmas.to(x_start.device))


def auto_temperature(nfe: int) -> float:
    """The published temperature rule, 0.1 (nfe - 1) within [0, 1]: few steps want a sharp policy."""
    return min(max(0.1 * (nfe - 1), 0.0), 1.0)


def resolve_temperature(temperature: float | Literal["auto"] | None, nfe: int) -> float | None:
    """A temperature as users write it: a number, None, or "auto" for `auto_temperature(nfe)`."""
    return auto_temperature(nfe) if temperature == "auto" else check_temperature(temperature)


def check_temperature(temperature: object) -> float | None:
    """A temperature as policies take it: a number or None. "auto" needs `resolve_temperature` first."""
    if temperature is None:
        return None
    if temperature == "auto":
        raise ValueError(
            "temperature: 'auto' depends on nfe, which a policy does not know: piflow.sampler.sample resolves it, "
            "and so does resolve_temperature('auto', nfe)"
        )
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise ValueError(f"temperature: expected a number, 'auto' or None, got {temperature!r}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature: expected a finite number, at least 0, got {temperature}")
    return float(temperature)


def check_dropout(p: float, name: str = "p") -> None:
    """Raise a ValueError unless `p` is a probability."""
    if not isinstance(p, Real) or not 0 <= p <= 1:
        raise ValueError(f"{name}: expected a dropout probability within [0, 1], got {p!r}")
