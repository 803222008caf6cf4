"""What a person sees of a run: a progress bar (plain lines where the output is no terminal) and TensorBoard."""

from __future__ import annotations

import sys
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SPEED_WINDOW = 50


class RunLogger:
    """Rank 0 shows and records; on other ranks every method does nothing. A context manager."""

    def __init__(self, folder: Path, iterations: int, start: int, every: int, enabled: bool) -> None:
        self.enabled, self.every, self.iterations = enabled, every, iterations
        self.console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self.progress: Progress | None = None
        self._ticks: deque[tuple[int, float]] = deque([(start, time.monotonic())], maxlen=SPEED_WINDOW)
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=start)
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(), TimeRemainingColumn(),
            )  # fmt: skip
            self.progress = Progress(*columns, console=self.console)
            self._task = self.progress.add_task("distilling", total=iterations, completed=start, text="")

    def __enter__(self) -> Self:
        if self.progress:
            self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress:
            self.progress.stop()
        if self.enabled:
            self.writer.close()

    @property
    def speed(self) -> float:
        """Iterations per second over the last ones."""
        (first, start), (last, end) = self._ticks[0], self._ticks[-1]
        return (last - first) / max(end - start, 1e-9)

    def step(self, done: int, loss: float, grad_norm: float, learning_rate: float) -> None:
        """Record the iteration that brought the count to `done`."""
        if not self.enabled:
            return
        self._ticks.append((done, time.monotonic()))
        text = f"loss {loss:.4f} | {self.speed:.2f} steps/s"
        if self.progress:
            self.progress.update(self._task, completed=done, text=text)
        if done % self.every and done != self.iterations:
            return
        values = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate, "steps_per_second": self.speed}
        for name, value in values.items():
            self.writer.add_scalar(f"train/{name}", value, done)
        if not self.progress:
            left = (self.iterations - done) / max(self.speed, 1e-9)
            self.say(f"{done}/{self.iterations} | {text} | gradient norm {grad_norm:.3f} | {_clock(left)} left")

    def say(self, message: str) -> None:
        """One line for the person, above the bar."""
        if self.enabled:
            self.console.print(message, markup=False)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
