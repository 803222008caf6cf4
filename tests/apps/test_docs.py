"""What docs/web.md and docs/comfyui.md say runs, and names what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from piflow.apps.comfyui import NODE_CLASS_MAPPINGS
from piflow.cli import app

ROOT = Path(__file__).parents[2]
WEB, COMFYUI = ((ROOT / "docs" / name).read_text() for name in ("web.md", "comfyui.md"))


@pytest.mark.parametrize("page", [WEB, COMFYUI], ids=["web", "comfyui"])
def test_blocks_run_and_pictures_exist(page: str) -> None:
    for block in re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs", "exec"), {})
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (ROOT / "docs" / picture).is_file()


def test_options_of_the_command() -> None:
    parameters = get_command(app).commands["app"].params
    options = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", WEB))
    assert named
    assert named <= options


def test_every_node_and_input_is_named() -> None:
    for node in NODE_CLASS_MAPPINGS.values():
        assert node.__doc__ in COMFYUI
        assert node.__doc__ in (ROOT / "comfyui" / "README.md").read_text() or node.FUNCTION == "sample"
        inputs = node.INPUT_TYPES()
        for name in {**inputs["required"], **inputs.get("optional", {})}:
            assert f"`{name}`" in COMFYUI or name == "pipeline"
