"""The training loop: a step on every rank, or one clear end on every rank."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from piflow.models.export import published_config, write_folder
from piflow.training.calls import Batch, as_batch
from piflow.training.checkpoint import (
    CheckpointFolder,
    Progress,
    check_fits,
    check_shared,
    check_space,
    load_checkpoint,
    save_checkpoint,
)
from piflow.training.config import TrainConfig
from piflow.training.data import build_loader, derive_seed
from piflow.training.ema import ShardedEMA
from piflow.training.engine import build_engine, build_partitioned, check_optimizer, set_for_iteration
from piflow.training.errors import CheckpointError, ConfigError, TrainingError
from piflow.training.evaluation import Evaluation
from piflow.training.logging import RunLogger
from piflow.training.lora import adapter_weights
from piflow.training.measure import Meter
from piflow.training.module import PiIDModule
from piflow.training.signals import StopSignal
from piflow.training.storage import RunFolder, StorageError, run_folder

NOISE_STREAM = 1


class Trainer:
    """One rank of a distillation run."""

    def __init__(
        self,
        config: TrainConfig,
        rank: int,
        world_size: int,
        module: PiIDModule | None = None,
        resume: str | None = None,
    ) -> None:
        """`module`: the root module to train, instead of the one that is built from the configuration.

        `resume`: which checkpoint `resume()` is to load (see piflow.train), none by default.
        """
        self.config, self.rank, self.world_size = config, rank, world_size
        self.output_dir = Path(_broadcast(str(config.output_dir)))
        placed = config.model_copy(update={"output_dir": self.output_dir})
        self.checkpoints = run_folder(placed, "checkpoints", "checkpoints")
        self.logs, self.pictures = run_folder(placed, "logs", "tensorboard"), run_folder(placed, "pictures", "pictures")
        self.store = CheckpointFolder(self.checkpoints.local, self.checkpoints.remote, config.checkpoint)
        torch.manual_seed(derive_seed(config.seed, rank))
        check_optimizer(config)
        self.evaluation = Evaluation(config.logging, self.pictures.local, rank)
        self.accumulation = config.accumulation(world_size)
        # Before anything large: data that are missing, empty or damaged, folders that cannot be written, and a
        # checkpoint that is missing, damaged or another run's.
        self.loader = build_loader(config.data, config.seed, config.batch_size_per_rank, 0, rank, world_size)
        folders = (self.checkpoints, self.logs, self.pictures) if rank == 0 else ()
        if problem := _broadcast(next(filter(None, map(_folder_problem, folders)), None)):
            raise ConfigError(f"{problem}. Choose another output_dir, or other `directories`.")
        self.found = self._agree_on_checkpoint(resume) if resume else (None, [])
        module = module or build_partitioned(config, world_size)
        for folder in folders:
            folder.local.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        check_shared(self.checkpoints.local)
        self.engine = build_engine(module, config)
        self.ema = ShardedEMA(self.engine.module.student, config.ema)
        self.meter = Meter(self.engine.module, self.engine.device)
        self.progress = Progress()
        self.resumed_from: Path | None = None
        self.newest: Path | None = None  # checkpoint of this run, written or resumed from
        self.last_good: Path | None = None  # one from which a loss was finite
        self.skipped = self.skipped_in_a_row = 0  # iterations without a step, in this process

    def resume(self) -> list[str]:
        """Load the checkpoint that was asked for, if there is one; returns messages for the person."""
        self._check_space()
        path, messages = self.found
        if path is None:
            return messages
        try:
            self.progress = load_checkpoint(path, self.engine, self.ema, self.config.seed, self.store.local)
        except (RuntimeError, ValueError, AssertionError, OSError, KeyError) as error:
            if isinstance(error, TrainingError):
                raise
            raise CheckpointError(
                f"{path} does not fit this configuration: {str(error).partition(chr(10))[0]} "
                "Use the configuration that it was written with, or another output_dir."
            ) from error
        self.newest = self.resumed_from = path
        self.skipped_in_a_row = self.progress.skipped_in_a_row
        return [*messages, f"resumed from {path} at iteration {self.progress.iteration}"]

    def _agree_on_checkpoint(self, resume: str) -> tuple[Path | None, list[str]]:
        """Rank 0 looks and verifies; all ranks take its answer, or raise its error."""
        found: tuple[Path | None, list[str]] | TrainingError | None = None
        if self.rank == 0:
            try:
                self.store.clean()
                path, messages = self.store.find(resume)
                fit = check_fits(path, self.config, self.world_size) if path else []
                found = path, messages + fit
            except TrainingError as error:
                found = error
        found = _broadcast(found)
        if isinstance(found, TrainingError):
            raise found
        assert found is not None
        return found

    def _check_space(self) -> None:
        problem = check_space(self.store.local, self.ema) if self.rank == 0 else None
        if problem := _broadcast(problem):
            raise CheckpointError(f"{problem} Free some space, or choose another output_dir.")

    def train(self, logger: RunLogger) -> int:
        """Run to the last iteration, or to a signal: returns its number, 0 without one. Saves at the end of either."""
        config, stop = self.config, 0
        _start_at(self.loader, self.progress.position)
        with StopSignal() as signals:
            batches = iter(self.loader)
            while self.progress.iteration < config.iterations and not stop:
                with self.meter.iteration():
                    with self.meter.section("data"):
                        read = [as_batch(batch) for batch in islice(batches, self.accumulation)]
                    loss, grad_norm, stop = self.step(read, signals)
                done = self.progress.iteration
                if self.skipped_in_a_row:
                    logger.say(f"iteration {done} was skipped on every rank: loss {loss}, gradient norm {grad_norm}")
                measured = self.meter.collect() if logger.is_due(done) else {}
                logger.step(done, loss, grad_norm, config.optimizer.learning_rate_at(done - 1), measured)
                self.evaluation.run(self, self.loader.dataset, logger)
                if stop or done % config.checkpoint.every == 0 or done == config.iterations:
                    self.save(last=bool(stop) or done == config.iterations)
        return stop

    def save(self, last: bool = True) -> Path:
        """Write a checkpoint; collective. Raises TrainingError on every rank, and writes nothing, if a weight of any is
        not finite, or if the disk is full; and if a URL fails, unless this is not the `last` one.
        """
        self._check_weights()
        good = (self.resumed_from, self.last_good)
        self.newest = save_checkpoint(self.store, self.engine, self.progress, self.ema, self.config, good, last)
        self.mirror()
        return self.newest

    def close(self) -> None:
        """The last copies of logs and pictures, once nobody writes to them any more."""
        self.mirror()

    def mirror(self) -> None:
        """Rank 0 copies what is new of logs and pictures to their URLs; where that fails it says so, and goes on."""
        for folder in (self.logs, self.pictures) if self.rank == 0 else ():
            try:
                folder.mirror()
            except StorageError as error:
                print(f"piflow.train: {error} It stays in {folder.local}.", file=sys.stderr, flush=True)

    def step(self, batches: Sequence[Batch], signals: StopSignal | None = None) -> tuple[float, float, int]:
        """One iteration over this rank's batches: (mean loss, gradient norm, signal that any rank has received).

        Where a loss or gradient of any rank is not finite, no rank takes the step. Raises on every rank alike, after
        too many such iterations in a row.
        """
        iteration = self.progress.iteration
        generator = Generator().manual_seed(derive_seed(self.config.seed, NOISE_STREAM, iteration, self.rank))
        set_for_iteration(self.engine, self.config, iteration)
        loss = self._accumulate(batches, generator)

        # One small collective carries the mean loss and the signals, so that all ranks take the same decision.
        facts = torch.stack([loss, torch.full_like(loss, signals.received if signals else 0)])
        everyone = [torch.empty_like(facts) for _ in range(self.world_size)]
        with self.meter.section("communication"):  # where a rank waits for slower ones
            dist.all_gather(everyone, facts)
        losses, received = torch.stack(everyone).unbind(dim=1)
        with self.meter.section("optimizer"):
            self.engine.step()  # which does nothing where the norm of all ranks' gradients is not finite
        grad_norm = float(self.engine.get_global_grad_norm())
        if self.engine.was_step_applied():
            self.last_good, self.skipped_in_a_row = self.newest, 0
            self.ema.update(iteration)
        else:
            self._skip(losses.tolist(), iteration + 1)
        consumed = self.config.batch_size_per_rank * self.world_size * len(batches)
        mean_loss = losses.mean().item()
        position = self.progress.position + consumed
        self.progress = Progress(iteration + 1, position, mean_loss, self.skipped_in_a_row)
        return mean_loss, grad_norm, int(received.max().item())

    def _accumulate(self, batches: Sequence[Batch], generator: Generator) -> Tensor:
        """Forward and backward passes over the batches, data-free one for each segment; returns the mean loss ()."""
        device, iteration = self.engine.device, self.progress.iteration
        segments: list[int | None] = [None]
        if self.config.distillation.data_free:
            segments = list(range(self.config.distillation.nfe))
        total = torch.zeros((), device=device)
        for number, loaded in enumerate(batches, start=1):
            batch = {name: value.to(device) for name, value in loaded.items()}
            x_src = None
            for segment in segments:
                last = number == len(batches) and segment == segments[-1]
                self.engine.set_gradient_accumulation_boundary(last)
                with self.meter.section("forward"):
                    loss = self.engine(batch, iteration, generator, segment, x_src)
                self.meter.observe()
                x_src = self.engine.module.last.x_dst
                total += loss.detach()
                # A loss that is not finite makes all gradients so, on every rank once they are reduced. Passes go on,
                # so that all ranks stay at the same collective.
                finite = torch.where(loss.detach().isfinite(), 1.0, math.nan)
                with self.meter.section("backward"):
                    self.engine.backward(loss * (finite / len(batches)), scale_wrt_gas=False)
        return total / len(batches)

    def _skip(self, losses: list[float], iteration: int) -> None:
        """Count an iteration without a step; the same error on every rank where there were too many in a row."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row <= self.config.max_skipped_iterations:
            return
        ranks = [rank for rank, value in enumerate(losses) if not math.isfinite(value)]
        what = f"The loss of rank {ranks[0]} is {losses[ranks[0]]}" if ranks else "The gradient norm is not finite"
        if self.skipped_in_a_row > 1:
            what = f"{self.skipped_in_a_row} iterations in a row were skipped. {what}"
        raise self._not_finite(what, iteration)

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
        """Write the averaged student to `<output_dir>/student` (safetensors); collective.

        A diffusers folder, or, of a LoRA run, an adapter in the published format.
        """
        self._check_weights()
        folder = self.output_dir / "student"
        weights = self.ema.full_state_dict()
        if self.rank == 0:
            unfinished, replaced = (self.output_dir / f"{state}_student" for state in ("unfinished", "replaced"))
            for rest in (unfinished, replaced):  # of a process that was killed here
                shutil.rmtree(rest, ignore_errors=True)
            self._write_student(unfinished, weights)
            if folder.exists():
                folder.rename(replaced)
            unfinished.rename(folder)
            shutil.rmtree(replaced, ignore_errors=True)
        dist.barrier()
        return folder

    def _write_student(self, folder: Path, weights: dict[str, Tensor]) -> None:
        student, lora = self.engine.module.student, self.config.student.lora
        if lora is not None:
            kind = {"gm": "GMFlow", "dx": "DX"}[self.config.student.policy]
            policy = {"type": kind, "nfe": self.config.distillation.nfe}
            write_folder(folder, published_config(student), adapter_weights(weights, lora), policy)
            return
        exported = type(student).from_config(student.config)
        missing, unexpected = exported.load_state_dict(weights, strict=False)
        if missing or unexpected:
            raise TrainingError(f"The student cannot be exported: {missing} are missing, {unexpected} are unknown.")
        exported.save_pretrained(folder)


def _start_at(loader: DataLoader[Any], position: int) -> None:
    """Let the next pass over a loader of `build_loader` begin at sample `position` of the stream."""
    sampler: Any = loader.batch_sampler
    getattr(sampler, "sampler", sampler).position = position


def _folder_problem(folder: RunFolder) -> str | None:
    """Try to write where the folder is or will be, and at its URL, leaving nothing; what goes wrong, or None."""
    try:
        existing = next(place for place in (folder.local, *folder.local.absolute().parents) if place.exists())
        tempfile.TemporaryFile(dir=existing).close()
        if folder.remote:
            folder.remote.check()
    except OSError as error:
        return f"{folder.local} cannot be used: {error}"
    except StorageError as error:
        return str(error)
    return None


def _broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
