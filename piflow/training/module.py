"""The root module of a distillation engine: its forward pass is one whole pi-ID micro-step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Generator, Tensor, nn

from piflow.distillation import (
    ImitationConfig,
    SourceTimes,
    VelocityFn,
    guided_teacher,
    imitation_segment,
    sample_source_times,
    teacher_ratio_at,
)
from piflow.noise_schedule import NoiseSchedule, segments
from piflow.policies import DXPolicy, GMFlowPolicy, Policy
from piflow.training.calls import Batch, Calls, Condition, joined, select
from piflow.training.config import DistillationConfig, TeacherConfig, TrainConfig
from piflow.training.networks import SharedTeacher, blocks_of, build_calls, build_networks
from piflow.training.teachers import load_class_teacher


@dataclass(frozen=True)
class MicroStep:
    """What the last forward pass saw, without gradient: losses and noise levels (m, B) of the m states compared, and,
    of data-free training, x_dst, where the next segment starts.
    """

    losses: Tensor
    sigmas: Tensor
    x_dst: Tensor | None


class PiIDModule(nn.Module):
    """Student and frozen teacher; `forward` gives the loss of one micro-step of pi-ID (arXiv 2510.14974, section 5).

    Under ZeRO-3 the engine must see student and teacher in one forward pass: only then does the order in which
    parameters are gathered repeat from step to step, and prefetching works.
    """

    def __init__(self, student: Any, teacher: Any, config: TrainConfig, calls: Calls) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False).eval()
        self.config: DistillationConfig = config.distillation
        self.dx_mode, self.calls = config.student.dx_mode, calls
        self.schedule = noise_schedule(self.config)
        self.imitation = ImitationConfig(
            nfe=self.config.nfe,
            final_step_size_scale=self.config.final_step_size_scale,
            total_substeps=self.config.total_substeps,
            num_intermediate_states=self.config.num_intermediate_states,
            window_substeps=self.config.window_substeps,
            policy_dropout=self.config.policy_dropout,
            loss_scale=self.config.loss_scale,
        )
        self.last: MicroStep | None = None

    def forward(
        self,
        batch: Batch,
        iteration: int,
        generator: Generator,
        segment: int | None = None,
        x_src: Tensor | None = None,
    ) -> Tensor:
        """Loss () of a batch (see piflow.training.data); the CPU generator makes every draw. `last` holds the rest.

        segment: of data-free training, the index of the segment, from 0; the loss is weighted by its share of all
        segments' lengths. x_src: where it starts, `last.x_dst` of the one before; None is pure noise.

        Raises ValueError for a label that is none of the classes, or shapes that the networks do not take.
        """
        condition, null = self.calls.conditions(batch)
        count = len(next(iter(condition.values())))
        shape = batch["latents"].shape[1:] if "latents" in batch else torch.Size(self.config.latent_shape or ())
        device = next(iter(condition.values())).device
        if segment is None:
            x_0 = self.calls.state(batch["latents"].float())
            seq_len = self.calls.seq_len(x_0)
            source = sample_source_times(count, self.imitation, self.schedule, seq_len, generator)
            noise = torch.randn(x_0.shape, generator=generator).to(x_0)
            x_src, weight = torch.lerp(x_0, noise, _per_state(source.sigma, x_0)), 1.0
        else:
            if x_src is None:
                latents = torch.empty(count, *shape, device="meta")
                x_src = torch.randn(self.calls.state(latents).shape, generator=generator).to(device)
            seq_len = self.calls.seq_len(x_src)
            raw_t, weight = segments(self.config.nfe, self.config.final_step_size_scale)[segment]
            times = torch.full((count,), raw_t)
            source = SourceTimes(times, self.schedule.sigma(times, seq_len), torch.full_like(times, weight))

        size = (shape[1], shape[2])
        start, decay = self.config.teacher_ratio, self.config.teacher_ratio_decay
        result = imitation_segment(
            self.policy(x_src, source, condition, size),
            self.teacher_velocity(condition, null, size),
            source,
            self.schedule,
            self.imitation,
            teacher_ratio=teacher_ratio_at(iteration, decay, start) if decay else start,
            generator=generator,
            seq_len=seq_len,
            return_x_dst=segment is not None,
        )
        self.last = MicroStep(result.losses.detach(), result.sigmas, result.x_dst)
        return weight * result.loss

    def policy(self, x_src: Tensor, source: SourceTimes, condition: Condition, size: tuple[int, int]) -> Policy:
        """The student's policy at x_src, for latents of `size` (H, W)."""
        sigma_src = source.sigma.to(x_src)
        # With frozen layers before the blocks no input of the first one would need a gradient: then ZeRO-3 reduces that
        # block's gradients before they are there.
        x = x_src.detach().to(self.student.dtype)
        if isinstance(self.teacher, SharedTeacher):
            x = x.requires_grad_()
        output = self.student(**self.calls.inputs(x, sigma_src, condition, size))
        if hasattr(output, "grid"):
            segment_size = source.segment_size.to(x_src)
            shift = self.schedule.shift_for(self.calls.seq_len(x_src))
            return DXPolicy(
                output.grid, x_src, sigma_src, segment_size, shift, mode=self.dx_mode, layout=self.calls.layout
            )
        return GMFlowPolicy(output.means, output.logstds, output.logweights, x_src, sigma_src, layout=self.calls.layout)

    def teacher_velocity(self, condition: Condition, null: Condition, size: tuple[int, int]) -> VelocityFn:
        """The guided teacher; both branches of the guidance go through one call of twice the batch."""
        both = condition if self.config.guidance_scale == 1 else joined(condition, null)
        count = len(next(iter(condition.values())))
        positive = torch.arange(count, device=next(iter(condition.values())).device)

        @torch.no_grad()
        def velocity(x_t: Tensor, sigma: Tensor, index: Tensor) -> Tensor:
            inputs = self.calls.inputs(x_t.to(self.student.dtype), sigma, select(both, index), size)
            return self.teacher(**inputs, return_dict=False)[0].float()

        return guided_teacher(
            velocity,
            positive,
            positive + count,
            self.config.guidance_scale,
            orthogonal=self.config.guidance_orthogonal,
            interval=self.config.guidance_interval,
        )

    def train(self, mode: bool = True) -> Self:
        """The teacher stays in evaluation mode: in training mode diffusers' DiT drops labels."""
        super().train(mode)
        self.teacher.eval()
        return self

    def leaf_modules(self) -> list[nn.Module]:
        """What ZeRO-3 gathers at once: blocks.

        Of a plain DiT teacher not the first one: its embedder is called once more from outside the block, which a leaf
        would leave empty.
        """
        first = 1 if self.calls.layout == "spatial" else 0
        return [*blocks_of(self.teacher)[first:], *blocks_of(self.student)]


def noise_schedule(config: DistillationConfig) -> NoiseSchedule:
    """The schedule of a recipe."""
    dynamic = config.dynamic_shift
    if dynamic is None:
        return NoiseSchedule(shift=config.shift)
    settings = dynamic.model_dump(exclude={"kind"})
    return NoiseSchedule(config.shift, use_dynamic_shifting=True, dynamic_shifting_type=dynamic.kind, **settings)


def build_module(
    config: TrainConfig, teacher: Any = None, base: Any = None, *, fill: bool = True, meta: bool = False
) -> PiIDModule:
    """Teacher, student from teacher, both in one root module; arguments and errors as in `build_networks`."""
    student, teacher = build_networks(config, teacher, base, fill=fill, meta=meta)
    return PiIDModule(student, teacher, config, build_calls(teacher, config))


def load_teacher(config: TeacherConfig) -> Any:
    """The class-conditional teacher that a configuration names. Raises ConfigError as `load_class_teacher` does."""
    return load_class_teacher(config)


def _per_state(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.to(x).reshape(-1, *[1] * (x.dim() - 1))
