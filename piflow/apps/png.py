"""Pictures that know how they were made: a PNG file with the settings in its metadata.

The settings are one JSON object in a tEXt chunk named `piflow`; JSON's escapes keep it ASCII in any language, which is
what tEXt can hold. `exiftool`, ImageMagick's `identify -verbose` and Pillow's `Image.open(path).text` show it too.
"""

import json
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile, PngInfo

KEYWORD = "piflow"


def save_png(image: Image.Image, path: str | Path | BinaryIO, settings: dict[str, Any]) -> None:
    """Writes `image` to `path` (any suffix; the format is PNG) with `settings`, a dictionary that JSON can hold.

    Raises:
        TypeError: JSON cannot hold a value of `settings`; nothing is written.
    """
    chunks = PngInfo()
    chunks.add_text(KEYWORD, json.dumps(settings))
    image.save(path, format="PNG", pnginfo=chunks)


def read_settings(path: str | Path | BinaryIO) -> dict[str, Any]:
    """The settings that `save_png` wrote into the file at `path`.

    Raises:
        ValueError: the file is no PNG, or carries no settings of piflow.
        FileNotFoundError: there is no such file.
    """
    try:
        with Image.open(path) as image:
            text = image.text.get(KEYWORD) if isinstance(image, PngImageFile) else None
    except UnidentifiedImageError:
        text = None
    if text is None:
        raise ValueError(f"{path}: not a PNG with settings of piflow (a tEXt chunk named {KEYWORD!r})")
    return dict(json.loads(text))
