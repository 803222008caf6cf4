"""GMFlow policy: Gaussian-mixture velocities, integrated in closed form per component (docs/collapses.md)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from piflow_kernels import gm_mean_velocity, gm_mean_velocity_loss, gm_rollout, gm_velocity
from piflow_kernels.arguments import Backend, Layout

from .base import Policy, check_dropout, check_temperature


@dataclass(frozen=True, eq=False)
class GMFlowPolicy(Policy):
    """GMFlow policy (pi-Flow, arXiv 2510.14974, section 4.2).

    means (B, K, C, *S) in velocity space, logstds (B, 1, 1, *1) or (B,), logweights (B, K, 1, *S), x_src (B, C, *S),
    sigma_src (B,); with layout="packed" as the transformers emit them. keep: (B, K) bool, False = dropped.
    Wrong shapes, dtypes and noise levels raise a ValueError where an operator first reads them.
    """

    means: Tensor
    logstds: Tensor
    logweights: Tensor
    x_src: Tensor
    sigma_src: Tensor
    _: KW_ONLY
    temperature: float | None = None
    keep: Tensor | None = None
    layout: Layout = "spatial"
    eps: float = 1e-6
    backend: Backend | None = None

    @property
    def _source(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.x_src, self.sigma_src, self.means, self.logstds, self.logweights

    @property
    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("temperature", "keep", "layout", "eps", "backend")}

    def velocity(self, x_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Velocity (B, C, *S) at (x_t, sigma_t (B,))."""
        return gm_velocity(x_t, sigma_t, *self._source, **self._options)

    def rollout(self, x_start: Tensor, sigmas: Tensor) -> Tensor:
        """State (B, C, *S) reached from `x_start` by Euler steps through `sigmas` (B, N + 1)."""
        return gm_rollout(x_start, sigmas, *self._source, **self._options)

    def mean_velocity(self, x_start: Tensor, sigmas: Tensor, local: Tensor | None = None) -> Tensor:
        """Mean velocity (B, C, *S) of the rollout, the velocity at its start where `local` (B,) is true."""
        return gm_mean_velocity(x_start, sigmas, *self._source, local=local, **self._options)

    def mean_velocity_loss(
        self, x_start: Tensor, sigmas: Tensor, target: Tensor, local: Tensor | None = None
    ) -> Tensor:
        """Mean square (B,) of mean_velocity - target (B, C, *S) over channels and space."""
        return gm_mean_velocity_loss(x_start, sigmas, *self._source, target=target, local=local, **self._options)

    def detach(self) -> Self:
        """The same policy, through which no gradient flows to means, logstds, logweights or x_src."""
        names = ("means", "logstds", "logweights", "x_src", "sigma_src")
        return replace(self, **{name: getattr(self, name).detach() for name in names})

    def with_temperature(self, temperature: float | None) -> Self:
        """The policy at this temperature: a number, at least 0 (1 or more: unchanged), or None."""
        return replace(self, temperature=check_temperature(temperature))

    def with_dropout(self, p: float, generator: torch.Generator | None = None, draw: Tensor | None = None) -> Self:
        """Dropped where the uniform `draw` (B, K) < p. Without a draw, one is made with `generator`, on its device."""
        check_dropout(p)
        if p == 0:
            return self
        batch, components = self.means.shape[0], self.means.shape[2 if self.layout == "packed" else 1]
        if draw is None:
            device = self.means.device if generator is None else generator.device
            draw = torch.rand(batch, components, generator=generator, device=device)
        if draw.shape[:2] != (batch, components) or draw.numel() != batch * components:
            raise ValueError(
                f"draw: expected one number per sample and component, shape ({batch}, {components}), "
                f"got {tuple(draw.shape)}"
            )
        before = torch.ones(batch, components, dtype=torch.bool) if self.keep is None else self.keep
        before = before.to(self.means.device)
        keep = before & (draw.reshape(batch, components).to(self.means.device) >= p)
        return replace(self, keep=torch.where(keep.any(dim=1, keepdim=True), keep, before))
