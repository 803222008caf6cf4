"""Whether results are right: against float64, with the float32 textbook's own rounding as the yardstick."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

VALUE_ROUNDING, GRADIENT_ROUNDING = 4e-7, 5e-6
"""Relative error of a value and of a gradient that one substep may have in any case; N of them sqrt(N) times that."""
TEXTBOOK_BOUND = 1e-2
"""Beyond this the float32 textbook is no yardstick."""

NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda x: x.abs().max(),
    "rms": lambda x: x.square().mean().sqrt(),
}


@dataclass(frozen=True)
class Verdict:
    """errors: relative error by result and norm, as (candidate, textbook, bound)."""

    errors: dict[str, tuple[float, float, float]]

    @property
    def within_bounds(self) -> bool:
        return all(ours <= bound for ours, _, bound in self.errors.values())

    @property
    def right(self) -> bool:
        """Within bounds, and the textbook is a yardstick."""
        return self.within_bounds and all(theirs <= TEXTBOOK_BOUND for _, theirs, _ in self.errors.values())

    @property
    def worst(self) -> tuple[str, float, float]:
        """(result, error, bound) where the error is the largest part of its bound; not finite counts as that."""

        def share(entry: tuple[str, tuple[float, float, float]]) -> float:
            ours, _, bound = entry[1]
            return ours / bound if math.isfinite(ours) else math.inf

        name, (ours, _, bound) = max(self.errors.items(), key=share)
        return name, ours, bound


def judge(
    names: Sequence[str],
    actual: Sequence[Tensor],
    exact: Sequence[Tensor],
    textbook: Sequence[Tensor],
    n_steps: float,
) -> Verdict:
    """Of a value and its gradients (`names` in that order); `exact` is in float64.

    Each may be as far off as max(2 x the textbook, rounding) relative to the exact result, in maximum and RMS; the
    rounding of a gradient is at least that of the dtype in which it is stored.
    """
    errors = {}
    for i, (name, a, e, t) in enumerate(zip(names, actual, exact, textbook, strict=True)):
        rounding = (VALUE_ROUNDING if i == 0 else GRADIENT_ROUNDING) * math.sqrt(max(n_steps, 1))
        rounding = max(rounding, torch.finfo(a.dtype).eps)
        if a.shape != e.shape:
            raise ValueError(f"{name}: expected shape {tuple(e.shape)}, got {tuple(a.shape)}")
        for norm, of in NORMS.items():
            scale = of(e).item() or 1.0
            ours, theirs = (of(x.double() - e).item() / scale for x in (a, t))
            errors[f"{name} {norm}"] = (ours, theirs, max(2 * theirs, rounding))
    return Verdict(errors)
