"""Every Python block of docs/own_teacher.md runs, one after the other, and says what the page says."""

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "own_teacher.md"


def test_page_runs_from_top_to_bottom(tmp_path, monkeypatch) -> None:
    text = PAGE.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == text.count("```python") == 4
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    before = None
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
        if "velocity" in names and before is None:
            before = names["student"].proj_out.weight.detach().clone()
            assert (names["policy"].velocity(names["x_src"], names["sigma_src"]) - names["velocity"]).abs().max() < 2e-6
    assert names["dx_student"].config.shift == 3.0
    assert names["result"].loss.isfinite()
    assert not names["student"].proj_out.weight.equal(before)  # trained, saved and loaded
    assert names["latents"].isfinite().all()
    with pytest.raises(ValueError, match="output_layer"):
        names["GMSD3Transformer2DModel"].from_teacher(names["teacher"], output_layer="elsewhere")
