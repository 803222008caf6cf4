"""The root module of a distillation engine: its forward pass is one whole pi-ID micro-step."""

from __future__ import annotations

from typing import Self

import torch
from diffusers import DiTTransformer2DModel
from torch import Generator, Tensor, nn

from piflow.distillation import (
    ImitationConfig,
    VelocityFn,
    guided_teacher,
    imitation_segment,
    sample_source_times,
    teacher_ratio_at,
)
from piflow.models.dit import GMDiTTransformer2DModelV2, check_class_labels, check_is_dit, load_dit_teacher
from piflow.noise_schedule import NoiseSchedule
from piflow.policies import GMFlowPolicy
from piflow.training.config import DistillationConfig, TeacherConfig, TrainConfig
from piflow.training.data import data_format
from piflow.training.errors import ConfigError


class PiIDModule(nn.Module):
    """Student and frozen teacher; `forward` gives the loss of one micro-step of data-based pi-ID (DESIGN 2.5).

    Under ZeRO-3 the engine must see student and teacher in one forward pass: only then does the order in which
    parameters are gathered repeat from step to step, and prefetching works.
    """

    def __init__(
        self, student: GMDiTTransformer2DModelV2, teacher: DiTTransformer2DModel, config: DistillationConfig
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False).eval()
        self.config = config
        self.schedule = NoiseSchedule(shift=config.shift)
        self.num_classes: int = teacher.config.num_embeds_ada_norm
        self.imitation = ImitationConfig(
            nfe=config.nfe,
            final_step_size_scale=config.final_step_size_scale,
            total_substeps=config.total_substeps,
            num_intermediate_states=config.num_intermediate_states,
            window_substeps=config.window_substeps,
            policy_dropout=config.policy_dropout,
            loss_scale=config.loss_scale,
        )

    def forward(self, x_0: Tensor, class_labels: Tensor, iteration: int, generator: Generator) -> Tensor:
        """Loss () of images x_0 (B, C, H, W) with `class_labels` (B,); the CPU generator makes every draw.

        Raises ValueError for a label that is none of the classes, or shapes that the student does not take.
        """
        check_class_labels(class_labels, self.num_classes, null_class=False)
        start, decay = self.config.teacher_ratio, self.config.teacher_ratio_decay
        source = sample_source_times(len(x_0), self.imitation, self.schedule, generator=generator)
        sigma_src = source.sigma.to(x_0)
        noise = torch.randn(x_0.shape, generator=generator).to(x_0)
        x_src = torch.lerp(x_0, noise, sigma_src.reshape(-1, *[1] * (x_0.ndim - 1)))

        output = self.student(x_src.to(self.student.dtype), 1000 * sigma_src, class_labels)
        policy = GMFlowPolicy(output.means, output.logstds, output.logweights, x_src, sigma_src)
        result = imitation_segment(
            policy,
            self.teacher_velocity(class_labels),
            source,
            self.schedule,
            self.imitation,
            teacher_ratio=teacher_ratio_at(iteration, decay, start) if decay else start,
            generator=generator,
        )
        return result.loss

    def teacher_velocity(self, class_labels: Tensor) -> VelocityFn:
        """The guided teacher for these labels; both branches of the guidance go through one call of twice the batch."""

        @torch.no_grad()
        def velocity(x_t: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
            return self.teacher(x_t.to(self.teacher.dtype), timestep=1000 * sigma, class_labels=labels).sample.float()

        return guided_teacher(
            velocity, class_labels, torch.full_like(class_labels, self.num_classes), self.config.guidance_scale
        )

    def train(self, mode: bool = True) -> Self:
        """The teacher stays in evaluation mode: in training mode diffusers' DiT drops labels."""
        super().train(mode)
        self.teacher.eval()
        return self

    def leaf_modules(self) -> list[nn.Module]:
        """What ZeRO-3 gathers at once: the student's blocks, and a plain DiT teacher as a whole.

        Such a teacher calls the embedder of its block 0 from outside the block, which a leaf block would leave empty.
        The student cannot be one leaf: DeepSpeed reduces a leaf's gradients once its input has one, and this has none.
        """
        return [self.teacher, *self.student.transformer_blocks]


def build_module(config: TrainConfig) -> PiIDModule:
    """Teacher, student from teacher, both in one root module; the same weights on every rank.

    Raises ConfigError where the teacher cannot be loaded or does not fit the data.
    """
    teacher = load_teacher(config.teacher)
    _check_teacher_fits(teacher, config)
    settings = config.student
    student = GMDiTTransformer2DModelV2.from_teacher(
        teacher,
        settings.num_gaussians,
        logstd=settings.logstd,
        spread=settings.spread,
        generator=Generator().manual_seed(config.seed),
    )
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    return PiIDModule(student, teacher, config.distillation)


def load_teacher(config: TeacherConfig) -> DiTTransformer2DModel:
    """The teacher that a configuration names. Raises ConfigError where its files are missing or damaged."""
    from piflow.digits.teacher import load_teacher as load_digits_teacher

    if config.kind == "dit" and config.path is None:
        raise ConfigError("teacher.kind=dit needs teacher.path, the folder with config.json and the weights.")
    try:
        if config.path is not None:
            check_is_dit(config.path)
        return load_digits_teacher(config.path) if config.kind == "digits" else load_dit_teacher(config.path or "")
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(
            f"The teacher cannot be loaded: {error} Set teacher.path to a folder that holds it."
        ) from error


def _check_teacher_fits(teacher: DiTTransformer2DModel, config: TrainConfig) -> None:
    classes, (channels, size, _) = data_format(config.data)
    facts = {
        "classes (num_embeds_ada_norm)": (teacher.config.num_embeds_ada_norm, classes),
        "input channels (in_channels)": (teacher.config.in_channels, channels),
        "output channels (out_channels)": (teacher.out_channels, channels),
        "pixels a side (sample_size)": (teacher.config.sample_size, size),
    }
    if wrong := [f"{has} {what}, the data {needs}" for what, (has, needs) in facts.items() if has != needs]:
        raise ConfigError(
            f"The teacher does not fit data.kind={config.data.kind}: it has {'; '.join(wrong)}. "
            "Set teacher.path to a teacher of this data."
        )
