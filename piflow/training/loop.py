"""The training loop: a step on every rank, or one clear end on every rank."""

from __future__ import annotations

import math
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor

from piflow.training.checkpoint import Progress, check_fits, find_checkpoint, load_checkpoint, save_checkpoint
from piflow.training.config import TrainConfig
from piflow.training.data import build_loader, derive_seed
from piflow.training.ema import ShardedEMA
from piflow.training.engine import build_engine, set_learning_rate
from piflow.training.errors import CheckpointError, ConfigError, TrainingError
from piflow.training.logging import RunLogger
from piflow.training.module import build_module
from piflow.training.signals import StopSignal

NOISE_STREAM = 1


class Trainer:
    """One rank of a distillation run."""

    def __init__(self, config: TrainConfig, rank: int, world_size: int) -> None:
        self.config, self.rank, self.world_size = config, rank, world_size
        self.output_dir = Path(_broadcast(str(config.output_dir)))
        self.checkpoints = self.output_dir / "checkpoints"
        torch.manual_seed(derive_seed(config.seed, rank))
        module = build_module(config)
        if problem := _broadcast(_folder_problem(self.checkpoints) if rank == 0 else None):
            raise ConfigError(f"output_dir {self.output_dir} cannot be used: {problem}. Choose another output_dir.")
        self.engine = build_engine(module, config)
        self.ema = ShardedEMA(self.engine.module.student, config.ema)
        self.progress = Progress()
        self.newest: Path | None = None  # checkpoint of this run, written or resumed from
        self.last_good: Path | None = None  # one from which a loss was finite

    def resume(self, resume: str) -> list[str]:
        """Load the checkpoint that `resume` asks for, if any; returns messages for the person."""
        path, messages = self._agree_on_checkpoint(resume)
        if path is None:
            return messages
        messages += check_fits(path, self.config, self.world_size)
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
        self.newest = path
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
        stop = 0
        with StopSignal() as signals:
            batches = iter(loader)
            while self.progress.iteration < config.iterations and not stop:
                images, labels = next(batches)
                loss, grad_norm, stop = self.step(images, labels, signals)
                done = self.progress.iteration
                logger.step(done, loss, grad_norm, config.optimizer.learning_rate_at(done - 1))
                if stop or done % config.checkpoint_every == 0 or done == config.iterations:
                    self.save()
        return stop

    def save(self) -> Path:
        """Write a checkpoint; collective. Raises TrainingError on every rank, and writes nothing, if a weight of any is
        not finite.
        """
        self._check_weights()
        self.newest = save_checkpoint(self.checkpoints, self.engine, self.progress, self.ema.shadow, self.config)
        return self.newest

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
            raise self._not_finite(f"The loss of rank {ranks[0]} is {losses[ranks[0]].item()}", iteration + 1)

        self.last_good = self.newest
        self.engine.backward(loss)
        self.engine.step()
        grad_norm = float(self.engine.get_global_grad_norm())
        if not math.isfinite(grad_norm):
            raise self._not_finite(f"The gradient norm is {grad_norm}", iteration + 1)
        self.ema.update(iteration)
        consumed = self.config.batch_size_per_rank * self.world_size
        self.progress = Progress(iteration + 1, self.progress.position + consumed)
        return mean_loss, grad_norm, int(received.max().item())

    def _not_finite(self, what: str, iteration: int) -> TrainingError:
        then = "start again in another output_dir" if self.newest else "start again"
        if self.last_good:
            then = f"go on with --resume {shlex.quote(str(self.last_good))}, or {then}"
        return TrainingError(
            f"{what} at iteration {iteration}; nothing was saved of it. Lower optimizer.learning_rate (now "
            f"{self.config.optimizer.learning_rate:g}) or optimizer.gradient_clipping, or check data and teacher for "
            f"values that are not finite. Then {then}."
        )

    def _check_weights(self) -> None:
        """All ranks agree that every weight and every average is finite, or raise."""
        shards = [*self.ema.current_shards().values(), *self.ema.shadow.values()]
        finite = torch.stack([shard.isfinite().all() for shard in shards]).all().int()
        dist.all_reduce(finite, dist.ReduceOp.MIN)
        if not finite:
            raise self._not_finite("The student's weights are not finite", self.progress.iteration)

    def export(self) -> Path:
        """Write the averaged student to `<output_dir>/student` as a diffusers folder (safetensors); collective."""
        self._check_weights()
        folder = self.output_dir / "student"
        weights = self.ema.full_state_dict()
        if self.rank == 0:
            student = self.engine.module.student
            exported = type(student).from_config(student.config)
            missing, unexpected = exported.load_state_dict(weights, strict=False)
            if missing or unexpected:
                raise TrainingError(f"The student cannot be exported: {missing} are missing, {unexpected} are unknown.")
            unfinished, replaced = (self.output_dir / f"{state}_student" for state in ("unfinished", "replaced"))
            for rest in (unfinished, replaced):  # of a process that was killed here
                shutil.rmtree(rest, ignore_errors=True)
            exported.save_pretrained(unfinished)
            if folder.exists():
                folder.rename(replaced)
            unfinished.rename(folder)
            shutil.rmtree(replaced, ignore_errors=True)
        dist.barrier()
        return folder


def _folder_problem(folder: Path) -> str | None:
    """Make the folder and try to write into it; what goes wrong, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return str(error)
    return None


def _broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
