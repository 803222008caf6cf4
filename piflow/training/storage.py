"""Folders of a run that also live at an fsspec URL (s3://, gs://, file://, memory://).

What a run writes is written on a disk, whole, and then copied. At the URL nothing can be renamed, so that a folder
counts as there once its last file is: the manifest of a checkpoint.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piflow.training.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from piflow.training.config import TrainConfig

ATTEMPTS = 3
UNFINISHED = "uploading"
"""Name of the file that marks a folder at a URL as not yet whole."""


class StorageError(TrainingError):
    """A URL that cannot be read or written."""

    exit_code = 3


def is_url(place: str | Path) -> bool:
    """Whether this is a URL of fsspec and not a local path."""
    return "://" in str(place)


class Remote:
    """A folder at an fsspec URL. Every method raises StorageError where the storage fails, after a few attempts."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError where fsspec does not know the protocol or its package is not installed."""
        import fsspec  # type: ignore[import-untyped]
        from fsspec.registry import known_implementations  # type: ignore[import-untyped]

        self.url, protocol = url.rstrip("/"), url.partition("://")[0]
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            package = known_implementations.get(protocol, {}).get("class", protocol).partition(".")[0]
            raise ConfigError(f"{url} needs a package for {protocol}://: pip install {package} ({error}).") from error
        except ValueError as error:
            raise ConfigError(f"{url} cannot be used: {error}. Give a local folder or another URL.") from error

    def __str__(self) -> str:
        return self.url

    def check(self) -> None:
        """Write, read and remove a small file."""
        probe = f"{self.root}/.piflow_probe"
        with self._told("cannot be used"):
            self.fs.makedirs(self.root, exist_ok=True)
            self.fs.pipe_file(probe, b"piflow")
            if self.fs.cat_file(probe) != b"piflow":
                raise OSError("a file that was just written reads differently")
            self.fs.rm_file(probe)

    def folders(self) -> list[str]:
        """Names of the folders directly below."""
        with self._told("cannot be listed"):
            self.fs.invalidate_cache()
            if not self.fs.exists(self.root):
                return []
            found = self.fs.ls(self.root, detail=True)
            return sorted(Path(entry["name"]).name for entry in found if entry["type"] == "directory")

    def exists(self, name: str) -> bool:
        """Whether there is a file or folder `name` below."""
        with self._told(f"cannot be asked for {name}"):
            return bool(self.fs.exists(f"{self.root}/{name}"))

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None where there is none."""
        with self._told(f"cannot be read ({name})"):
            self.fs.invalidate_cache()
            path = f"{self.root}/{name}"
            return self.fs.cat_file(path) if self.fs.exists(path) else None

    def write(self, name: str, content: bytes) -> None:
        """Write a small file at once."""
        self._retry(f"cannot be written ({name})", lambda: self.fs.pipe_file(f"{self.root}/{name}", content))

    def upload(self, folder: Path, last: str) -> None:
        """Copy a finished folder to `<url>/<its name>`; the file `last` goes last and makes it whole."""
        target = f"{self.root}/{folder.name}"
        files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != last]

        def copy() -> None:
            self.fs.makedirs(target, exist_ok=True)
            self.fs.pipe_file(f"{target}/{UNFINISHED}", b"")
            if self.fs.exists(f"{target}/{last}"):
                self.fs.rm_file(f"{target}/{last}")
            for file in files:
                self._put(file, f"{target}/{file.relative_to(folder).as_posix()}")
            self._put(folder / last, f"{target}/{last}")
            self.fs.rm_file(f"{target}/{UNFINISHED}")

        self._retry(f"cannot take a copy of {folder}", copy)

    def mirror(self, folder: Path, seen: dict[str, tuple[int, int]]) -> None:
        """Copy the files below `folder` that are new or have changed since `seen`, which is brought up to date."""
        if not folder.is_dir():
            return
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            name, stat = file.relative_to(folder).as_posix(), file.stat()
            state = (stat.st_size, stat.st_mtime_ns)
            if seen.get(name) != state:
                self._retry(f"cannot take a copy of {file}", lambda f=file, n=name: self._put(f, f"{self.root}/{n}"))
                seen[name] = state

    def download(self, name: str, folder: Path) -> None:
        """Copy the folder `<url>/<name>` to the new local `folder`."""

        def copy() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            source = f"{self.root}/{name}"
            for path in self.fs.find(source):
                target = folder / Path(path).relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                self.fs.get_file(path, str(target))

        self._retry(f"cannot give {name}", copy)

    def remove(self, name: str, first: str) -> None:
        """Remove a folder, the file `first` at first: from then on it is no whole one."""
        target = f"{self.root}/{name}"
        with self._told(f"cannot remove {name}"):
            self.fs.invalidate_cache()
            if not self.fs.exists(target):
                return
            self.fs.pipe_file(f"{target}/{UNFINISHED}", b"")
            if self.fs.exists(f"{target}/{first}"):
                self.fs.rm_file(f"{target}/{first}")
            self.fs.rm(target, recursive=True)

    def _put(self, file: Path, target: str) -> None:
        self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        self.fs.put_file(str(file), target)

    def _retry(self, what: str, action: Any) -> None:
        for attempt in range(ATTEMPTS):
            try:
                with self._told(what):
                    return action()
            except StorageError:
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(2**attempt)

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each storage has its own errors, not all of them OSError
            raise StorageError(f"{self.url} {what}: {type(error).__name__}: {error}") from error


@dataclass
class RunFolder:
    """A folder that a run writes; with a URL, `mirror` copies to it what is new."""

    local: Path
    remote: Remote | None = None
    _seen: dict[str, tuple[int, int]] = field(default_factory=dict)

    def mirror(self) -> None:
        """Copy new and changed files to the URL, if there is one. Raises StorageError."""
        if self.remote:
            self.remote.mirror(self.local, self._seen)


def run_folder(config: TrainConfig, kind: str, default: str) -> RunFolder:
    """The folder of `directories.<kind>`: local, or `<output_dir>/<default>` with a copy at the URL.

    Raises ConfigError for a URL that fsspec cannot use.
    """
    place = getattr(config.directories, kind)
    if place is None or is_url(place):
        return RunFolder(config.output_dir / default, Remote(place) if place else None)
    return RunFolder(Path(place))
