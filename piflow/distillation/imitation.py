"""Policy imitation, pi-ID (pi-Flow, arXiv 2510.14974, section 5 and algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from piflow.noise_schedule import NoiseSchedule, check_number, check_whole, segment_sizes, segments
from piflow.policies import Policy
from piflow.policies.base import check_dropout

from .guidance import VelocityFn, check_shape, per_pixel
from .times import SourceTimes
from .trajectory import MixedTrajectory, mix_trajectory

LOCAL_SUBSTEPS = 2
"""Over fewer substeps than this the mean velocity is the local one: nothing would be averaged but rounding error."""


@dataclass(frozen=True)
class ImitationConfig:
    """What pi-ID imitates.

    nfe, final_step_size_scale: segments of the student (`piflow.noise_schedule.segments`).
    total_substeps: policy substeps over the whole of raw time [0, 1].
    num_intermediate_states: teacher evaluations per segment, m.
    window_substeps: substeps over which the policy's velocity is averaged, beyond the teacher's step, to be compared.
    policy_dropout: probability with which a component of the policy that is rolled out is dropped.
    loss_scale: factor of the loss.
    """

    nfe: int
    final_step_size_scale: float = 1.0
    total_substeps: int = 128
    num_intermediate_states: int = 2
    window_substeps: int = 0
    policy_dropout: float = 0.0
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        segment_sizes(self.nfe, self.final_step_size_scale)
        check_dropout(self.policy_dropout, "policy_dropout")
        check_number("loss_scale", self.loss_scale, positive=True)
        for name, least in (("total_substeps", 1), ("num_intermediate_states", 1), ("window_substeps", 0)):
            check_whole(name, getattr(self, name), least)


@dataclass(frozen=True, eq=False)
class SegmentDraws:
    """The random numbers of one segment, all uniform in [0, 1): student (B, m), teacher (B, m - 1), dropout (B, K).

    dropout None: drawn by the policy, or not needed.
    """

    student: Tensor
    teacher: Tensor
    dropout: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ImitationResult:
    """One segment's loss and what it was made of.

    loss: scalar, the mean of `losses` (m, B); sigmas (m, B): noise levels of the states compared; states, targets:
    m tensors (B, C, *S), where the teacher was asked and what it answered; x_dst (B, C, *S): the end of the student's
    own rollout (None unless asked for); trajectory: the raw times.
    """

    loss: Tensor
    losses: Tensor
    sigmas: Tensor
    states: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    x_dst: Tensor | None
    trajectory: MixedTrajectory


def teacher_ratio_at(step: int, decay_iters: int, start: float = 1.0, end: float = 0.0) -> float:
    """Share of the teacher in the mixed trajectory: linear from `start` at step 0 to `end` at step `decay_iters`."""
    if not (0 <= start <= 1 and 0 <= end <= 1):
        raise ValueError(f"start, end: expected teacher ratios within [0, 1], got {start} and {end}")
    progress = 1.0 if decay_iters <= 0 else min(max(step / decay_iters, 0.0), 1.0)
    return start + (end - start) * progress


def imitation_segment(
    policy: Policy,
    teacher: VelocityFn,
    source: SourceTimes,
    schedule: NoiseSchedule,
    config: ImitationConfig,
    *,
    teacher_ratio: float = 0.0,
    draws: SegmentDraws | None = None,
    generator: torch.Generator | None = None,
    seq_len: int | None = None,
    return_x_dst: bool = False,
) -> ImitationResult:
    """Imitation loss of a policy over its segment; the gradient flows to the policy's network output only.

    At each of the m states: follow the detached, dropped-out policy to x_a, ask the teacher for its velocity there,
    compare it with the policy's mean velocity from x_a on, and take the teacher's step to x_b.

    source: as sampled by `sample_source_times`, (B,) each, on the CPU (times decide shapes; states may be anywhere).
    teacher: (x_t, sigma (B,)) -> velocity; called m times, without gradient. draws: recorded random numbers; otherwise
    they come from `generator`, in the order dropout, student, teacher.

    Raises a ValueError where draws or the teacher's velocity have another shape: nothing is broadcast.
    """
    rolled_out = policy.detach().with_dropout(
        config.policy_dropout, generator=generator, draw=None if draws is None else draws.dropout
    )
    draws = _draw(source, config, generator) if draws is None else draws
    check_shape("draws.student", draws.student, (len(source.raw_t), config.num_intermediate_states))
    check_shape("draws.teacher", draws.teacher, (len(source.raw_t), config.num_intermediate_states - 1))
    path = mix_trajectory(
        source.raw_t,
        source.segment_size,
        draws.student,
        draws.teacher,
        teacher_ratio=teacher_ratio,
        window_substeps=config.window_substeps,
        total_substeps=config.total_substeps,
    )
    local = ((path.raw_t_a - path.raw_t_end) * config.total_substeps).round() < LOCAL_SUBSTEPS

    x_t, raw_t = policy.x_src.detach(), source.raw_t
    device = x_t.device
    losses, sigmas, states, targets = [], [], [], []
    for raw_t_a, raw_t_b, raw_t_end, is_local in zip(path.raw_t_a, path.raw_t_b, path.raw_t_end, local):
        levels = schedule.substep_sigmas(raw_t, raw_t_a, config.total_substeps, seq_len)
        sigma_a = levels[:, -1]
        with torch.no_grad():
            x_a = rolled_out.rollout(x_t, levels.to(device))
            target = check_shape("teacher", teacher(x_a, sigma_a.to(device)), x_a.shape).to(x_a.dtype)
            x_t = x_a + per_pixel(schedule.sigma(raw_t_b, seq_len) - sigma_a, x_a) * target
        raw_t = raw_t_b
        # The rollout ends a few roundings from sigma(raw_t_a). A state has one level, or short windows feel the gap.
        window = schedule.substep_sigmas(raw_t_a, raw_t_end, config.total_substeps, seq_len)
        window = torch.cat([sigma_a[:, None], window[:, 1:].minimum(sigma_a[:, None])], dim=1)
        losses.append(policy.mean_velocity_loss(x_a, window.to(device), target, local=is_local.to(device)))
        sigmas.append(sigma_a)
        states.append(x_a)
        targets.append(target)

    x_dst = None
    if return_x_dst:
        with torch.no_grad():
            x_dst = rolled_out.integrate(x_t, raw_t, path.raw_t_dst, schedule, config.total_substeps, seq_len)
    per_state = config.loss_scale * 0.5 * torch.stack(losses)
    return ImitationResult(per_state.mean(), per_state, torch.stack(sigmas), tuple(states), tuple(targets), x_dst, path)


def imitation_trajectory(
    policy_fn: Callable[[Tensor, SourceTimes], Policy],
    teacher: VelocityFn,
    noise: Tensor,
    schedule: NoiseSchedule,
    config: ImitationConfig,
    *,
    teacher_ratio: float = 0.0,
    generator: torch.Generator | None = None,
    seq_len: int | None = None,
) -> Iterator[tuple[float, ImitationResult]]:
    """Data-free pi-ID: all segments in turn from pure `noise` (B, C, *S), each starting where the last rollout ended.

    Yields (weight, result), weight being the segment's length (they sum to 1), so that the caller can run the backward
    pass of `weight * result.loss` before the next segment is built. `policy_fn` calls the student network.
    """
    x_src = noise
    for raw_t, segment_size in segments(config.nfe, config.final_step_size_scale):
        times = torch.full((noise.shape[0],), raw_t)
        source = SourceTimes(times, schedule.sigma(times, seq_len), torch.full_like(times, segment_size))
        result = imitation_segment(
            policy_fn(x_src, source),
            teacher,
            source,
            schedule,
            config,
            teacher_ratio=teacher_ratio,
            generator=generator,
            seq_len=seq_len,
            return_x_dst=True,
        )
        yield segment_size, result
        assert result.x_dst is not None
        x_src = result.x_dst


def _draw(source: SourceTimes, config: ImitationConfig, generator: torch.Generator | None) -> SegmentDraws:
    batch, states = source.raw_t.shape[0], config.num_intermediate_states
    device = None if generator is None else generator.device
    student = torch.rand(batch, states, generator=generator, device=device).to(source.raw_t.device)
    teacher = torch.rand(batch, states - 1, generator=generator, device=device).to(source.raw_t.device)
    return SegmentDraws(student, teacher)
