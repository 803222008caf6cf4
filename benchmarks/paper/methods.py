"""Each method as a network to train, its loss on a batch, and its sampler."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from benchmarks.paper.baselines import (
    MeanFlowDiT,
    draw_interval,
    euler_mean_velocity,
    jump,
    meanflow_loss,
    per_pixel,
    shortcut_loss,
)
from benchmarks.paper.cells import GUIDANCE_SCALE, MEANFLOW_STEP, SHORTCUT_TEACHER_STEPS, TOTAL_SUBSTEPS, Cell
from piflow.digits.data import IMAGE_SHAPE
from piflow.digits.teacher import load_teacher, network_velocity, teacher_velocity
from piflow.distillation import ImitationConfig, sample_source_times
from piflow.noise_schedule import NoiseSchedule
from piflow.sampler import PolicyFn, dx_policy_fn, gm_policy_fn, sample
from piflow.training.config import TrainConfig
from piflow.training.module import PiIDModule, build_module


class Student(ABC):
    """A network to train, with everything that its method needs around it."""

    network: nn.Module

    @abstractmethod
    def loss(self, images: Tensor, labels: Tensor, iteration: int, generator: Generator) -> Tensor:
        """Loss () of images (B, 1, 8, 8) and labels (B,); the generator makes every draw."""

    @abstractmethod
    def sample(self, noise: Tensor, labels: Tensor, nfe: int, **options: Any) -> Tensor:
        """x_0 (B, 1, 8, 8) from noise in `nfe` network evaluations; options are those of piflow.sampler.sample."""


class PolicyStudent(Student):
    """GM or DX by pi-ID: the module that the trainer runs under ZeRO-3, in a plain loop."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.module: PiIDModule = build_module(train_config(cell))
        self.network = self.module.student

    def loss(self, images: Tensor, labels: Tensor, iteration: int, generator: Generator) -> Tensor:
        if not self.cell.data_free:
            return self.module({"latents": images, "class_labels": labels}, iteration, generator)
        count = max(len(labels) // self.cell.nfe, 1)
        batch, x_src, losses = {"class_labels": labels[:count]}, None, []
        for segment in range(self.cell.nfe):
            losses.append(self.module(batch, iteration, generator, segment, x_src))
            assert self.module.last is not None
            x_src = self.module.last.x_dst
        return torch.stack(losses).sum()

    def policy_fn(self, labels: Tensor) -> PolicyFn:
        """The student's policies for labels (B,), as `piflow.sampler.sample` calls them."""

        def network(x_src: Tensor, sigma_src: Tensor) -> Any:
            return self.network(x_src, 1000 * sigma_src, labels)

        if self.cell.method == "gm":
            return gm_policy_fn(network)
        return dx_policy_fn(lambda x_src, sigma_src: network(x_src, sigma_src).grid)

    def sample(self, noise: Tensor, labels: Tensor, nfe: int, **options: Any) -> Tensor:
        return sample(self.policy_fn(labels), noise, nfe, **{"total_substeps": TOTAL_SUBSTEPS, **options})


class ShortcutStudent(Student):
    """The teacher's own network, whose output at a source is the whole segment's velocity."""

    def __init__(self, cell: Cell) -> None:
        self.cell, self.teacher = cell, load_teacher()
        self.network = copy.deepcopy(self.teacher).requires_grad_(True)

    def loss(self, images: Tensor, labels: Tensor, iteration: int, generator: Generator) -> Tensor:
        source = sample_source_times(len(labels), ImitationConfig(self.cell.nfe), NoiseSchedule(), generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        x_src = torch.lerp(images, noise, per_pixel(source.sigma, images))
        teacher = teacher_velocity(self.teacher, labels, GUIDANCE_SCALE)
        sigma_dst = (source.raw_t - source.segment_size).clamp(min=0)
        with torch.no_grad():
            target = euler_mean_velocity(teacher, x_src, source.sigma, sigma_dst, SHORTCUT_TEACHER_STEPS)
        return shortcut_loss(network_velocity(self.network, labels)(x_src, source.sigma), target)

    def sample(self, noise: Tensor, labels: Tensor, nfe: int, **options: Any) -> Tensor:
        velocity = network_velocity(self.network, labels)
        with torch.no_grad():
            return jump(lambda x_t, sigma_t, sigma_r: velocity(x_t, sigma_t), noise, nfe)


class MeanFlowStudent(Student):
    """MeanFlow on the guided teacher's velocity; the same student at every number of steps."""

    def __init__(self, cell: Cell) -> None:
        self.share, self.teacher = cell.share, load_teacher()
        self.network = MeanFlowDiT(self.teacher)

    def loss(self, images: Tensor, labels: Tensor, iteration: int, generator: Generator) -> Tensor:
        sigma_t, sigma_r = draw_interval(len(labels), self.share, generator)
        noise = torch.randn(images.shape, generator=generator)
        x_t = torch.lerp(images, noise, per_pixel(sigma_t, images))
        velocity = teacher_velocity(self.teacher, labels, GUIDANCE_SCALE)(x_t, sigma_t)
        return meanflow_loss(
            lambda x, t, r: self.network(x, t, r, labels), velocity, x_t, sigma_t, sigma_r, step=MEANFLOW_STEP
        )

    def sample(self, noise: Tensor, labels: Tensor, nfe: int, **options: Any) -> Tensor:
        with torch.no_grad():
            return jump(lambda x, t, r: self.network(x, t, r, labels), noise, nfe)


def build_student(cell: Cell) -> Student:
    """A student at its start, the teacher's weights in its trunk; seeded by the cell."""
    kinds: dict[str, type[Student]] = {"shortcut": ShortcutStudent, "meanflow": MeanFlowStudent}
    torch.manual_seed(cell.seed)
    student: Student = kinds.get(cell.method, PolicyStudent)(cell)  # type: ignore[call-arg]
    student.network.eval()  # in training mode diffusers' DiT drops labels
    return student


def train_config(cell: Cell) -> TrainConfig:
    """The recipe of a pi-ID cell, as the trainer's YAML would hold it."""
    head: dict[str, Any] = {"policy": cell.method}
    head["num_gaussians" if cell.method == "gm" else "n_grid"] = cell.size
    decay = 2 * cell.budget.iterations // 3 if cell.mixing else 0
    return TrainConfig.model_validate(
        {
            "output_dir": Path("unused"),
            "iterations": cell.budget.iterations,
            "seed": cell.seed,
            "student": head,
            "distillation": {
                "nfe": cell.nfe,
                "data_free": cell.data_free,
                "latent_shape": IMAGE_SHAPE if cell.data_free else None,
                "total_substeps": TOTAL_SUBSTEPS,
                "num_intermediate_states": 2,
                "window_substeps": cell.window,
                "policy_dropout": cell.dropout,
                "teacher_ratio": 1.0 if cell.mixing else 0.0,
                "teacher_ratio_decay": decay,
                "guidance_scale": GUIDANCE_SCALE,
            },
        }
    )
