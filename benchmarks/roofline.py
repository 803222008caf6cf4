"""How fast the machine moves and computes, measured, and the floor that follows for some work."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.machine import machine


@dataclass(frozen=True)
class Work:
    """What a computation cannot do without: bytes moved once, multiply-adds, exponentials."""

    bytes: float = 0
    multiply_adds: float = 0
    exponentials: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.bytes + other.bytes,
            self.multiply_adds + other.multiply_adds,
            self.exponentials + other.exponentials,
        )

    def __mul__(self, factor: float) -> Work:
        return Work(*(factor * value for value in asdict(self).values()))

    __rmul__ = __mul__

    def floor_seconds(self, bytes_per_second: float, fma_per_second: float, exp_per_second: float) -> float:
        """The larger of moving and computing."""
        computing = max(self.multiply_adds / fma_per_second, self.exponentials / exp_per_second)
        return max(self.bytes / bytes_per_second, computing)


@dataclass(frozen=True)
class Rates:
    """Per second: bytes, float32 multiply-adds, exponentials; and how they were found."""

    bytes: float
    multiply_adds: float
    exponentials: float
    probe: str

    def floor_ms(self, work: Work) -> float:
        return 1e3 * work.floor_seconds(self.bytes, self.multiply_adds, self.exponentials)


def best_seconds(call: Callable[[], Any], device: str = "cpu", seconds: float = 1.0) -> float:
    """The shortest call of those that fit into `seconds`: a rate is what the machine can do, not what it did."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def measure_rates(device: str = "cpu", copied_bytes: int = 1 << 29, rows: int = 2048, seconds: float = 1.0) -> Rates:
    """Bytes as a copy reads and writes them, multiply-adds of a float32 matrix product, exponentials in the cache.

    On a GPU the copy is twice the size, the product is without TF32, and exponentials are 16 per multiprocessor and
    clock at the highest clock, which no operator of torch reaches.
    """
    copied_bytes *= 1 if device == "cpu" else 2
    moved = copied_per_second(copied_bytes, device, seconds)
    rows *= 1 if device == "cpu" else 4
    matrix, product = torch.randn(rows, rows, device=device), torch.empty(rows, rows, device=device)
    multiplied = rows**3 / best_seconds(lambda: torch.mm(matrix, matrix, out=product), device, seconds)

    probe = f"copy of {copied_bytes >> 20} MiB; float32 matrix product of {rows} rows; "
    if device == "cpu":
        values = torch.randn(1 << 17)  # 512 KiB: stays in the cores' caches
        result = torch.empty_like(values)
        exponentials = values.numel() / best_seconds(lambda: torch.exp(values, out=result), device, seconds)
        probe += f"torch.exp of {values.numel()} values"
    else:
        clock = float(re.sub(r"[^\d.]", "", machine().get("clocks.max.sm", "")) or "inf") * 1e6
        exponentials = 16 * clock * torch.cuda.get_device_properties(device).multi_processor_count
        probe += "16 exponentials per multiprocessor and clock"
    return Rates(moved, multiplied, exponentials, probe)


def copied_per_second(size: int, device: str, seconds: float) -> float:
    """Bytes read and written by a copy of `size` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source), device, seconds)
