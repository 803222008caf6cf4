"""Limits for tests that start trainings."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """A run that hangs fails; launch_module ends its processes on the way out."""

    def expire(number: int, frame: object) -> None:
        pytest.fail(f"not done after {seconds} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@contextlib.contextmanager
def no_shared_memory_left() -> Iterator[None]:
    """What a run takes of /dev/shm is free when it has ended, however it ended."""

    def names() -> set[str]:
        return {path.name for path in Path("/dev/shm").glob("deepspeed_*")}

    before = names()
    yield
    left, deadline = names() - before, time.monotonic() + 30
    while left and time.monotonic() < deadline:  # of another run, that starts right now on this machine
        time.sleep(0.2)
        left &= names()
    assert not left
