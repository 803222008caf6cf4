"""SIGINT and SIGTERM: an exception before and after training, a note for the loop in between."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil

from piflow.training.errors import Interrupted

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def raise_on_stop() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into Interrupted, so that what holds a lock or a half-written file cleans up."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)  # on its way out no `except Exception` of a library may swallow it

    previous = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        raise Interrupted(
            f"stopped by {signal.Signals(number).name}, not within an iteration: nothing is lost. "
            "Run the same command again.",
            number,
        ) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopSignal:
    """Remembers SIGINT and SIGTERM instead of dying of them, from `with` to its end.

    The `deepspeed` launcher, killed alone, takes no rank with it: its end counts as SIGTERM.
    """

    def __init__(self) -> None:
        self._received = 0
        self._launcher = [process for process in psutil.Process().parents() if _is_launcher(process)]

    @property
    def received(self) -> int:
        """Number of the signal received, 0 without one."""
        if not self._received and not all(_is_alive(process) for process in self._launcher):
            self._received = signal.SIGTERM
        return self._received

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number


def ranks_below(pid: int) -> list[psutil.Process]:
    """The ranks of the `deepspeed` launcher `pid`: the children of its launch.py, not what they start themselves."""
    ranks: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "deepspeed.launcher.launch" in process.cmdline():
                    ranks += process.children()
    return ranks


def _is_launcher(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()[:5]
        return any(Path(word).name == "deepspeed" or word.startswith("deepspeed.launcher") for word in words)
    except psutil.Error:  # somebody else's process
        return False


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
