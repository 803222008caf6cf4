"""Pictures that carry their settings."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from piflow.apps.png import read_settings, save_png
from tests.pipelines.tiny import picture

SETTINGS = {"prompt": '窓辺の本屋, "dusk"\n€', "seed": 2**32 - 1, "temperature": None, "class": [3, 1], "nfe": 4}


def test_settings_come_back_and_pixels_stay(tmp_path: Path) -> None:
    path, image = tmp_path / "picture.png", picture((6, 4))
    save_png(image, path, SETTINGS)
    assert read_settings(path) == SETTINGS
    with Image.open(path) as back:
        assert set(back.text) == {"piflow"}
        np.testing.assert_array_equal(np.asarray(back), np.asarray(image))


def test_into_a_stream() -> None:
    stream = io.BytesIO()
    save_png(picture((6, 4)), stream, SETTINGS)
    stream.seek(0)
    assert read_settings(stream) == SETTINGS


def test_settings_that_json_cannot_hold_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_png(picture((6, 4)), tmp_path / "picture.png", {"seed": object()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["plain PNG", "JPEG", "text"])
def test_files_without_settings(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file.png"
    if kind == "text":
        path.write_text("no picture")
    else:
        picture((6, 4)).save(path, format=kind.split()[-1])
    with pytest.raises(ValueError, match=r"file\.png: not a PNG with settings of piflow"):
        read_settings(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_settings(tmp_path / "none.png")
