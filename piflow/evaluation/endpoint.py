"""How far a few-step sampler ends from the reference sampler that started at the same noise."""

from torch import Tensor


def endpoint_mse(samples: Tensor, reference: Tensor) -> float:
    """Mean squared difference of two sets of endpoints (B, C, *S), row by row from the same noise and condition."""
    if samples.shape != reference.shape:
        raise ValueError(
            f"samples and reference must have one shape, got {tuple(samples.shape)} and {tuple(reference.shape)}."
        )
    return (samples.double() - reference.double()).square().mean().item()
