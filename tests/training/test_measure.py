"""Loss by noise level, times and memory of a step."""

from __future__ import annotations

import mmap
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from piflow.training.measure import COLLECTIVES, Meter, NoiseLevelLoss, StepTimer, Stopwatch, memory

CPU = torch.device("cpu")


def test_losses_go_to_their_quarter() -> None:
    losses = NoiseLevelLoss(CPU)
    losses.observe(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.249], [0.25, 1.0]]))
    losses.observe(torch.tensor([[6.0, float("nan")]]), torch.tensor([[1.0, 0.6]]))
    assert losses.collect() == {"loss_sigma_0.00_0.25": 1.5, "loss_sigma_0.25_0.50": 3.0, "loss_sigma_0.75_1.00": 5.0}
    assert losses.collect() == {}


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.moment = 0.0

    def now(self) -> float:
        return self.moment

    def pass_by(self, x: Tensor, forward: float, backward: float) -> Tensor:
        """x, some seconds later, and some seconds in the backward pass."""
        return _Later.apply(x, self, forward, backward)


class _Later(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, forward: float, backward: float) -> Tensor:
        ctx.clock, ctx.backward_seconds = clock, backward
        clock.moment += forward
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.clock.moment += ctx.backward_seconds
        return gradient, None, None, None


class Network(nn.Module):
    """One that takes its time."""

    def __init__(self, clock: Clock, forward: float, backward: float, within: nn.Module | None = None) -> None:
        super().__init__()
        self.clock, self.seconds, self.within = clock, (forward, backward), within

    def forward(self, x: Tensor) -> tuple[Tensor]:
        if self.within is not None:
            self.within(x)
        return (self.clock.pass_by(x, *self.seconds),)


def test_each_part_gets_its_time() -> None:
    clock = Clock()
    student = Network(clock, 1, 2)
    teacher = Network(clock, 10, 0, within=student)
    module = SimpleNamespace(student=student, teacher=teacher)
    meter = Meter(module, CPU)
    meter.timer.watch.now = clock.now  # type: ignore[method-assign]
    x = torch.ones(3, requires_grad=True)
    for _ in range(2):
        with meter.iteration():
            with meter.section("data"):
                clock.moment += 0.5
            with meter.section("forward"):
                with torch.no_grad():
                    teacher(x)
                loss = clock.pass_by(student(x)[0], 100, 300).sum()  # the policy
            with meter.section("backward"):
                loss.backward()
            with meter.section("optimizer"):
                clock.moment += 0.25
            clock.moment += 7000  # anything else
        module.last = SimpleNamespace(losses=loss.detach()[None], sigmas=torch.tensor([0.5]))
        meter.observe()
    student(x)  # outside of a section: a sample, not a step
    values = meter.collect()
    assert values["time/network"] == 10 + 1 + 1 + 2
    assert values["time/policy"] == 100 + 300
    assert (values["time/data"], values["time/optimizer"]) == (0.5, 0.25)
    assert values["loss_sigma_0.50_0.75"] == 3
    assert values["time/communication"] == 0
    assert meter.collect()["time/policy"] == 0


def test_the_clock_of_a_cpu_runs() -> None:
    watch = Stopwatch(CPU)
    start = watch.now()
    time.sleep(0.01)
    assert watch.seconds(start, watch.now()) >= 0.01


def test_memory_is_this_process() -> None:
    before = memory(CPU)
    with mmap.mmap(-1, 2**28) as held:  # 256 MiB; a tensor might get memory that the process has already
        held.write(b"1" * 2**28)
        after = memory(CPU)
    assert after["memory/resident"] - before["memory/resident"] > 0.2
    assert after["memory/resident_peak"] >= after["memory/resident"] * 0.99
    assert before.keys() == after.keys() == {"memory/resident", "memory/resident_peak"}


class Work:
    """An operation that takes as long as one waits for it."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def wait(self) -> str:
        self.clock.moment += 5
        return "done"

    def is_completed(self) -> bool:
        return True


class Backend:
    """What of DeepSpeed's is timed."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def all_reduce(self, tensor: Tensor, async_op: bool = False) -> Work | None:
        self.clock.moment += 2
        return Work(self.clock) if async_op else None

    all_gather = all_gather_into_tensor = broadcast = reduce_scatter_tensor = all_reduce


def test_collective_operations_are_timed_and_waits_for_them() -> None:
    clock = Clock()
    timer = StepTimer(nn.Identity(), nn.Identity(), CPU)
    timer.watch.now = clock.now  # type: ignore[method-assign]
    backend = Backend(clock)
    with timer.collectives(backend):
        assert backend.all_reduce(torch.ones(1)) is None
        work = backend.all_gather(torch.ones(1), async_op=True)
        clock.moment += 1000  # hidden behind this
        assert work is not None
        assert work.is_completed()
        assert work.wait() == "done"
    backend.all_reduce(torch.ones(1))
    assert timer.collect(2)["time/communication"] == (2 + 2 + 5) / 2
    assert vars(backend).keys() == {"clock"}


def test_deepspeed_has_what_is_timed() -> None:
    from deepspeed.comm.torch import TorchBackend

    assert all(callable(getattr(TorchBackend, name)) for name in COLLECTIVES)
