"""One plain training loop for every method: the same batches, optimiser and average, on one thread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from benchmarks.paper.cells import EMA_GAMMA, GRADIENT_CLIPPING, Cell
from benchmarks.paper.methods import Student, build_student
from piflow.digits.data import load_digits_images
from piflow.training.data import derive_seed
from piflow.training.ema import karras_momentum, update_average

LOSSES_KEPT = 40
"""Points of the loss curve that are stored, each a mean over its share of the iterations."""


class Account(NamedTuple):
    """What a training leaves: the averaged student, the loss of every iteration, and the seconds of its iterations."""

    student: Student
    losses: list[float]
    seconds: float


def train(cell: Cell, checkpoints: int = 8, on_checkpoint: Callable[[int, Student], Any] | None = None) -> Account:
    """Train by the cell's budget; the student that comes back holds the average of the weights.

    `on_checkpoint(iterations done, averaged student)` is called `checkpoints` times, evenly spaced, the end included;
    its time is not counted. Repeatable for a cell, a machine and a thread count.

    Raises FloatingPointError where the loss is not finite.
    """
    images, labels = load_digits_images()
    budget = cell.budget
    student = build_student(cell)
    parameters: list[Tensor] = [p for p in student.network.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=budget.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    stops = {math.ceil(budget.iterations * (i + 1) / checkpoints) for i in range(checkpoints)}

    losses: list[float] = []
    seconds = 0.0
    for iteration in range(budget.iterations):
        start = time.perf_counter()
        generator = Generator().manual_seed(derive_seed(cell.seed, iteration))
        index = torch.randint(len(images), (budget.batch_size,), generator=generator)
        loss = student.loss(images[index], labels[index], iteration, generator)
        if not loss.isfinite():
            raise FloatingPointError(f"{cell.name}: the loss is {loss.item()} at iteration {iteration}.")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIPPING)
        for group in optimizer.param_groups:
            group["lr"] = budget.learning_rate * min((iteration + 1) / max(budget.warmup_iterations, 1), 1.0)
        optimizer.step()
        update_average(average, parameters, karras_momentum(iteration, EMA_GAMMA))
        losses.append(loss.item())
        seconds += time.perf_counter() - start
        if on_checkpoint is not None and iteration + 1 in stops:
            with _averaged(parameters, average):
                on_checkpoint(iteration + 1, student)
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    return Account(student, losses, seconds)


def curve(losses: list[float], points: int = LOSSES_KEPT) -> list[tuple[int, float]]:
    """(iteration, mean loss of the stretch that ends there) at no more than `points` places."""
    length = math.ceil(len(losses) / points)
    stretches = [losses[start : start + length] for start in range(0, len(losses), length)]
    ends = [min(length * (i + 1), len(losses)) for i in range(len(stretches))]
    return [(end, sum(values) / len(values)) for end, values in zip(ends, stretches)]


@contextmanager
def _averaged(parameters: list[Tensor], average: list[Tensor]) -> Iterator[None]:
    """The average in place of the weights until the end."""
    own = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
        yield
        torch._foreach_copy_(parameters, own)
