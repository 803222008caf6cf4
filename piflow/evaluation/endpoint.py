"""How far a few-step sampler ends from the reference sampler that started at the same noise."""

from __future__ import annotations

from torch import Tensor


def endpoint_mse(samples: Tensor, reference: Tensor) -> float:
    """Mean squared difference of two sets of endpoints (B, C, *S), row by row from the same noise and condition."""
    return endpoint_errors(samples, reference).mean().item()


def endpoint_errors(samples: Tensor, reference: Tensor) -> Tensor:
    """The mean squared difference (B,) float64 of each endpoint (B, C, *S) from the reference's of the same noise."""
    if samples.shape != reference.shape:
        raise ValueError(
            f"samples and reference must have one shape, got {tuple(samples.shape)} and {tuple(reference.shape)}."
        )
    return (samples.double() - reference.double()).square().flatten(1).mean(dim=1)
