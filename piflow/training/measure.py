"""What a training step is made of: loss by noise level, time by part, memory.

Losses are added up where they are, and times are CUDA events: a GPU is waited for once in an iteration, at its end,
when the loss has been read anyway.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import one_hot

GIB = 2**30
PARTS = ("network", "policy", "optimizer", "data", "communication")
COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "reduce_scatter_tensor")
"""What ZeRO-3 calls of a DeepSpeed backend."""


class NoiseLevelLoss:
    """Mean loss of the states in each quarter of the noise levels, [0, 1/4) to [3/4, 1], since it was last asked."""

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros(2, 4, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)

    @torch.no_grad()
    def observe(self, losses: Tensor, sigmas: Tensor) -> None:
        """Add the losses of states at noise levels `sigmas`, of one shape."""
        losses = losses.detach().flatten()
        finite = losses.isfinite()
        quarter = (sigmas.to(losses.device).flatten() * 4).long().clamp(0, 3)
        facts = torch.stack([losses.where(finite, 0), finite.to(losses)])
        self.total += facts.to(self.total) @ one_hot(quarter, 4).to(self.total)

    def collect(self) -> dict[str, float]:
        """{"loss_sigma_0.00_0.25": mean, ...} over all ranks, of quarters that were seen; begins anew. Collective."""
        if dist.is_initialized():
            dist.all_reduce(self.total)
        sums, counts = self.total.tolist()
        self.total.zero_()
        quarters = zip(range(4), sums, counts)
        return {f"loss_sigma_{q / 4:.2f}_{(q + 1) / 4:.2f}": s / n for q, s, n in quarters if n}


class Stopwatch:
    """Moments in time: seconds of the clock, or events of the GPU's stream that are read later."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def now(self) -> Any:
        """A moment."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two moments; of the GPU, once both have passed."""
        return start.elapsed_time(end) / 1000 if self.on_gpu else end - start


class StepTimer:
    """Seconds of an iteration in the networks, in policies, in the optimiser, in data and in communication.

    The networks' share is the forward passes of `student` and `teacher` and what of the backward pass follows the
    gradient of the student's output. The rest of both passes is the policy's: noise, rollouts, losses. Communication is
    a time of its own, not a further share: what is not hidden behind computation is part of the network's and the
    optimiser's time too. Times are those of this rank.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, device: torch.device) -> None:
        self.watch = Stopwatch(device)
        self.intervals: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self.total: dict[str, float] = defaultdict(float)
        self._reached: Any = None  # when the gradient was last at the student's output
        self._started: list[Any] = []
        self._inside = ""  # the section
        for network in (student, teacher):
            network.register_forward_pre_hook(self._enter)
            network.register_forward_hook(self._leave)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time what runs within: "forward", "backward", "optimizer", "data" or "communication"."""
        self._reached, self._inside = None, name
        start = self.watch.now()
        yield
        end, self._inside = self.watch.now(), ""
        if name == "backward":
            middle = self._reached or end
            self.intervals["policy"].append((start, middle))
            self.intervals["network"].append((middle, end))
        else:
            self.intervals[name].append((start, end))

    @contextmanager
    def collectives(self, backend: Any) -> Iterator[None]:
        """Time the collective operations of a DeepSpeed `backend` within: calls, and waits for those under way."""
        for name in COLLECTIVES:
            setattr(backend, name, partial(self._communicate, getattr(backend, name)))
        try:
            yield
        finally:
            for name in COLLECTIVES:
                delattr(backend, name)  # the method of its class is seen again

    def add_up(self) -> None:
        """Put what was timed into sums; waits for the GPU."""
        if self.watch.on_gpu and self.intervals:
            torch.cuda.synchronize()
        for name, pairs in self.intervals.items():
            self.total[name] += sum(self.watch.seconds(*pair) for pair in pairs)
        self.intervals.clear()

    def collect(self, iterations: int) -> dict[str, float]:
        """{"time/network": seconds per iteration, ...} over the last `iterations`; waits for the GPU, begins anew."""
        self.add_up()
        total, self.total = self.total, defaultdict(float)
        forward, within = total.pop("forward", 0.0), total.pop("network_forward", 0.0)
        total["network"] += within
        total["policy"] += forward - within
        return {f"time/{part}": total[part] / max(iterations, 1) for part in PARTS}

    def _communicate(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        start = self.watch.now()
        result = call(*arguments, **named)
        self.intervals["communication"].append((start, self.watch.now()))
        return _TimedWork(result, self) if hasattr(result, "wait") else result

    def _enter(self, network: nn.Module, arguments: Any) -> None:
        if self._inside == "forward":
            self._started.append(self.watch.now())

    def _leave(self, network: nn.Module, arguments: Any, output: Any) -> None:
        if self._inside != "forward":
            return
        start = self._started.pop()
        if not self._started:  # a network within a network is timed once
            self.intervals["network_forward"].append((start, self.watch.now()))
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(self._mark)

    def _mark(self, gradient: Tensor) -> None:
        self._reached = self.watch.now()


class _TimedWork:
    """A collective operation under way; waiting for it is timed."""

    def __init__(self, work: Any, timer: StepTimer) -> None:
        self._work, self._timer = work, timer

    def wait(self, *arguments: Any) -> Any:
        start = self._timer.watch.now()
        result = self._work.wait(*arguments)
        self._timer.intervals["communication"].append((start, self._timer.watch.now()))
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _tensors(output: Any) -> list[Tensor]:
    values = output if isinstance(output, tuple) else getattr(output, "__dict__", {}).values()
    values = output.values() if isinstance(output, Mapping) else values
    return [value for value in values if isinstance(value, Tensor)]


class Meter:
    """All of it for one run. `module` has `student`, `teacher` and, after each forward pass, `last`."""

    def __init__(self, module: Any, device: torch.device) -> None:
        self.module, self.device = module, device
        self.losses = NoiseLevelLoss(device)
        self.timer = StepTimer(module.student, module.teacher, device)
        self.iterations = 0

    @contextmanager
    def iteration(self) -> Iterator[None]:
        """Count one, and time its communication."""
        backend = deepspeed_backend()
        with nullcontext() if backend is None else self.timer.collectives(backend):
            yield
        self.timer.add_up()
        self.iterations += 1

    def section(self, name: str) -> AbstractContextManager[None]:
        """See `StepTimer.section`; after a "forward", `observe` its losses."""
        return self.timer.section(name)

    def observe(self) -> None:
        """Take in what the last forward pass saw."""
        self.losses.observe(self.module.last.losses, self.module.last.sigmas)

    def collect(self) -> dict[str, float]:
        """All values since it was last asked, for `RunLogger.step`. Collective."""
        values = self.losses.collect() | self.timer.collect(self.iterations) | memory(self.device)
        self.iterations = 0
        return values


def deepspeed_backend() -> Any:
    """What DeepSpeed sends its collective operations to, or None before it has joined a process group."""
    module = sys.modules.get("deepspeed.comm.comm")
    return getattr(module, "cdb", None)


def memory(device: torch.device) -> dict[str, float]:
    """GiB now and at most, of the rank that has most: resident memory, and what tensors take on the GPU. Collective."""
    facts = {
        "memory/resident": psutil.Process().memory_info().rss / GIB,
        "memory/resident_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
    }
    if device.type == "cuda":
        facts["memory/gpu"] = torch.cuda.memory_allocated(device) / GIB
        facts["memory/gpu_peak"] = torch.cuda.max_memory_allocated(device) / GIB
    values = torch.tensor(list(facts.values()), dtype=torch.float32, device=device)
    if dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return dict(zip(facts, values.tolist()))
