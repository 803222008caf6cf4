"""Interleaved timing of candidates against their peers."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Have glibc reuse freed blocks of any size, so that nobody's temporaries pay for page faults in each call.

    Unset, code with many large temporaries (the textbook formula) looks several times slower than it is.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int = 15, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of every call, candidates taking turns so that each meets the same machine."""
    for _ in range(warmup):
        for call in candidates.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile."""
    p20, p50, p80 = (statistics.quantiles(seconds, n=10)[i] * 1e3 for i in (1, 4, 7))
    return {"p20": round(p20, 3), "p50": round(p50, 3), "p80": round(p80, 3)}
