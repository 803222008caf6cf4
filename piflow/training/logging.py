"""What a person sees of a run: a progress bar (plain lines where the output is no terminal), TensorBoard, and Weights &
Biases where the configuration asks for it.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from piflow.training.config import WandbConfig
from piflow.training.errors import ConfigError

SPEED_WINDOW = 50


class RunLogger:
    """Rank 0 shows and records; on other ranks every method does nothing. A context manager.

    folder: of TensorBoard's files. wandb: also record there, in `folder`'s parent; `settings` is the configuration that
    it shows. Raises ConfigError where the package is missing.
    """

    def __init__(
        self,
        folder: Path,
        iterations: int,
        start: int,
        every: int,
        enabled: bool,
        wandb: WandbConfig | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.enabled, self.every, self.iterations = enabled, every, iterations
        self.console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self.progress: Progress | None = None
        self._ticks: deque[tuple[int, float]] = deque([(start, time.monotonic())], maxlen=SPEED_WINDOW)
        self._wandb: Any = None
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        if wandb is not None:
            self._wandb = start_wandb(wandb, folder.parent, settings or {}, resumed=start > 0)
        self.writer = SummaryWriter(str(folder), purge_step=start + 1)  # the value of iteration `start` stays
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
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)

    @property
    def speed(self) -> float:
        """Iterations per second over the last ones."""
        (first, start), (last, end) = self._ticks[0], self._ticks[-1]
        return (last - first) / max(end - start, 1e-9)

    def is_due(self, done: int) -> bool:
        """Whether the iteration that brings the count to `done` is recorded: the same answer on every rank."""
        return done % self.every == 0 or done == self.iterations

    def step(
        self, done: int, loss: float, grad_norm: float, learning_rate: float, more: Mapping[str, float] | None = None
    ) -> None:
        """Record the iteration that brought the count to `done`; `more`: further values, asked for where it is due."""
        if not self.enabled:
            return
        self._ticks.append((done, time.monotonic()))
        text = f"loss {loss:.4f} | {self.speed:.2f} steps/s"
        if self.progress:
            self.progress.update(self._task, completed=done, text=text)
        if not self.is_due(done):
            return
        values = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate, "steps_per_second": self.speed}
        self.scalars(done, {f"train/{name}": value for name, value in values.items()})
        self.scalars(done, {name if "/" in name else f"train/{name}": value for name, value in (more or {}).items()})
        if not self.progress:
            left = (self.iterations - done) / max(self.speed, 1e-9)
            self.say(f"{done}/{self.iterations} | {text} | gradient norm {grad_norm:.3f} | {_clock(left)} left")

    def scalars(self, done: int, values: Mapping[str, float]) -> None:
        """Record `values` {"group/name": number}."""
        if not self.enabled:
            return
        for name, value in values.items():
            self.writer.add_scalar(name, value, done)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=done)

    def picture(self, done: int, name: str, image: Image.Image) -> None:
        """Record a picture."""
        if not self.enabled:
            return
        import numpy as np

        self.writer.add_image(name, np.asarray(image.convert("RGB")), done, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.log({name: import_module("wandb").Image(image)}, step=done)

    def say(self, message: str) -> None:
        """One line for the person, above the bar."""
        if self.enabled:
            self.console.print(message, markup=False)


def start_wandb(config: WandbConfig, folder: Path, settings: dict[str, Any], resumed: bool) -> Any:
    """A run of Weights & Biases, its files below `folder`; one that is resumed goes on with the run that it had.

    Raises ConfigError where the package is missing, or the run cannot begin.
    """
    try:
        wandb = import_module("wandb")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "logging.wandb needs the wandb package: pip install 'piflow[wandb]'. Or leave the section out: TensorBoard "
            "is written anyway."
        ) from error
    note = folder / "wandb_run_id"
    known = note.read_text().strip() if resumed and note.is_file() else None
    try:
        run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.name,
            mode=config.mode,
            id=known,
            resume="allow" if known else None,
            dir=str(folder),
            config=settings,
        )
    except wandb.errors.Error as error:
        raise ConfigError(f"Weights & Biases cannot begin: {error}. Or set logging.wandb.mode=offline.") from error
    note.write_text(run.id)
    return run


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
