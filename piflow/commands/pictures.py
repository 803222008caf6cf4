"""Pictures in a folder: numbered, never replaced, with a grid of all."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from PIL import Image

from piflow.apps.png import save_png

SMALLEST = 64
"""Pictures with fewer pixels a side are enlarged: one of 8 x 8 would be a speck."""


class PictureFolder:
    """The pictures of one run, `00001.png` and on, after those that are in the folder already."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        found = (re.fullmatch(r"(\d{5,})\.png", path.name) for path in folder.glob("*.png"))
        self.folder, self.images, self.made = folder, list[Image.Image](), list[dict[str, Any]]()
        self.first = max((int(match[1]) for match in found if match), default=0) + 1

    def add(self, image: Image.Image, settings: dict[str, Any]) -> None:
        """Write a picture with its settings, to which its size is added."""
        file = self.folder / f"{self.first + len(self.images):05d}.png"
        image = enlarged(image)
        settings = {**settings, "size": list(image.size)}
        save_png(image, file, settings)
        self.images.append(image)
        self.made.append({"file": str(file), **settings})

    def write_grid(self, columns: int) -> Path | None:
        """All pictures of the run in one, with the settings that they share or differ in; of a single one, None."""
        if len(self.images) < 2:
            return None
        file = self.folder / f"grid_{self.first:05d}-{self.first + len(self.images) - 1:05d}.png"
        save_png(grid(self.images, columns), file, in_common(self.made))
        return file


def enlarged(image: Image.Image) -> Image.Image:
    """A picture that is too small to be seen, by a whole factor."""
    factor = max(1, SMALLEST // min(image.size))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def grid(images: list[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Pictures row by row on white. A single column becomes a square."""
    if columns == 1:
        columns = math.isqrt(len(images) - 1) + 1
    width, height = (max(sizes) for sizes in zip(*(image.size for image in images)))
    rows = -(-len(images) // columns)
    paper = Image.new(images[0].mode, (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        paper.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return paper


def in_common(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """One value where all pictures have the same, else the list of what occurs, in order; without the files."""
    common = {}
    for key in (key for key in settings[0] if key != "file"):
        values = list({json.dumps(each[key]): each[key] for each in settings}.values())
        common[key] = values[0] if len(values) == 1 else values
    return common
