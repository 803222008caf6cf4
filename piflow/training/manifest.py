"""What a checkpoint says of itself: size and SHA-256 of each of its files, and where the run stood."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt

MANIFEST = "manifest.json"


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
    skipped_in_a_row: NonNegativeInt = 0
    world_size: PositiveInt
    config: dict[str, Any]
    files: dict[str, FileFacts] = Field(min_length=1)


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint `path`. Raises FileNotFoundError, or ValueError where it is none."""
    return Manifest.model_validate_json((path / MANIFEST).read_bytes())


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """List every file below `folder` with size and hash, after its content has reached the disk."""
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        sync_folder(file.parent)
        files[file.relative_to(folder).as_posix()] = {"size": file.stat().st_size, "sha256": _sha256(file)}
    write_durably(folder / MANIFEST, json.dumps({**facts, "files": files}, indent=1))


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Reads every file."""
    if not path.is_dir():
        return f"There is no checkpoint {path}."
    try:
        files = read_manifest(path).files
    except FileNotFoundError:
        return f"The checkpoint {path} is incomplete: {MANIFEST} is missing."
    except (ValueError, OSError):
        return f"The checkpoint {path} is damaged: {MANIFEST} cannot be read."
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"The checkpoint {path} is incomplete: {name} is missing."
        if file.stat().st_size != expected.size:
            return f"The checkpoint {path} is damaged: {name} has {file.stat().st_size} bytes, not {expected.size}."
        try:
            found = _sha256(file)
        except OSError as error:
            return f"The checkpoint {path} is damaged: {name} cannot be read ({error.strerror})."
        if found != expected.sha256:
            return f"The checkpoint {path} is damaged: {name} has another content than was written."
    return None


def write_durably(path: Path, text: str) -> None:
    """Write a small file that is there whole or as it was before, also after a loss of power."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where its file system can do that."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
