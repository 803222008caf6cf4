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
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from piflow.training.config import CheckpointConfig, TrainConfig
from piflow.training.data import derive_seed
from piflow.training.ema import ShardedEMA
from piflow.training.errors import CheckpointError, TrainingError
from piflow.training.resharding import load_universal, read_average, universal_checkpoint
from piflow.training.storage import UNFINISHED, Remote, StorageError

MANIFEST = "manifest.json"
POINTER = "latest"
STEP = re.compile(r"step_\d+", re.ASCII)
LEFTOVERS = ("unfinished_", "removed_", "downloading_", "universal_")
"""Beginnings of the names of what a killed process leaves behind."""
MUST_AGREE = ("student.policy", "student.num_gaussians", "student.n_grid", "student.lora.rank", "precision")
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What a full disk becomes: torch and safetensors have their own ways to say it."""
BYTES_PER_WEIGHT = 16
"""float32 master weight, two moments of AdamW, average."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands: iterations done, samples of the global data stream consumed, mean loss of the last one."""

    iteration: int = 0
    position: int = 0
    loss: float | None = None


class FileFacts(BaseModel):
    """Size in bytes and content of one file."""

    size: NonNegativeInt
    sha256: str


class Manifest(BaseModel):
    """What a checkpoint says of itself; `config` is the resolved configuration of the run that wrote it.

    `loss` is in hexadecimal: two runs are the same if it is the same text.
    """

    iteration: NonNegativeInt
    position: NonNegativeInt
    loss: str | None = None
    world_size: PositiveInt
    config: dict[str, Any]
    files: dict[str, FileFacts] = Field(min_length=1)


class CheckpointFolder:
    """The checkpoints of one run: a local folder, perhaps with a copy at a URL. Only rank 0 calls its methods."""

    def __init__(self, local: Path, remote: Remote | None = None, config: CheckpointConfig | None = None) -> None:
        self.local, self.remote, self.config = local, remote, config or CheckpointConfig()

    def __str__(self) -> str:
        return f"{self.local} and {self.remote}" if self.remote else str(self.local)

    def clean(self) -> None:
        """Remove what killed processes have left half-written, here and at the URL."""
        for rest in (p for p in self.local.glob("*") if p.name.startswith(LEFTOVERS)):
            shutil.rmtree(rest, ignore_errors=True)
        (self.local / f"{POINTER}.partial").unlink(missing_ok=True)
        if self.remote:
            for name in filter(STEP.fullmatch, self.remote.folders()):
                if self.remote.exists(f"{name}/{UNFINISHED}"):
                    self.remote.remove(name, MANIFEST)

    def find(self, resume: str) -> tuple[Path | None, list[str]]:
        """As `find_checkpoint`, of this folder and the URL.

        What is newer there is copied here first; what is found here and not there (the run was killed in between, or
        the storage failed) is copied there.
        """
        messages: list[str] = []
        if self.remote and resume in ("auto", "latest", "never"):
            messages = self._fetch_newest(resume)
        path, warnings = find_checkpoint(self.local, resume)
        messages += warnings
        if self.remote and path and path.parent == self.local and not self.remote.exists(f"{path.name}/{MANIFEST}"):
            self.upload(path)
            messages.append(f"copied {path} to {self.remote}")
        return path, messages

    def _fetch_newest(self, resume: str) -> list[str]:
        """Copy the newest good checkpoint of the URL here, unless one at least as new is here; returns messages."""
        assert self.remote is not None
        there = sorted(filter(STEP.fullmatch, self.remote.folders()), key=step_of, reverse=True)
        pointer = (self.remote.read(POINTER) or b"").decode(errors="replace").strip()
        if pointer in there:
            there = [pointer, *(name for name in there if name != pointer)]
        if resume == "never" and there:
            raise CheckpointError(
                f"{self.remote} already holds {there[0]}. Leave out `--resume never` to go on from there, "
                "or choose another folder for the checkpoints."
            )
        messages = []
        for name in there:
            if self._newest_here() >= step_of(name):
                break
            coming = self.local / f"downloading_{name}"
            self.remote.download(name, coming)
            if problem := verify(coming):
                shutil.rmtree(coming, ignore_errors=True)
                messages.append(f"{self.remote}/{name} is passed over: {problem}")
                continue
            if (final := self.local / name).exists():  # damaged, or `_newest_here` would have found it
                final.rename(_free_name(self.local / f"replaced_{name}"))
            coming.rename(final)
            _write_durably(self.local / POINTER, name)
            messages.append(f"copied {self.remote}/{name} to {final}")
            break
        return messages

    def _newest_here(self) -> int:
        with contextlib.suppress(CheckpointError):
            path, _ = find_checkpoint(self.local, "auto")
            return -1 if path is None else step_of(path.name)
        return -1

    def publish(self, unfinished: Path, facts: dict[str, Any]) -> Path:
        """Make a checkpoint of a folder `unfinished_step_...` that holds all its files, and point to it."""
        final = self.local / unfinished.name.removeprefix("unfinished_")
        write_manifest(unfinished, facts)
        if final.exists():
            final.rename(_free_name(self.local / f"replaced_{final.name}"))
        unfinished.rename(final)
        _write_durably(self.local / POINTER, final.name)
        return final

    def upload(self, path: Path) -> None:
        """Copy a checkpoint to the URL, if there is one, and point to it. Raises StorageError."""
        if self.remote:
            self.remote.upload(path, last=MANIFEST)
            self.remote.write(POINTER, path.name.encode())

    def prune(self, newest: Path, protected: Iterable[Path]) -> None:
        """Remove what `checkpoint.keep` lets go now that `newest` is whole, here and at the URL; no `protected` one."""
        if self.config.keep is None:
            return
        spared = {path.name for path in protected if path.parent == self.local}
        for path in self.local.glob("replaced_step_*"):
            shutil.rmtree(path, ignore_errors=True)
        for name in superseded((p.name for p in self.local.glob("step_*")), newest.name, self.config, spared):
            gone = _free_name(self.local / f"removed_{name}")
            (self.local / name).rename(gone)  # at once: a folder that is half removed would look like a damaged one
            shutil.rmtree(gone, ignore_errors=True)
        if self.remote:
            for name in superseded(self.remote.folders(), newest.name, self.config, spared):
                self.remote.remove(name, first=MANIFEST)


