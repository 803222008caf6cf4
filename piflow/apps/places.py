"""Models as people name them: folders, and Hugging Face repositories with a subfolder behind them."""

from __future__ import annotations

from pathlib import Path


def split_repository(place: str) -> tuple[str, str | None]:
    """`owner/name/sub/folder` as a repository and its subfolder; a folder on disk as it is."""
    if Path(place).is_dir() or place.count("/") < 2 or place.startswith(("/", ".", "~")):
        return place, None
    owner, name, subfolder = place.split("/", 2)
    return f"{owner}/{name}", subfolder


def named(place: str) -> str:
    """A repository's name, or that of a folder without the way to it, which is nobody else's business."""
    return Path(place).name if Path(place).is_dir() else place
