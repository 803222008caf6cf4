"""The training loop: a step on every rank, or one clear end on every rank."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Generator, Tensor

from piflow.training.checkpoint import Progress, find_checkpoint, load_checkpoint, save_checkpoint
from piflow.training.config import TrainConfig
from piflow.training.data import build_loader, derive_seed
from piflow.training.ema import ShardedEMA
from piflow.training.engine import build_engine, set_learning_rate
from piflow.training.errors import CheckpointError, TrainingError
from piflow.training.logging import RunLogger
from piflow.training.module import build_module

NOISE_STREAM = 1


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
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number


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


class Trainer:
    """One rank of a distillation run."""

    def __init__(self, config: TrainConfig, rank: int, world_size: int) -> None:
        self.config, self.rank, self.world_size = config, rank, world_size
        self.output_dir = Path(_broadcast(str(config.output_dir)))
        self.checkpoints = self.output_dir / "checkpoints"
        torch.manual_seed(derive_seed(config.seed, rank))
        self.engine = build_engine(build_module(config), config)
        self.ema = ShardedEMA(self.engine.module.student, config.ema)
        self.progress = Progress()

    def resume(self, resume: str) -> list[str]:
        """Load the checkpoint that `resume` asks for, if any; returns messages for the person."""
        path, messages = self._agree_on_checkpoint(resume)
        if path is None:
            return messages
        try:
            self.progress, shards = load_checkpoint(path, self.engine)
            self.ema.load(shards)
        except (RuntimeError, ValueError, AssertionError, OSError, KeyError) as error:
            if isinstance(error, TrainingError):
                raise
            raise CheckpointError(
                f"{path} does not fit this configuration: {str(error).partition(chr(10))[0]} "
                "Use the configuration that it was written with, or another output_dir."
            ) from error
        return [*messages, f"resumed from {path} at iteration {self.progress.iteration}"]

    def _agree_on_checkpoint(self, resume: str) -> tuple[Path | None, list[str]]:
        """Rank 0 looks and verifies; all ranks take its answer, or raise its error."""
        found: tuple[Path | None, list[str]] | CheckpointError | None = None
        if self.rank == 0:
            try:
                found = find_checkpoint(self.checkpoints, resume)
            except CheckpointError as error:
                found = error
        found = _broadcast(found)
        if isinstance(found, CheckpointError):
            raise found
        assert found is not None
        return found

    def train(self, logger: RunLogger) -> int:
        """Run to the last iteration, or to a signal: returns its number, 0 without one. Saves at the end of either."""
        config = self.config
        loader = build_loader(
            config.data, config.seed, config.batch_size_per_rank, self.progress.position, self.rank, self.world_size
        )
        saved = self.progress.iteration
        stop = 0
        with StopSignal() as signals:
            batches = iter(loader)
            while self.progress.iteration < config.iterations and not stop:
                images, labels = next(batches)
                loss, grad_norm, stop = self.step(images, labels, signals)
                done = self.progress.iteration
                logger.step(done, loss, grad_norm, config.optimizer.learning_rate_at(done - 1))
                if stop or done % config.checkpoint_every == 0 or done == config.iterations:
                    save_checkpoint(self.checkpoints, self.engine, self.progress, self.ema.shadow)
                    saved = done
        assert saved == self.progress.iteration
        return stop

    def step(self, images: Tensor, labels: Tensor, signals: StopSignal | None = None) -> tuple[float, float, int]:
        """One iteration: (mean loss, gradient norm, signal that any rank has received). Raises on every rank alike."""
        iteration, device = self.progress.iteration, self.engine.device
        generator = Generator().manual_seed(derive_seed(self.config.seed, NOISE_STREAM, iteration, self.rank))
        set_learning_rate(self.engine, self.config.optimizer.learning_rate_at(iteration))
        loss = self.engine(images.to(device), labels.to(device), iteration, generator)

        # One small collective carries the mean loss and the signals, so that all ranks take the same decision.
        facts = torch.stack([loss.detach().float(), torch.zeros_like(loss, dtype=torch.float32)])
        facts[1] = signals.received if signals else 0
        everyone = [torch.empty_like(facts) for _ in range(self.world_size)]
        dist.all_gather(everyone, facts)
        losses, received = torch.stack(everyone).unbind(dim=1)
        mean_loss = losses.mean().item()
        if not math.isfinite(mean_loss):
            ranks = [rank for rank, value in enumerate(losses.tolist()) if not math.isfinite(value)]
            raise self._not_finite(f"The loss of rank {ranks[0]} is {losses[ranks[0]].item()}", iteration)

        self.engine.backward(loss)
        self.engine.step()
        grad_norm = float(self.engine.get_global_grad_norm())
        if not math.isfinite(grad_norm):
            raise self._not_finite(f"The gradient norm is {grad_norm}", iteration)
        self.ema.update(iteration)
        consumed = self.config.batch_size_per_rank * self.world_size
        self.progress = Progress(iteration + 1, self.progress.position + consumed)
        return mean_loss, grad_norm, int(received.max().item())

    def _not_finite(self, what: str, iteration: int) -> TrainingError:
        newest = self.checkpoints / "latest"
        state = (
            f"The checkpoints in {self.checkpoints} are untouched" if newest.is_file() else "No checkpoint was written"
        )
        return TrainingError(
            f"{what} at iteration {iteration + 1}. {state}. Lower optimizer.learning_rate (now "
            f"{self.config.optimizer.learning_rate:g}) or optimizer.gradient_clipping, or check data and teacher for "
            "values that are not finite, and start again."
        )

    def export(self) -> Path:
        """Write the averaged student to `<output_dir>/student` as a diffusers folder (safetensors); collective."""
        folder = self.output_dir / "student"
        weights = self.ema.full_state_dict()
        if self.rank == 0:
            student = self.engine.module.student
            exported = type(student).from_config(student.config)
            missing, unexpected = exported.load_state_dict(weights, strict=False)
            if missing or unexpected:
                raise TrainingError(f"The student cannot be exported: {missing} are missing, {unexpected} are unknown.")
            exported.save_pretrained(folder)
        dist.barrier()
        return folder


def _broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
