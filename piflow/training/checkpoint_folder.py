"""The checkpoints of one run in a folder, perhaps with a copy at a URL: publishing, finding, copying, retention.

A checkpoint is published in steps that a kill may come between: its manifest, a note `latest.next` that it is whole,
its name, the pointer. From the note on the next process finishes what is left of them; before, the checkpoint is none.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from piflow.training.config import CheckpointConfig
from piflow.training.errors import CheckpointError
from piflow.training.manifest import MANIFEST, sync_folder, verify, write_durably, write_manifest
from piflow.training.storage import UNFINISHED, Remote

POINTER = "latest"
NEXT = "latest.next"
"""Names the checkpoint that is whole and about to be pointed to."""
STEP = re.compile(r"step_\d+", re.ASCII)
LEFTOVERS = ("unfinished_", "removed_", "downloading_", "universal_")
"""Beginnings of the names of what a killed process leaves behind."""


class CheckpointFolder:
    """The checkpoints of one run: a local folder, perhaps with a copy at a URL. Only rank 0 calls its methods."""

    def __init__(self, local: Path, remote: Remote | None = None, config: CheckpointConfig | None = None) -> None:
        self.local, self.remote, self.config = local, remote, config or CheckpointConfig()

    def __str__(self) -> str:
        return f"{self.local} and {self.remote}" if self.remote else str(self.local)

    def clean(self) -> None:
        """Finish what a killed process had begun to publish; remove what it left half-written, here and at the URL."""
        note = self.local / NEXT
        if note.is_file():
            name = note.read_text(errors="replace").strip()
            whole = (self.local / f"unfinished_{name}" / MANIFEST).is_file() or (self.local / name).is_dir()
            if STEP.fullmatch(name) and whole:
                self._finish(name)
        for rest in (p for p in self.local.glob("*") if p.name.startswith(LEFTOVERS)):
            shutil.rmtree(rest, ignore_errors=True)
        for name in (NEXT, f"{NEXT}.partial", f"{POINTER}.partial"):
            (self.local / name).unlink(missing_ok=True)
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
        if self.remote and path and self._holds(path) and not self.remote.exists(f"{path.name}/{MANIFEST}"):
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
            coming.rename(self.local / f"unfinished_{name}")
            final = self._point_to(name)
            messages.append(f"copied {self.remote}/{name} to {final}")
            break
        return messages

    def _newest_here(self) -> int:
        with contextlib.suppress(CheckpointError):
            path, _ = find_checkpoint(self.local, "auto")
            return -1 if path is None else step_of(path.name)
        return -1

    def _holds(self, path: Path) -> bool:
        """Whether the checkpoint `path`, however it is spelled, is one of this folder."""
        return path.resolve().parent == self.local.resolve()

    def publish(self, unfinished: Path, facts: dict[str, Any]) -> Path:
        """Make a checkpoint of a folder `unfinished_step_...` that holds all its files, and point to it."""
        write_manifest(unfinished, facts)
        return self._point_to(unfinished.name.removeprefix("unfinished_"))

    def _point_to(self, name: str) -> Path:
        """Publish `unfinished_<name>`, which is whole."""
        write_durably(self.local / NEXT, name)
        return self._finish(name)

    def _finish(self, name: str) -> Path:
        """What is left to do, which may be all, once the note NEXT is written."""
        final, unfinished = self.local / name, self.local / f"unfinished_{name}"
        if (unfinished / MANIFEST).is_file():
            if final.exists():  # of an earlier attempt, to which the person went back; or a damaged one
                final.rename(_free_name(self.local / f"replaced_{name}"))
            unfinished.rename(final)
        (self.local / NEXT).replace(self.local / POINTER)
        sync_folder(self.local)
        return final

    def give_up(self, unfinished: Path) -> None:
        """Remove a checkpoint that could not be written."""
        (self.local / NEXT).unlink(missing_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)

    def upload(self, path: Path) -> None:
        """Copy a checkpoint to the URL, if there is one, and point to it. Raises StorageError."""
        if self.remote:
            self.remote.upload(path, last=MANIFEST)
            self.remote.write(POINTER, path.name.encode())

    def prune(self, newest: Path, protected: Iterable[Path]) -> None:
        """Remove what `checkpoint.keep` lets go now that `newest` is whole here; no `protected` one."""
        if self.config.keep is None:
            return
        for path in self.local.glob("replaced_step_*"):
            shutil.rmtree(path, ignore_errors=True)
        spared = [path.name for path in protected if self._holds(path)]
        for name in superseded((p.name for p in self.local.glob("step_*")), newest.name, self.config, spared):
            gone = _free_name(self.local / f"removed_{name}")
            (self.local / name).rename(gone)  # at once: a folder that is half removed would look like a damaged one
            shutil.rmtree(gone, ignore_errors=True)

    def prune_remote(self, newest: Path, protected: Iterable[Path]) -> None:
        """As `prune`, at the URL, now that `newest` is whole there. Raises StorageError."""
        if self.config.keep is None or self.remote is None:
            return
        spared = [path.name for path in protected if self._holds(path)]
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


def _free_name(path: Path) -> Path:
    return next(p for n in range(1, 10**6) if not (p := path.with_name(f"{path.name}.{n}")).exists())
