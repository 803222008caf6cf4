"""Features of a source in safetensors shards: what an interrupted evaluation goes on from, and the next one reads.

    <folder>/<hash of the settings>/settings.json          for people
                                    shard-00000.safetensors

A shard has one tensor (n, ...) per field and the hash of its settings in its metadata. Other settings (another source,
network, batch size or version) have another hash, so that what is stale is never read.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from piflow.data.shards import write_whole

DIGITS = 20  # of the hash, in the folder's name
ABANDONED = 600  # seconds after which nobody is still writing a shard


class FeatureCache:
    """The shards of `count` samples under `folder`, `shard_size` samples each; `settings` are all that decides them."""

    def __init__(self, folder: Path, settings: dict[str, Any], count: int, shard_size: int) -> None:
        self.count, self.shard_size = count, shard_size
        text = json.dumps(settings | {"count": count, "shard_size": shard_size}, sort_keys=True)
        self.hash = hashlib.sha256(text.encode()).hexdigest()
        self.folder = folder / self.hash[:DIGITS]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "settings.json", json.dumps(json.loads(text), indent=1).encode() + b"\n")

    @property
    def num_shards(self) -> int:
        """Number of shards when all are there."""
        return -(-self.count // self.shard_size)

    def items(self, number: int) -> range:
        """The samples of shard `number`."""
        return range(number * self.shard_size, min((number + 1) * self.shard_size, self.count))

    def is_finished(self, number: int) -> bool:
        """Whether shard `number` is there, whole and of these settings."""
        try:
            with safe_open(self._path(number), "pt") as file:
                return (file.metadata() or {}).get("settings") == self.hash
        except (SafetensorError, OSError):
            return False

    def write(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Write shard `number`; it is there whole or not at all."""
        for partial in self.folder.glob(f".{self._path(number).name}.*.partial"):
            if _age(partial) > ABANDONED:  # by a process that was killed; another may be writing the same shard now
                partial.unlink(missing_ok=True)
        write_whole(self._path(number), save(tensors, {"settings": self.hash}))

    def shards(self, field: str) -> Iterator[Tensor]:
        """A field of all samples, shard by shard."""
        for number in range(self.num_shards):
            with safe_open(self._path(number), "pt") as file:
                yield file.get_tensor(field)

    def whole(self, field: str) -> Tensor:
        """A field of all samples."""
        return torch.cat(list(self.shards(field)))

    def fields(self) -> set[str]:
        """What there is of each sample."""
        with safe_open(self._path(0), "pt") as file:
            return set(file.keys())

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:  # finished in between
        return 0.0
