"""Checkpoints that are whole or absent: written aside, listed in a manifest, renamed, then pointed to.

    <folder>/latest                       name of the last good checkpoint
    <folder>/step_000200/manifest.json    see Manifest; size and SHA-256 of each file
                         rank_0.safetensors   EMA shards and random states of rank 0
                         engine/              DeepSpeed's own shards of what is trained, read by DeepSpeed only

With a URL for the checkpoints the same layout stands there too: copied when it is whole here, manifest last, and copied
back where it is newer than what is here. All ranks must see the local folder.

Only `CheckpointFolder.prune` deletes finished checkpoints, and only those that `checkpoint.keep` lets go.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from piflow.training.checkpoint_folder import POINTER, STEP, CheckpointFolder, find_checkpoint, step_of, superseded
from piflow.training.config import TrainConfig
from piflow.training.data import derive_seed
from piflow.training.ema import ShardedEMA
from piflow.training.errors import CheckpointError, TrainingError
from piflow.training.manifest import MANIFEST, Manifest, read_manifest, verify, write_manifest
from piflow.training.random_states import random_states, restore_random_states, seed_everything
from piflow.training.resharding import load_universal, read_average, universal_checkpoint
from piflow.training.storage import StorageError

__all__ = [
    "MANIFEST", "STEP", "CheckpointFolder", "Manifest", "Progress", "check_fits", "check_shared", "check_space",
    "find_checkpoint", "load_checkpoint", "random_states", "read_manifest", "restore_random_states", "save_checkpoint",
    "seed_everything", "step_of", "superseded", "verify", "write_manifest",
]  # fmt: skip

MUST_AGREE = ("student.policy", "student.num_gaussians", "student.n_grid", "student.lora.rank", "precision")
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What a full disk becomes: torch and safetensors have their own ways to say it."""
BYTES_PER_WEIGHT = 16
"""float32 master weight, two moments of AdamW, average."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands: iterations done, samples of the global data stream consumed, mean loss of the last one, and
    how many iterations without a step have come one after another up to here.
    """

    iteration: int = 0
    position: int = 0
    loss: float | None = None
    skipped_in_a_row: int = 0


def save_checkpoint(
    store: CheckpointFolder,
    engine: Any,
    progress: Progress,
    ema: ShardedEMA,
    config: TrainConfig,
    protected: Iterable[Path | None] = (),
    last: bool = True,
) -> Path:
    """Write checkpoint `step_<iteration>`, copy it to the URL, then prune; collective. Returns its path, on every rank.

    Raises CheckpointError on every rank where a disk is full or the like; earlier checkpoints are as they were.
    StorageError likewise for the copy, if this is the `last` checkpoint of the process; where more will come, rank 0
    says what is wrong with the URL, and the run goes on.
    """
    rank, final = dist.get_rank(), store.local / f"step_{progress.iteration:06d}"
    good = [path for path in protected if path]
    unfinished = store.local / f"unfinished_{final.name}"

    def write_shard() -> None:
        states, metadata = random_states()
        shards = {f"ema.{name}": shard.cpu() for name, shard in ema.shadow.items()}
        save_file({**shards, **states}, unfinished / f"rank_{rank}.safetensors", metadata=metadata)

    def publish() -> None:
        loss = None if progress.loss is None else progress.loss.hex()
        facts = {"world_size": dist.get_world_size(), "config": config.model_dump(mode="json")}
        store.publish(unfinished, {**asdict(progress), "loss": loss, **facts})

    def copy() -> None:
        try:
            store.upload(final)
            store.prune_remote(final, good)
        except StorageError as error:
            if last:
                raise
            print(f"piflow.train: {error} {final} is whole; the next checkpoint tries again.", file=sys.stderr)

    try:
        _together(lambda: _fresh(unfinished) if rank == 0 else None)
        with _noting_errors(engine) as errors:
            engine.save_checkpoint(unfinished, tag="engine", save_latest=False, exclude_frozen_parameters=True)
        _together(write_shard, errors)
        _together(lambda: publish() if rank == 0 else None)
    except CheckpointError as error:
        if rank == 0:
            store.give_up(unfinished)
        raise CheckpointError(f"The checkpoint {final} could not be written: {error} {_remedy(store, ema)}") from None
    _together(lambda: copy() if rank == 0 else None)
    _together(lambda: store.prune(final, good) if rank == 0 else None)
    return final


def load_checkpoint(path: Path, engine: Any, ema: ShardedEMA, seed: int, scratch: Path) -> Progress:
    """Put a verified checkpoint into engine and average; collective.

    At the world size that wrote it, everything goes on to the bit. At another one weights, optimiser and average are
    the same to the bit and the data goes on at the same sample; random states begin anew from (seed, iteration, rank).
    `scratch` is a folder that all ranks see, for the converted copy. Hyper-parameters stay those of the engine.
    """
    manifest, rank, world_size = read_manifest(path), dist.get_rank(), dist.get_world_size()
    groups = engine.optimizer.param_groups
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    if manifest.world_size == world_size:
        engine.load_checkpoint(path, tag="engine", load_module_strict=False)
        with safe_open(path / f"rank_{rank}.safetensors", "pt") as file:
            states = {key: file.get_tensor(key) for key in file.keys() if key.startswith("rng.")}  # noqa: SIM118
            restore_random_states(states, file.metadata())
    else:
        with universal_checkpoint(path, scratch / f"universal_{path.name}") as converted:
            load_universal(engine, converted)
        seed_everything(derive_seed(seed, manifest.iteration, rank))
    for group, setting in zip(engine.optimizer.param_groups, settings):
        group.update(setting)
    sizes = {name: shard.numel() for name, shard in ema.shadow.items()}
    ema.load(read_average(path, manifest.world_size, sizes))
    loss = None if manifest.loss is None else float.fromhex(manifest.loss)
    return Progress(manifest.iteration, manifest.position, loss, manifest.skipped_in_a_row)


