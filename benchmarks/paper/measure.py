"""What is measured of every student, and of the teacher with few Euler steps."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.paper.cells import GUIDANCE_SCALE, TOTAL_SUBSTEPS, Cell
from benchmarks.paper.methods import PolicyStudent, Student
from benchmarks.paper.metrics import Reference
from piflow.digits.classifier import extract, load_classifier
from piflow.digits.data import IMAGE_SHAPE, NUM_CLASSES, load_digits_images
from piflow.digits.teacher import euler_sample, load_teacher, teacher_velocity
from piflow.noise_schedule import NoiseSchedule, segments
from piflow.sampler import SampleStep

SHOWN = 2 * NUM_CLASSES
"""Samples that are stored for the picture: the first two of every class."""


@dataclass(frozen=True)
class Protocol:
    """How samples are drawn: labels in turn, noises from one seed, the teacher's reference by Euler steps.

    during_training: samples that are measured at each checkpoint. trajectories: noises whose paths are stored.
    """

    num_samples: int = 1000
    reference_steps: int = 64
    during_training: int = 500
    teacher_steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    substeps: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256, 512)
    temperatures: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    elastic_nfes: tuple[int, ...] = (4, 6, 8, 12, 16)
    trajectories: int = 3
    seed: int = 0
    batch_size: int = 500

    @property
    def id(self) -> str:
        """Hash of the settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def noise_and_labels(self, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """(N, 1, 8, 8) and (N,)."""
        generator = torch.Generator().manual_seed(self.seed if seed is None else seed)
        noise = torch.randn(self.num_samples, *IMAGE_SHAPE, generator=generator)
        return noise, torch.arange(self.num_samples) % NUM_CLASSES


def read_protocol(settings: dict[str, Any]) -> Protocol:
    """The protocol that `asdict` and JSON described."""
    known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return Protocol(**known)


Sampler = Callable[[Tensor, Tensor], Tensor]


def in_batches(sample: Sampler, noise: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    """x_0 of all noises; a ValueError where some are not finite."""
    batches = [sample(x, y) for x, y in zip(noise.split(batch_size), labels.split(batch_size))]
    x_0 = torch.cat(batches)
    if not x_0.isfinite().all():
        raise ValueError(f"{int((~x_0.isfinite()).flatten(1).any(1).sum())} of {len(x_0)} samples are not finite.")
    return x_0


def teacher_sampler(num_steps: int) -> Sampler:
    """The guided teacher in Euler steps."""
    teacher = load_teacher()

    @torch.no_grad()
    def sample(noise: Tensor, labels: Tensor) -> Tensor:
        return euler_sample(teacher_velocity(teacher, labels, GUIDANCE_SCALE), noise, num_steps, NoiseSchedule())

    return sample


def reference_samples(protocol: Protocol) -> dict[str, Tensor]:
    """x_0: the teacher's endpoints; other: those of other noises, which say how far equal distributions measure."""
    sampler = teacher_sampler(protocol.reference_steps)
    draws = {"x_0": protocol.noise_and_labels(), "other": protocol.noise_and_labels(protocol.seed + 1)}
    return {name: in_batches(sampler, *draw, protocol.batch_size) for name, draw in draws.items()}


def load_reference(file: Path, protocol: Protocol) -> Reference:
    """The reference that `reference_samples` left in a safetensors file."""
    classifier = load_classifier()
    data_features = extract(classifier, load_digits_images()[0])[0]
    return Reference(load_file(file)["x_0"], protocol.noise_and_labels()[1], data_features, classifier)


def measure_teacher(file: Path, protocol: Protocol) -> dict[str, Any]:
    """The teacher's rows: its reference, other noises, and few Euler steps."""
    reference, (noise, labels) = load_reference(file, protocol), protocol.noise_and_labels()
    rows = {str(protocol.reference_steps): reference.measure(reference.x_0)}
    samples = {str(protocol.reference_steps): packed(reference.x_0)}
    for steps in protocol.teacher_steps:
        x_0 = in_batches(teacher_sampler(steps), noise, labels, protocol.batch_size)
        rows[str(steps)], samples[str(steps)] = reference.measure(x_0), packed(x_0)
    return {"measures": rows, "other_noises": reference.measure(load_file(file)["other"]), "samples": samples}


def measure_student(cell: Cell, student: Student, reference: Reference, protocol: Protocol) -> dict[str, Any]:
    """Metrics at the cell's numbers of steps, pictures, and what is varied at sampling."""
    noise, labels = protocol.noise_and_labels()

    def measured(nfe: int, **options: Any) -> tuple[dict[str, float], Tensor]:
        x_0 = in_batches(lambda x, y: student.sample(x, y, nfe, **options), noise, labels, protocol.batch_size)
        return reference.measure(x_0), x_0

    found: dict[str, Any] = {"measures": {}, "samples": {}}
    for nfe in cell.sampled_nfes:
        found["measures"][str(nfe)], x_0 = measured(nfe)
        if not cell.seed:
            found["samples"][str(nfe)] = packed(x_0)
    if cell.studied:
        found["studies"] = {name: list(rows) for name, rows in _studies(cell, protocol, measured)}
    if isinstance(student, PolicyStudent) and not cell.seed:
        found["trajectories"] = trajectories(student, noise, labels, cell.nfe, protocol.trajectories)
    return found


def _studies(
    cell: Cell, protocol: Protocol, measured: Callable[..., tuple[dict[str, float], Tensor]]
) -> Iterator[tuple[str, Iterator[dict[str, float]]]]:
    substeps = [n for n in protocol.substeps if n >= cell.nfe]
    yield "substeps", ({"substeps": n} | measured(cell.nfe, total_substeps=n)[0] for n in substeps)
    if cell.nfe > 1 and cell.method == "gm":  # the last step has no temperature, DX no components
        yield "temperature", ({"temperature": t} | measured(cell.nfe, temperature=t)[0] for t in protocol.temperatures)
    if cell.nfe == 4:
        yield "elastic", ({"nfe": n} | measured(n)[0] for n in protocol.elastic_nfes)


@torch.no_grad()
def trajectories(student: PolicyStudent, noise: Tensor, labels: Tensor, nfe: int, count: int) -> list[dict[str, Any]]:
    """The paths of student and teacher from the first noises, seen in the plane in which the teacher's path bends.

    Coordinates: along the chord from the noise to the teacher's endpoint (0 to 1), and across it in the direction of
    the teacher's largest excursion, in the same unit.
    """
    x, y = noise[:count], labels[:count]
    teacher = teacher_velocity(load_teacher(), y, GUIDANCE_SCALE)
    path = [x]
    for sigma, sigma_next in pairwise(torch.linspace(1, 0, TOTAL_SUBSTEPS + 1)):
        path.append(path[-1] + (sigma_next - sigma) * teacher(path[-1], sigma.expand(count)))
    paths = {"teacher": torch.stack(path, 1).flatten(2), "student": student_path(student, x, y, nfe).flatten(2)}
    found = []
    for i in range(count):
        start, chord = paths["teacher"][i, 0], paths["teacher"][i, -1] - paths["teacher"][i, 0]
        unit = chord / chord.norm()
        aside = paths["teacher"][i] - start
        aside = aside - (aside @ unit)[:, None] * unit
        across = aside[aside.norm(dim=1).argmax()]
        across = across / across.norm().clamp(min=1e-12)
        axes = torch.stack([unit, across]) / chord.norm()
        found.append(
            {name: [[round(v, 4) for v in point] for point in ((p[i, ::4] - start) @ axes.T).tolist()]
             for name, p in paths.items()}
        )  # fmt: skip
    return found


def student_path(student: PolicyStudent, noise: Tensor, labels: Tensor, nfe: int) -> Tensor:
    """All states (B, 1 + substeps, 1, 8, 8) that the student's policies pass."""
    policy_fn, schedule = student.policy_fn(labels), NoiseSchedule()
    states, x = [noise], noise
    for index, (raw_t, size) in enumerate(segments(nfe)):
        step = SampleStep(index, nfe, raw_t, max(raw_t - size, 0.0), schedule.shift)
        sigma = torch.full((len(x),), raw_t)
        policy = policy_fn(x, sigma, step)
        levels = schedule.substep_sigmas(sigma, torch.full_like(sigma, step.raw_t_dst), TOTAL_SUBSTEPS)
        states += [policy.rollout(x, levels[:, : n + 1]) for n in range(1, levels.shape[1])]
        x = states[-1]
    return torch.stack(states, 1)


def packed(x_0: Tensor) -> str:
    """The first samples as text: 8 bits a pixel, base 64."""
    pixels = ((x_0[:SHOWN].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return base64.b64encode(pixels.contiguous().numpy().tobytes()).decode()


def unpacked(text: str) -> Tensor:
    """(SHOWN, 8, 8) in [-1, 1]."""
    pixels = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
    return pixels.reshape(-1, *IMAGE_SHAPE[1:]).float() / 127.5 - 1
