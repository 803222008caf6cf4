"""Python blocks of docs/pipelines.md: those that need a download compile, the others run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from piflow import pipelines

PAGE = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()
BLOCKS = re.findall(r"^(<!-- needs a download -->\n)?```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_blocks() -> None:
    assert len(BLOCKS) == PAGE.count("```python")
    names: dict[str, Any] = {}
    for download, block in BLOCKS:
        code = compile(block, "docs/pipelines.md", "exec")
        if not download:
            exec(code, names)
    assert [len(names[key]) for key in ("images", "teacher_images")] == [3, 5]


def test_every_pipeline_is_on_the_page() -> None:
    for name in pipelines.__all__:
        assert f"`{name}`" in PAGE
