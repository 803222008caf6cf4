"""Interleaved timing of candidates against their peers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from benchmarks.memory import keep_freed_memory

__all__ = ["in_turns", "interleaved", "keep_freed_memory", "milliseconds", "rounds_within"]

Stages = Sequence[Callable[[Any], Any]]
"""The parts of a call, each given what the one before it returned (the first: None)."""

FLUSHED_BYTES = 256 << 20
"""Written before each timed call on a GPU, so that it finds nothing in the L2 cache."""


def stage_seconds(stages: Stages, device: str = "cpu") -> list[float]:
    """Seconds of each stage of one call."""
    if device != "cpu":
        return _stage_seconds_on_gpu(stages)
    value, seconds = None, []
    for stage in stages:
        start = time.perf_counter()
        value = stage(value)
        seconds.append(time.perf_counter() - start)
    return seconds


def _stage_seconds_on_gpu(stages: Stages) -> list[float]:
    torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda").zero_()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(stages) + 1)]
    value = None
    marks[0].record()
    for stage, mark in zip(stages, marks[1:]):
        value = stage(value)
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) * 1e-3 for before, after in pairwise(marks)]


def rounds_within(seconds: float, call_seconds: float, least: int = 3, most: int = 40) -> int:
    """How often a call is timed: for `seconds` in all."""
    return min(max(int(seconds / max(call_seconds, 1e-9)), least), most)


def in_turns(
    candidates: Mapping[str, Stages], rounds: Mapping[str, int], device: str = "cpu"
) -> dict[str, list[list[float]]]:
    """Seconds of every call, by stage. Candidates take turns, so that each meets the same machine.

    One that has fewer rounds than the others takes part in as many of theirs, spread evenly.
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in candidates}
    total = max(rounds.values(), default=0)
    for turn in range(1, total + 1):
        for name, stages in candidates.items():
            if turn * rounds[name] // total > (turn - 1) * rounds[name] // total:
                seconds[name].append(stage_seconds(stages, device))
    return seconds


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int = 15, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of every call, candidates taking turns, after `warmup` calls of each."""
    for _ in range(warmup):
        for call in candidates.values():
            call()

    def alone(call: Callable[[], Any]) -> Stages:
        return [lambda _: call()]

    stages = {name: alone(call) for name, call in candidates.items()}
    seconds = in_turns(stages, dict.fromkeys(candidates, rounds))
    return {name: [call[0] for call in calls] for name, calls in seconds.items()}


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile."""
    deciles = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 9
    return {f"p{10 * i}": round(deciles[i - 1] * 1e3, 4) for i in (2, 5, 8)}
