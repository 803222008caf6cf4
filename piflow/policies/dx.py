"""DX policy: x_0 estimates on a time grid or as a polynomial (docs/collapses.md)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from piflow_kernels import dx_mean_velocity, dx_mean_velocity_loss, dx_rollout, dx_velocity
from piflow_kernels.arguments import Backend, Layout

from .base import Policy, check_dropout, check_temperature


@dataclass(frozen=True, eq=False)
class DXPolicy(Policy):
    """DX policy (pi-Flow, arXiv 2510.14974, section 4.1).

    grid (B, N_g, C, *S) in velocity space, index 0 at the segment's end; x_src (B, C, *S); sigma_src (B,);
    segment_size and shift: float or (B,), both in terms of raw time. It has no mixture components, so temperature and
    dropout check their argument and change nothing.
    """

    grid: Tensor
    x_src: Tensor
    sigma_src: Tensor
    segment_size: float | Tensor
    shift: float | Tensor
    _: KW_ONLY
    mode: Literal["grid", "polynomial"] = "grid"
    layout: Layout = "spatial"
    eps: float = 1e-4
    backend: Backend | None = None

    @property
    def _source(self) -> tuple[Tensor, Tensor, Tensor, float | Tensor, float | Tensor]:
        return self.x_src, self.sigma_src, self.grid, self.segment_size, self.shift

    @property
    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("mode", "layout", "eps", "backend")}

    def velocity(self, x_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Velocity (B, C, *S) at (x_t, sigma_t (B,))."""
        return dx_velocity(x_t, sigma_t, *self._source, **self._options)

    def rollout(self, x_start: Tensor, sigmas: Tensor) -> Tensor:
        """State (B, C, *S) reached from `x_start` by Euler steps through `sigmas` (B, N + 1)."""
        return dx_rollout(x_start, sigmas, *self._source, **self._options)

    def mean_velocity(self, x_start: Tensor, sigmas: Tensor, local: Tensor | None = None) -> Tensor:
        """Mean velocity (B, C, *S) of the rollout, the velocity at its start where `local` (B,) is true."""
        return dx_mean_velocity(x_start, sigmas, *self._source, local=local, **self._options)

    def mean_velocity_loss(
        self, x_start: Tensor, sigmas: Tensor, target: Tensor, local: Tensor | None = None
    ) -> Tensor:
        """Mean square (B,) of mean_velocity - target (B, C, *S) over channels and space."""
        return dx_mean_velocity_loss(x_start, sigmas, *self._source, target=target, local=local, **self._options)

    def detach(self) -> Self:
        """The same policy, through which no gradient flows to grid or x_src."""
        names = ("grid", "x_src", "sigma_src")
        return replace(self, **{name: getattr(self, name).detach() for name in names})

    def with_temperature(self, temperature: float | None) -> Self:
        """The policy itself: it has no components to sharpen."""
        check_temperature(temperature)
        return self

    def with_dropout(self, p: float, generator: torch.Generator | None = None, draw: Tensor | None = None) -> Self:
        """The policy itself: it has no components to drop."""
        check_dropout(p)
        return self