def step_of(name: str) -> int:
    """step_000200 -> 200."""
    return int(name.removeprefix("step_"))


def superseded(names: Iterable[str], newest: str, config: CheckpointConfig, protected: Iterable[str]) -> list[str]:
    """Of the checkpoints up to `newest`, those beyond the newest `keep` that are neither milestones nor protected.

    Later ones are of an earlier attempt, to which the person went back: they stay.
    """
    older = sorted((n for n in names if STEP.fullmatch(n) and step_of(n) <= step_of(newest)), key=step_of)
    kept = {*older[-(config.keep or len(older)) :], newest, *protected}
    milestones = {n for n in older if config.keep_every and step_of(n) % config.keep_every == 0}
    return [n for n in older if n not in kept | milestones]


def save_checkpoint(
    store: CheckpointFolder,
    engine: Any,
    progress: Progress,
    ema: ShardedEMA,
    config: TrainConfig,
    protected: Iterable[Path | None] = (),
) -> Path:
    """Write checkpoint `step_<iteration>`, copy it to the URL, then prune; collective. Returns its path, on every rank.

    Raises CheckpointError on every rank where a disk is full or the like; earlier checkpoints are as they were.
    StorageError likewise for the copy.
    """
    rank, final = dist.get_rank(), store.local / f"step_{progress.iteration:06d}"
    unfinished = store.local / f"unfinished_{final.name}"

    def write_shard() -> None:
        states, metadata = random_states()
        shards = {f"ema.{name}": shard.cpu() for name, shard in ema.shadow.items()}
        save_file({**shards, **states}, unfinished / f"rank_{rank}.safetensors", metadata=metadata)

    def publish() -> None:
        loss = None if progress.loss is None else progress.loss.hex()
        facts = {"world_size": dist.get_world_size(), "config": config.model_dump(mode="json")}
        store.publish(unfinished, {**asdict(progress), "loss": loss, **facts})

    try:
        _together(lambda: _fresh(unfinished) if rank == 0 else None)
        with _noting_errors(engine) as errors:
            engine.save_checkpoint(unfinished, tag="engine", save_latest=False, exclude_frozen_parameters=True)
        _together(write_shard, errors)
        _together(lambda: publish() if rank == 0 else None)
    except CheckpointError as error:
        if rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(f"The checkpoint {final} could not be written: {error} {_remedy(store, ema)}") from None
    _together(lambda: store.upload(final) if rank == 0 else None)
    _together(lambda: store.prune(final, [path for path in protected if path]) if rank == 0 else None)
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
    return Progress(manifest.iteration, manifest.position, loss)


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


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint `path`. Raises FileNotFoundError, or ValueError where it is none."""
    return Manifest.model_validate_json((path / MANIFEST).read_bytes())


def find_checkpoint(folder: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint that `resume` asks for, and warnings about those that were passed over.

    "auto": the newest good one, or None where none was ever written. "latest": likewise, but there must be one.
    "never": None, and there must be none. Else a path. Raises CheckpointError; deletes nothing.
    """
    candidates = [p for p in folder.glob("step_*") if STEP.fullmatch(p.name) and p.is_dir()]
    candidates.sort(key=lambda p: step_of(p.name), reverse=True)
    if resume == "never":
        if candidates:
            raise CheckpointError(
                f"{folder} already holds {candidates[0].name}. Leave out `--resume never` to go on from there, "
                "or choose another output_dir."
            )
        return None, []
    if resume not in ("auto", "latest"):
        path = Path(resume)
        if problem := verify(path):
            raise CheckpointError(f"{problem} Give another checkpoint, or `--resume latest` for the newest good one.")
        return path, []

    warnings: list[str] = []
    pointer = folder / POINTER
    if pointer.is_file():  # a checkpoint that `latest` names goes first, also when the user pointed it to an older one
        name = pointer.read_text(errors="replace").strip()
        if STEP.fullmatch(name):
            candidates = [folder / name, *(p for p in candidates if p.name != name)]
        else:
            warnings.append(f"{pointer} names no checkpoint (it holds {name[:40]!r}).")
    for path in candidates:
        if not (problem := verify(path)):
            return path, warnings
        warnings.append(problem)
    if warnings:
        raise CheckpointError(
            " ".join(warnings)
            + f" No good checkpoint is left in {folder}. Restore the file from a copy, or start anew in "
            "another output_dir."
        )
    if resume == "latest":
        raise CheckpointError(
            f"There is no checkpoint in {folder}. Leave out `--resume latest` to start from the beginning."
        )
    return None, []


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Reads every file."""
    if not path.is_dir():
        return f"There is no checkpoint {path}."
    try:
        files = read_manifest(path).files
    except FileNotFoundError:
        return f"The checkpoint {path} is incomplete: {MANIFEST} is missing."
    except ValueError:
        return f"The checkpoint {path} is damaged: {MANIFEST} cannot be read."
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"The checkpoint {path} is incomplete: {name} is missing."
        if file.stat().st_size != expected.size:
            return f"The checkpoint {path} is damaged: {name} has {file.stat().st_size} bytes, not {expected.size}."
        if _sha256(file) != expected.sha256:
            return f"The checkpoint {path} is damaged: {name} has another content than was written."
    return None


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """List every file below `folder` with size and hash, after its content has reached the disk."""
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        files[file.relative_to(folder).as_posix()] = {"size": file.stat().st_size, "sha256": _sha256(file)}
    _write_durably(folder / MANIFEST, json.dumps({**facts, "files": files}, indent=1))


def random_states() -> tuple[dict[str, Tensor], dict[str, str]]:
    """The generators of torch, CUDA, numpy and Python as tensors and JSON text, for a safetensors file."""
    tensors = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - libraries draw from the global one
    return tensors, {
        "numpy": json.dumps([name, np.asarray(keys).tolist(), *rest]),
        "python": json.dumps(random.getstate()),
    }


def restore_random_states(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """The inverse of `random_states`."""
    torch.set_rng_state(tensors["rng.torch"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    name, keys, *rest = json.loads(metadata["numpy"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss = json.loads(metadata["python"])
    random.setstate((version, tuple(internal), gauss))


def seed_everything(seed: int) -> None:
    """Begin all generators of this process anew."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


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


def _write_durably(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _free_name(path: Path) -> Path:
    return next(p for n in range(1, 10**6) if not (p := path.with_name(f"{path.name}.{n}")).exists())


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
