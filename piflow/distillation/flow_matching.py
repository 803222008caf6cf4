"""The flow-matching loss that trains teachers (arXiv 2210.02747)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from piflow.noise_schedule import NoiseSchedule

from .guidance import VelocityFn, check_shape, per_pixel
from .times import sample_raw_times


class FlowMatchingResult(NamedTuple):
    """loss: scalar; losses: (B,) per sample, whose mean it is; sigma: (B,) noise levels asked."""

    loss: Tensor
    losses: Tensor
    sigma: Tensor


def flow_matching_loss(
    velocity: VelocityFn,
    x_0: Tensor,
    schedule: NoiseSchedule,
    *,
    loss_scale: float = 1.0,
    seq_len: int | None = None,
    raw_t: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> FlowMatchingResult:
    """loss_scale / 2 |u(x_t, sigma) - (noise - x_0)|^2, the mean over samples, channels and space.

    x_0: (B, C, *S) data. raw_t (B,) and noise (B, C, *S) replace what is otherwise drawn with `generator`, in this
    order. Raises a ValueError where these or the velocity have another shape: nothing is broadcast.
    """
    device = None if generator is None else generator.device
    raw_t = sample_raw_times(x_0.shape[0], generator=generator) if raw_t is None else raw_t
    if noise is None:
        noise = torch.randn(x_0.shape, generator=generator, device=device, dtype=x_0.dtype)
    noise = check_shape("noise", noise, x_0.shape).to(x_0.device)
    sigma = schedule.sigma(check_shape("raw_t", raw_t, x_0.shape[:1]), seq_len).to(x_0.device)
    level = per_pixel(sigma, x_0)
    x_t = (1 - level) * x_0 + level * noise
    error = check_shape("velocity", velocity(x_t, sigma), x_t.shape) - (noise - x_0)
    losses = loss_scale * 0.5 * error.square().flatten(1).mean(1)
    return FlowMatchingResult(losses.mean(), losses, sigma)
