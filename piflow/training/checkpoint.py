"""Checkpoints that are whole or absent: written aside, listed in a manifest, renamed, then pointed to.

    <output_dir>/checkpoints/latest                    name of the last good checkpoint
    <output_dir>/checkpoints/step_000200/manifest.json see Manifest; size and SHA-256 of each file
                                         rank_0.safetensors   EMA shards and random states of rank 0
                                         engine/              DeepSpeed's own shards, read by DeepSpeed only

Nothing here deletes a finished checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from piflow.training.config import TrainConfig
from piflow.training.errors import CheckpointError

MANIFEST = "manifest.json"
STEP = re.compile(r"step_\d+", re.ASCII)
MUST_AGREE = ("student.num_gaussians", "precision")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: iterations done and samples of the global data stream consumed."""

    iteration: int = 0
    position: int = 0


class FileFacts(BaseModel):
    """Size in bytes and content of one file."""

    size: NonNegativeInt
    sha256: str


class Manifest(BaseModel):
    """What a checkpoint says of itself; `config` is the resolved configuration of the run that wrote it."""

    iteration: NonNegativeInt
    position: NonNegativeInt
    world_size: PositiveInt
    config: dict[str, Any]
    files: dict[str, FileFacts] = Field(min_length=1)


def save_checkpoint(
    folder: Path, engine: Any, progress: Progress, ema_shards: dict[str, Tensor], config: TrainConfig
) -> Path:
    """Write checkpoint `step_<iteration>` in `folder`; collective. Returns its path, on every rank."""
    final = folder / f"step_{progress.iteration:06d}"
    unfinished = folder / f"unfinished_{final.name}"
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)  # what a killed process left of this very checkpoint
        unfinished.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(unfinished, tag="engine", save_latest=False, exclude_frozen_parameters=True)
    states, metadata = random_states()
    shards = {f"ema.{name}": shard.cpu() for name, shard in ema_shards.items()}
    save_file({**shards, **states}, unfinished / f"rank_{rank}.safetensors", metadata=metadata)
    dist.barrier()
    if rank == 0:
        facts = {"world_size": dist.get_world_size(), "config": config.model_dump(mode="json")}
        write_manifest(unfinished, {**asdict(progress), **facts})
        if final.exists():
            final.rename(_free_name(folder / f"replaced_{final.name}"))
        unfinished.rename(final)
        _write_durably(folder / "latest", final.name)
    dist.barrier()
    return final


def load_checkpoint(path: Path, engine: Any) -> tuple[Progress, dict[str, Tensor]]:
    """Put a verified checkpoint into the engine; collective. Returns the progress and this rank's EMA shards."""
    manifest = read_manifest(path)
    engine.load_checkpoint(path, tag="engine", load_module_strict=False)
    shards: dict[str, Tensor] = {}
    states: dict[str, Tensor] = {}
    with safe_open(path / f"rank_{dist.get_rank()}.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118 - a safetensors file is not a mapping
            (shards if key.startswith("ema.") else states)[key.removeprefix("ema.")] = file.get_tensor(key)
        restore_random_states(states, file.metadata())
    return Progress(manifest.iteration, manifest.position), shards


def check_fits(path: Path, config: TrainConfig, world_size: int) -> list[str]:
    """Warnings where a verified checkpoint's configuration differs from this one; CheckpointError where it must not."""
    manifest = read_manifest(path)
    if manifest.world_size != world_size:
        raise CheckpointError(
            f"{path} was written by {manifest.world_size} process(es), this run has {world_size}. "
            f"Start it with {manifest.world_size} process(es)."
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
    return [f"the configuration differs from that of {path}: {'; '.join(different.values())}"] if different else []


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint `path`. Raises FileNotFoundError, or ValueError where it is none."""
    return Manifest.model_validate_json((path / MANIFEST).read_bytes())


def find_checkpoint(folder: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint that `resume` asks for, and warnings about those that were passed over.

    "auto": the newest good one, or None where none was ever written. "latest": likewise, but there must be one.
    "never": None, and there must be none. Else a path. Raises CheckpointError; deletes nothing.
    """
    candidates = [p for p in folder.glob("step_*") if STEP.fullmatch(p.name) and p.is_dir()]
    candidates.sort(key=lambda p: int(p.name.removeprefix("step_")), reverse=True)
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
    pointer = folder / "latest"
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
