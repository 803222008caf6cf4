"""Samples in safetensors shards, written by any number of processes that need not talk to each other.

    <folder>/plan.json                what was asked for; a resumed run must ask for the same
             shard-00000.safetensors  the samples of one stretch of the source, one after another
             shard-00000.json         its size, hash and format, once it is whole
             index.json               all of these together, once there is every shard: what a reader needs

A shard holds one tensor (n, *shape) per field. Fields whose first axis differs between samples are concatenated along
it, (L_1 + ... + L_n, *shape), with `<field>.offsets` (n + 1,) int64 beside them. `source` (n,) int64 is the place of
each sample in the source, of which some may be missing (images that could not be read).
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, NonNegativeInt, PositiveInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

Sample = dict[str, Tensor]
Kind = Literal["prompts", "latents"]
Verify = Literal["size", "hash"]

Model = TypeVar("Model", bound=BaseModel)

COMMANDS = {"prompts": "piflow cache-prompts", "latents": "piflow cache-latents"}
PLAN, INDEX, SOURCE, OFFSETS = "plan.json", "index.json", "source", ".offsets"
OPEN_SHARDS = 64


class ShardError(ValueError):
    """A folder of shards that is missing, incomplete or damaged; the message names the file and the remedy."""


class FieldFormat(BaseModel):
    """dtype and shape of one sample's tensor; a ragged one has a first axis of its own length before `shape`."""

    dtype: str
    shape: tuple[NonNegativeInt, ...]
    longest: PositiveInt | None = None  # of a ragged field


class Shard(BaseModel):
    """One finished shard; a stretch of the source without any good sample has no file (size 0)."""

    name: str
    count: NonNegativeInt
    size: NonNegativeInt
    sha256: str
    fields: dict[str, FieldFormat]


class Plan(BaseModel):
    """What a folder of shards is made of. `settings`: the encoder, the source and all that changes the samples."""

    version: Literal[1] = 1
    kind: Kind
    items: PositiveInt
    shard_size: PositiveInt
    settings: dict[str, Any]


class Index(Plan):
    """A complete folder of shards."""

    fields: dict[str, FieldFormat]
    shards: list[Shard]

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(shard.count for shard in self.shards)


