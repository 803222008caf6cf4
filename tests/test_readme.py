"""Every Python block of the README runs as it stands."""

import ast
import re
from pathlib import Path

import pytest

from piflow.digits.teacher import load_teacher
from piflow.models.dit import GMDiTTransformer2DModelV2

README = Path(__file__).parent.parent / "README.md"
FOUND = re.findall(
    r"(<!-- needs a download -->\n)?^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL
)
BLOCKS = [block for mark, block in FOUND if not mark]


def test_every_python_block_is_found():
    assert len(FOUND) == README.read_text().count("```python")
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("block", [block for mark, block in FOUND if mark])
def test_python_block_that_needs_a_download_compiles_and_its_imports_work(block):
    tree = ast.parse(block, str(README))
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), str(README), "exec"), {})


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_block_runs(block, tmp_path, monkeypatch):
    """In a folder that holds what `make demo` leaves: here a real student, fresh from the shipped teacher."""
    student = GMDiTTransformer2DModelV2.from_teacher(load_teacher(), num_gaussians=2)
    student.save_pretrained(tmp_path / "outputs" / "digits" / "nfe4" / "student")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(block, str(README), "exec"), names)
    result = names["images"] if "images" in names else names["x"]
    assert result.isfinite().all()