def check_shared(folder: Path) -> None:
    """CheckpointError on every rank where one does not see what rank 0 writes into `folder`; collective.

    Machines that have a disk each would find out at their first checkpoint.
    """
    box = [f".seen_{uuid.uuid4().hex}"]
    dist.broadcast_object_list(box, src=0)
    probe = folder / box[0]

    def look() -> None:
        if not probe.exists():
            raise FileNotFoundError(
                f"does not see what rank 0 writes into {folder}. Checkpoints need a folder that all machines share: "
                "set output_dir or directories.checkpoints to one"
            )

    _together(lambda: probe.touch() if dist.get_rank() == 0 else None)
    try:
        _together(look)
    finally:
        if dist.get_rank() == 0:
            probe.unlink(missing_ok=True)


def check_space(folder: Path, ema: ShardedEMA) -> str | None:
    """Why the next checkpoint will not fit on the disk of `folder`, or None."""
    free, needed = shutil.disk_usage(folder).free, checkpoint_bytes(ema)
    if free > needed:
        return None
    return f"{folder} has {free / 1e9:.1f} GB free, and one checkpoint takes about {needed / 1e9:.1f} GB."


def checkpoint_bytes(ema: ShardedEMA) -> int:
    """About what the files of all ranks take together."""
    return BYTES_PER_WEIGHT * sum(shard.numel() for shard in ema.shadow.values()) * dist.get_world_size()


def check_fits(path: Path, config: TrainConfig, world_size: int) -> list[str]:
    """Warnings where a verified checkpoint was written otherwise than this run; CheckpointError where it must not."""
    manifest = read_manifest(path)
    warnings = []
    if manifest.world_size != world_size:
        before = _global_batch(manifest.config, manifest.world_size)
        now = _global_batch(config.model_dump(), world_size)
        batch = f"takes {now} samples instead of {before}" if now != before else f"still takes {now} samples"
        sizes = f"{path} was written by {manifest.world_size} process(es), this run has {world_size}"
        warnings.append(
            f"{sizes}: an iteration {batch}. Weights, "
            f"optimiser and average are the saved ones; the data goes on at sample {manifest.position}."
        )
        if manifest.config.get("optimizer", {}).get("kind") == "adamw_8bit":
            raise CheckpointError(
                f"{sizes}, and the 8-bit moments of its optimiser cannot be divided anew: start it with "
                f"{manifest.world_size} process(es)."
            )
    saved, current = _flat(manifest.config), _flat(config.model_dump(mode="json"))
    different = {
        key: f"{key} was {saved.get(key)!r}, is {current.get(key)!r}"
        for key in [*current, *(saved.keys() - current.keys())]
        if saved.get(key) != current.get(key)
    }
    if fatal := [different[key] for key in MUST_AGREE if key in different]:
        raise CheckpointError(
            f"{path} does not fit this configuration: {'; '.join(fatal)}. "
            "Use the configuration that it was written with, or another output_dir."
        )
    if different:
        warnings.append(f"the configuration differs from that of {path}: {'; '.join(different.values())}")
    return warnings


@contextlib.contextmanager
def _noting_errors(engine: Any) -> Iterator[list[str]]:
    """Collect what goes wrong while DeepSpeed writes its files.

    An error that left its `save_checkpoint` on one rank would leave the others waiting in its barriers for ever.
    """
    errors: list[str] = []

    def noting(write: Callable[..., Any]) -> Callable[..., None]:
        def attempt(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except WRITE_ERRORS as error:
                errors.append(_say(error))

        return attempt

    writers = (engine.checkpoint_engine, "save"), (engine, "_copy_recovery_script")
    for owner, name in writers:
        setattr(owner, name, noting(getattr(owner, name)))
    try:
        yield errors
    finally:
        for owner, name in writers:
            delattr(owner, name)


def _together(action: Callable[[], Any], errors: Iterable[str] = ()) -> None:
    """Act on every rank; where that fails on any, or `errors` has one, raise the same on all. Collective."""
    problem: TrainingError | None = next((CheckpointError(error) for error in errors), None)
    try:
        if problem is None:
            action()
    except StorageError as error:
        problem = error
    except WRITE_ERRORS as error:
        problem = CheckpointError(_say(error))
    problems: list[TrainingError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if found := next((problem for problem in problems if problem), None):
        raise found


def _say(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "inline_container" in text:  # torch.save says it in terms of its own file format
        text = f"a file could not be written to its end ({text.rpartition(' . ')[2]})"
    return f"rank {dist.get_rank()}: {text or type(error).__name__}."


def _remedy(store: CheckpointFolder, ema: ShardedEMA) -> str:
    free, needed = shutil.disk_usage(store.local).free, checkpoint_bytes(ema)
    latest = store.local / POINTER
    good = f"The last good one is {latest.read_text().strip()}." if latest.is_file() else "There is no earlier one."
    return (
        f"{good} {free / 1e9:.1f} GB are free and a checkpoint takes about {needed / 1e9:.1f} GB: free some, or let "
        "fewer stay with checkpoint.keep; then run the same command again."
    )


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _global_batch(settings: dict[str, Any], world_size: int) -> int:
    return settings.get("batch_size") or settings["batch_size_per_rank"] * world_size


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{a: {b: 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
