"""Every Python block of the package's README runs as it stands, one after the other as a reader meets them."""

import re
from pathlib import Path

import piflow_kernels

ROOT = Path(__file__).parents[2]
README = ROOT / "piflow_kernels" / "README.md"
TEXT = README.read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_every_python_block_is_found():
    assert len(BLOCKS) == TEXT.count("```python") >= 8


def test_python_blocks_run(monkeypatch):
    """From the root of a checkout, as the last block says."""
    monkeypatch.chdir(ROOT)
    names = {}
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), names)
    for name in ("fused", "tokens", "loss", "fast", "compiled", "x"):
        assert names[name].isfinite().all(), name
    assert names["means"].grad.shape == names["means"].shape


def test_every_operator_is_in_the_table():
    for operator in piflow_kernels.__all__:
        assert re.search(rf"`{operator}\b", TEXT), operator


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", TEXT):
        assert (README.parent / target).exists(), target
