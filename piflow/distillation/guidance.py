"""Teacher guidance: classifier-free (arXiv 2207.12598), orthogonal (2410.02416), within an interval (2404.07724)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, C, *S), sigma (B,)) -> velocity (B, C, *S): all that distillation knows of a teacher."""


def per_pixel(scalar: Tensor | float, state: Tensor) -> Tensor:
    """A number, 0-d, (B,) or (B, 1, ..., 1): (1 or B, 1, ..., 1) in the dtype of `state` and on its device."""
    scalar = torch.as_tensor(scalar, dtype=state.dtype).to(state.device)
    return scalar.reshape(-1, *[1] * (state.dim() - 1))


def check_shape(name: str, value: object, shape: tuple[int, ...]) -> Tensor:
    """`value`, if it is a tensor of this very shape: nothing is broadcast."""
    if not isinstance(value, Tensor) or tuple(value.shape) != tuple(shape):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected a tensor of shape {tuple(shape)}, got {got}")
    return value


def velocity_from_x_0(x_0: Tensor, x_t: Tensor, sigma: Tensor, eps: float = 1e-4) -> Tensor:
    """u = (x_t - x_0) / max(sigma, eps), for a teacher that predicts x_0. States (B, C, *S), sigma (B,)."""
    return (x_t - check_shape("x_0", x_0, x_t.shape)) / per_pixel(sigma, x_t).clamp(min=eps)


def guidance_bias(
    positive: Tensor,
    negative: Tensor,
    scale: float | Tensor,
    orthogonal: float = 0.0,
    parallel_dir: Tensor | None = None,
) -> Tensor:
    """(scale - 1) (positive - negative), less `orthogonal` times its projection on `parallel_dir` (default: positive).

    Predictions (B, C, *S); scale: a number or (B,). The projection is over channels and space of each sample.
    """
    bias = (per_pixel(scale, positive) - 1) * (positive - check_shape("negative", negative, positive.shape))
    if not orthogonal:
        return bias
    along = positive if parallel_dir is None else check_shape("parallel_dir", parallel_dir, positive.shape)
    axes = tuple(range(1, positive.dim()))
    # A zero direction has no projection: the floor keeps 0 / 0 from becoming NaN.
    square = along.square().sum(axes, keepdim=True).clamp(min=torch.finfo(along.dtype).tiny)
    return bias - orthogonal * (bias * along).sum(axes, keepdim=True) / square * along


def guided_velocity(
    positive: Tensor,
    negative: Tensor,
    scale: float | Tensor,
    x_t: Tensor,
    sigma: Tensor,
    *,
    orthogonal: float = 0.0,
    interval: tuple[float, float] | None = None,
    parallel_dir: Tensor | None = None,
) -> Tensor:
    """Guided velocity from the velocities with and without the condition at (x_t, sigma): (B, C, *S), sigma (B,).

    The part of the guidance that `orthogonal` (0 to 1) removes is parallel to `parallel_dir`, by default the
    conditional estimate of x_0. `interval` = (lowest, highest) noise level, ends included: none elsewhere.
    """
    check_shape("positive", positive, x_t.shape)
    level = per_pixel(sigma, x_t)
    if parallel_dir is None and orthogonal:
        parallel_dir = x_t - level * positive
    bias = guidance_bias(positive, negative, scale, orthogonal, parallel_dir)
    if interval is None:
        return positive + bias
    low, high = interval
    if not low <= high:
        raise ValueError(f"interval: expected (lowest, highest) noise level, got {interval}")
    return torch.where((level >= low) & (level <= high), positive + bias, positive)


def guided_teacher(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    cond: Tensor,
    null_cond: Tensor,
    scale: float,
    *,
    orthogonal: float = 0.0,
    interval: tuple[float, float] | None = None,
) -> VelocityFn:
    """The teacher with guidance as a function of (x_t, sigma) only.

    `velocity(x_t, sigma, cond)` is called once, on the unconditional and the conditional samples together (2 B, in this
    order), or on the conditional ones alone where scale is 1. cond and null_cond: (B, ...).
    """
    if null_cond.shape != cond.shape:
        raise ValueError(f"null_cond: expected the shape of cond, {tuple(cond.shape)}, got {tuple(null_cond.shape)}")

    def teacher(x_t: Tensor, sigma: Tensor) -> Tensor:
        if scale == 1:
            return check_shape("velocity", velocity(x_t, sigma, cond), x_t.shape)
        x_both = torch.cat([x_t, x_t])
        both = velocity(x_both, torch.cat([sigma, sigma]), torch.cat([null_cond, cond]))
        negative, positive = check_shape("velocity", both, x_both.shape).to(x_t.dtype).chunk(2)
        return guided_velocity(positive, negative, scale, x_t, sigma, orthogonal=orthogonal, interval=interval)

    return teacher
