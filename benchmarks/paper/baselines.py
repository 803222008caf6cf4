"""What pi-ID is compared with, written plainly: a direct shortcut student and MeanFlow (arXiv 2505.13447).

Both learn the velocity field of the same guided teacher with the same network, so that only the method differs. States
are (B, C, *S), noise levels (B,); x_t = (1 - sigma) x_0 + sigma noise and u = dx/dsigma.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from piflow.distillation import VelocityFn
from piflow.noise_schedule import segments

MeanVelocityFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t (B, C, *S), sigma_t (B,), sigma_r (B,)) -> mean velocity between the two levels, (B, C, *S)."""


def per_pixel(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.reshape(-1, *[1] * (x.dim() - 1))


def jump(mean_velocity: MeanVelocityFn, noise: Tensor, nfe: int) -> Tensor:
    """x_0 from `noise` in `nfe` jumps of equal length: x <- x + (sigma_r - sigma_t) mean_velocity(x, sigma_t, sigma_r).

    The sampler of both baselines.
    """
    x = noise
    for raw_t, size in segments(nfe):
        source, end = (torch.full((len(x),), sigma) for sigma in (raw_t, max(raw_t - size, 0.0)))
        x = x + per_pixel(end - source, x) * mean_velocity(x, source, end)
    return x


def euler_mean_velocity(
    velocity: VelocityFn, x_src: Tensor, sigma_src: Tensor, sigma_dst: Tensor, num_steps: int
) -> Tensor:
    """Mean velocity of `num_steps` Euler steps from (x_src, sigma_src) to sigma_dst."""
    share = torch.linspace(0, 1, num_steps + 1)
    x = x_src
    for near, far in pairwise(share.tolist()):
        sigma, sigma_next = (torch.lerp(sigma_src, sigma_dst, s) for s in (near, far))
        x = x + per_pixel(sigma_next - sigma, x) * velocity(x, sigma)
    return (x - x_src) / per_pixel(sigma_dst - sigma_src, x)


def shortcut_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """A direct student: one predicted velocity carries x_src to the segment's end, where the teacher's rollout ended.

    predicted (B, C, *S): the network at the source, a prediction of x_0 seen as a velocity; target: the mean velocity
    of the teacher's own rollout. That is a policy of one component and one substep, without anything to imitate within
    the segment.
    """
    return 0.5 * (predicted - target).square().mean()


def draw_interval(batch: int, share: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """(sigma_t, sigma_r): the larger and the smaller of two uniform levels; equal except for a `share` of samples."""
    levels = torch.rand(batch, 2, generator=generator)
    equal = torch.rand(batch, generator=generator) >= share
    sigma_t = levels.amax(dim=1)
    return sigma_t, torch.where(equal, sigma_t, levels.amin(dim=1))


def meanflow_loss(
    mean_velocity: MeanVelocityFn,
    velocity: Tensor,
    x_t: Tensor,
    sigma_t: Tensor,
    sigma_r: Tensor,
    *,
    step: float | None = None,
    power: float = 1.0,
    floor: float = 1e-3,
) -> Tensor:
    """The MeanFlow identity as a regression.

    Differentiating (sigma_t - sigma_r) U(x_t, sigma_t, sigma_r) = integral of u over [sigma_r, sigma_t] along the flow
    by sigma_t gives U = u - (sigma_t - sigma_r) dU/dsigma_t with dU/dsigma_t the derivative of the network along the
    tangent (u, 1, 0): one forward-mode product, or with a `step` a central difference over so much of noise level
    either way. A network told its noise level in fast sinusoids, as the digits teacher is, has ripples that a
    derivative at a point sees, and that can be most of it. The right-hand side is the target, without gradient.

    velocity (B, C, *S): u at (x_t, sigma_t). Each squared error is divided by its own (error + floor)^power, as the
    paper does with power 1. Returns the mean over samples.
    """
    if step is None:
        tangents = (velocity, torch.ones_like(sigma_t), torch.zeros_like(sigma_r))
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no forward-mode derivative
            predicted, derivative = torch.func.jvp(mean_velocity, (x_t, sigma_t, sigma_r), tangents)[:2]
    else:
        with torch.no_grad():
            after, before = (mean_velocity(x_t + h * velocity, sigma_t + h, sigma_r) for h in (step, -step))
        predicted, derivative = mean_velocity(x_t, sigma_t, sigma_r), (after - before) / (2 * step)
    target = (velocity - per_pixel(sigma_t - sigma_r, x_t) * derivative).detach()
    errors = (predicted - target).square().flatten(1).mean(1)
    return (errors / (errors.detach() + floor) ** power).mean()


class MeanFlowDiT(nn.Module):
    """The teacher's network, its weights included, told a second time: U(x_t, sigma_t, sigma_r).

    The length sigma_t - sigma_r enters as the noise level does: sinusoids, two linear layers, added to the conditioning
    of every block. The last layer starts at zero, so that the student starts as the teacher at every length.
    """

    def __init__(self, teacher: DiTTransformer2DModel) -> None:
        super().__init__()
        self.trunk: Any = copy.deepcopy(teacher).requires_grad_(True)
        width = teacher.inner_dim
        self.frequencies = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=1)
        last = nn.Linear(width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.length = nn.Sequential(nn.Linear(256, width), nn.SiLU(), last)
        for block in self.trunk.transformer_blocks:
            block.norm1.emb = _PlusLength(block.norm1.emb)

    def forward(self, x_t: Tensor, sigma_t: Tensor, sigma_r: Tensor, class_labels: Tensor) -> Tensor:
        length = self.length(self.frequencies(1000 * (sigma_t - sigma_r)).to(x_t))
        timestep = torch.cat([1000 * sigma_t[:, None], length], dim=1)
        return self.trunk(x_t, timestep=timestep, class_labels=class_labels).sample


class _PlusLength(nn.Module):
    """A block's embedder whose `timestep` (B, 1 + D) carries what is added to the conditioning vector behind it."""

    def __init__(self, embedder: nn.Module) -> None:
        super().__init__()
        self.embedder = embedder

    def forward(self, timestep: Tensor, class_labels: Tensor, hidden_dtype: torch.dtype | None = None) -> Tensor:
        return self.embedder(timestep[:, 0], class_labels, hidden_dtype=hidden_dtype) + timestep[:, 1:]