class ShardWriter:
    """The part of rank `rank` of `world_size` in writing `items` samples to `folder`: every world_size-th shard.

    Raises ShardError where the folder was begun with other settings.
    """

    def __init__(
        self, folder: Path, plan: Plan, rank: int = 0, world_size: int = 1, ragged: Collection[str] = ()
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0..{world_size - 1} (the world size less one), got {rank}.")
        self.folder, self.plan, self.ragged = folder, plan, frozenset(ragged)
        self.rank, self.world_size = rank, world_size
        self.num_shards = -(-plan.items // plan.shard_size)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / PLAN).exists():
            _check_same_plan(folder, _read(Plan, folder / PLAN, "Choose another folder."), plan)
        else:
            self._write_json(PLAN, plan)

    def pending(self, verify: Verify = "size", samples_an_item: int = 0) -> list[int]:
        """Numbers of this rank's shards that are missing or damaged, or hold fewer samples than so many an item."""
        mine = range(self.rank, self.num_shards, self.world_size)
        return [n for n in mine if not self.is_finished(n, verify, samples_an_item * len(self.items(n)))]

    def items(self, number: int) -> range:
        """The stretch of the source that goes into shard `number`."""
        start = number * self.plan.shard_size
        return range(start, min(start + self.plan.shard_size, self.plan.items))

    def is_finished(self, number: int, verify: Verify = "size", at_least: int = 0) -> bool:
        """Whether shard `number` is there, as it was written, with `at_least` so many samples."""
        try:
            shard = _read(Shard, self.folder / f"{_name(number)}.json", "")
        except ShardError:
            return False
        return shard.count >= at_least and _problem(self.folder, shard, verify) is None

    def write(self, number: int, samples: Sequence[tuple[int, Sample]]) -> Shard:
        """Write shard `number` with its samples (place in the source, fields); it is there whole or not at all."""
        shard = Shard(name=f"{_name(number)}.safetensors", count=len(samples), size=0, sha256="", fields={})
        path = self.folder / shard.name
        for rest in self.folder.glob(f".{_name(number)}.*.partial"):  # of a process that was killed here
            rest.unlink(missing_ok=True)
        if samples:
            tensors, shard.fields = pack(samples, self.ragged)
            content = save(tensors)
            shard.size, shard.sha256 = len(content), hashlib.sha256(content).hexdigest()
            write_whole(path, content)
        self._write_json(f"{_name(number)}.json", shard)
        return shard

    def finish(self) -> Index | None:
        """Write the index if every rank's shards are there; None while some are missing.

        Raises ShardError where no shard holds a sample.
        """
        try:
            shards = [_read(Shard, self.folder / f"{_name(n)}.json", "") for n in range(self.num_shards)]
        except ShardError:
            return None
        filled = [shard.fields for shard in shards if shard.count]
        if not filled:
            raise ShardError(f"{self.folder}: not one of {self.plan.items} items of the source could be used.")
        index = Index(**self.plan.model_dump(), fields=_merged(self.folder, filled), shards=shards)
        self._write_json(INDEX, index)
        return index

    def _write_json(self, name: str, content: BaseModel) -> None:
        write_whole(self.folder / name, content.model_dump_json(indent=1).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, also where several processes write it."""
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            f"{path} could not be written: {error.strerror}. What is finished stays: run the same command again."
        ) from error


class ShardedDataset(Dataset[Sample]):
    """Map-style samples of a folder of shards, mapped into memory when they are first read.

    __getitem__(index) gives {field: tensor}, for index in 0..len - 1 over all shards but those named in `skip`, in the
    order of the source. Raises ShardError for a folder or shard that cannot be read.
    """

    def __init__(self, folder: str | Path, kind: Kind | None = None, skip: Collection[str] = ()) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder, kind)
        self.shards = [shard for shard in self.index.shards if shard.count and shard.name not in skip]
        if not self.shards:
            raise ShardError(f"{self.folder} holds no good shard. {_remedy(self.index.kind)}")
        self.ends = np.cumsum([shard.count for shard in self.shards])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.folder}")
        number = int(np.searchsorted(self.ends, index, side="right"))
        shard = self.shards[number]
        row = index - int(self.ends[number]) + shard.count
        try:
            return _OpenShard.of(self.folder / shard.name, shard.sha256).row(row)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ShardError(
                f"{self.folder / shard.name} cannot be read: {error}. {_remedy(self.index.kind)}"
            ) from error

    def sources(self) -> Tensor:
        """The place (len,) int64 of each sample in the source, ascending."""
        return torch.cat([_OpenShard.of(self.folder / s.name, s.sha256).whole(SOURCE) for s in self.shards])


class _OpenShard:
    """A shard mapped into memory, with its offsets read."""

    def __init__(self, path: Path) -> None:
        self.file = safe_open(path, "pt")
        names = list(self.file.keys())
        self.offsets = {
            name.removesuffix(OFFSETS): self.file.get_tensor(name) for name in names if name.endswith(OFFSETS)
        }
        self.slices = {name: self.file.get_slice(name) for name in names if not name.endswith(OFFSETS)}

    @staticmethod
    @lru_cache(maxsize=OPEN_SHARDS)
    def of(path: Path, sha256: str) -> _OpenShard:
        """The shard of this content; those read last stay open."""
        return _OpenShard(path)

    def row(self, row: int) -> Sample:
        """Sample `row`; tensors of their own, not views of the file."""
        sample = {}
        for name, stored in self.slices.items():
            if name == SOURCE:
                continue
            if name in self.offsets:
                start, end = self.offsets[name][row : row + 2].tolist()
                sample[name] = stored[start:end].clone()
            else:
                sample[name] = stored[row : row + 1][0].clone()
        return sample

    def whole(self, name: str) -> Tensor:
        """A field of all samples."""
        return self.file.get_tensor(name)


def read_index(folder: str | Path, kind: Kind | None = None) -> Index:
    """The index of a complete folder of shards; ShardError where it is none, incomplete or of another kind."""
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        if not (folder / PLAN).is_file():
            raise ShardError(f"{folder} is no folder of shards: it has no {INDEX}. {_remedy(kind)}")
        plan = _read(Plan, folder / PLAN, "")
        done, planned = len(list(folder.glob("shard-*.json"))), -(-plan.items // plan.shard_size)
        raise ShardError(f"{folder} is incomplete: {done} of {planned} shards are finished. {_remedy(plan.kind)}")
    index = _read(Index, folder / INDEX, _remedy(kind))
    if kind and index.kind != kind:
        raise ShardError(f"{folder} holds {index.kind}, expected {kind}: {COMMANDS[kind]} makes these.")
    return index


def check_shards(
    folder: str | Path, index: Index, verify: Verify = "size", rank: int = 0, world_size: int = 1
) -> dict[str, str]:
    """{name: what is wrong} of damaged shards.

    "size" compares sizes and headers; "hash" reads every byte, each rank its part.
    """
    mine = slice(rank, None, world_size) if verify == "hash" else slice(None)
    found = {shard.name: _problem(Path(folder), shard, verify) for shard in index.shards[mine]}
    return {name: problem for name, problem in found.items() if problem}


def pack(samples: Sequence[tuple[int, Sample]], ragged: Collection[str]) -> tuple[Sample, dict[str, FieldFormat]]:
    """(tensors of a shard, format of each field) of samples (place in the source, fields)."""
    tensors: Sample = {SOURCE: torch.tensor([place for place, _ in samples])}
    fields = {}
    for name in samples[0][1]:
        values = [sample[name] for _, sample in samples]
        shape, dtype = values[0].shape, str(values[0].dtype).removeprefix("torch.")
        if name in ragged:
            lengths = [len(value) for value in values]
            tensors[name] = torch.cat(values)
            tensors[name + OFFSETS] = torch.tensor([0, *lengths]).cumsum(0)
            fields[name] = FieldFormat(dtype=dtype, shape=shape[1:], longest=max(lengths))
        else:
            tensors[name] = torch.stack(values)
            fields[name] = FieldFormat(dtype=dtype, shape=shape)
    return tensors, fields


def _merged(folder: Path, shards: Sequence[dict[str, FieldFormat]]) -> dict[str, FieldFormat]:
    """The one format of all shards, with the longest of the longest samples."""
    plain = [{name: (field.dtype, field.shape) for name, field in fields.items()} for fields in shards]
    if different := next((other for other in plain if other != plain[0]), None):
        raise ShardError(f"{folder}: shards differ in format: {plain[0]} and {different}. Delete them and begin anew.")
    merged = {}
    for name, field in shards[0].items():
        lengths = [fields[name].longest or 0 for fields in shards]
        merged[name] = field.model_copy(update={"longest": max(lengths) or None})
    return merged


def _problem(folder: Path, shard: Shard, verify: Verify) -> str | None:
    path = folder / shard.name
    if shard.count == 0:
        return None
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != shard.size:
        return f"has {size} bytes, not {shard.size}"
    if verify == "hash":
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                return "has another content than was written"
        return None
    try:
        with safe_open(path, "pt") as file:
            whole = file.get_slice(SOURCE).get_shape() == [shard.count]
    except (SafetensorError, OSError, RuntimeError):
        whole = False
    return None if whole else "begins otherwise than was written"


def _check_same_plan(folder: Path, begun: Plan, now: Plan) -> None:
    old, new = (_settings(plan) for plan in (begun, now))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    different = [f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in keys]
    if different:
        raise ShardError(
            f"{folder} was begun with other settings: {'; '.join(different)}. "
            "Give the same ones to go on, or another folder."
        )


def _settings(plan: Plan) -> dict[str, Any]:
    flat = plan.model_dump(mode="json")
    settings: dict[str, Any] = flat.pop("settings")
    return flat | settings


def _read(model: type[Model], path: Path, remedy: str) -> Model:
    try:
        return model.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if isinstance(error, OSError) else "it does not hold what was written"
        raise ShardError(f"{path} cannot be read: {reason}. {remedy}") from error


def _remedy(kind: Kind | None) -> str:
    commands = COMMANDS[kind] if kind else " or ".join(COMMANDS.values())
    return f"Run `{commands}` with the same arguments again: it keeps what is good and makes the rest."


def _name(number: int) -> str:
    return f"shard-{number:05d}"
