"""Examples that need no pipeline run as a person runs them; the pipelines' are in tests/pipelines/test_examples.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(name: str, folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, text
    return float(found[1])


def test_every_example_is_on_the_page() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == set(re.findall(r"<!-- file: examples/(\w+)\.py -->", (ROOT / "docs" / "examples.md").read_text()))


def test_operators(tmp_path: Path) -> None:
    output = run("operators", tmp_path)
    assert number(r"GM rollout .*: (\S+) from", output) < 1e-5
    assert number(r"DX rollout .*: (\S+) from", output) < 1e-5
    assert "gradient (2, 8, 16, 16, 16)" in output


def test_own_sampler(tmp_path: Path) -> None:
    assert number(r"largest difference (\S+) of", run("own_sampler", tmp_path)) < 1e-3


def test_distil_digits(tmp_path: Path) -> None:
    assert len((EXAMPLES / "distil_digits.py").read_text().splitlines()) < 150
    output = run("distil_digits", tmp_path, "--nfe", "2", "--iterations", "60", "--out", "digits.png")
    student, teacher = (number(rf"{who}: .* (\S+)\n", output) for who in ("student, 2 NFE", "teacher, 2 steps"))
    assert student < teacher
    with Image.open(tmp_path / "digits.png") as picture:
        assert picture.size == (20 * 10 * 6, 3 * 10 * 6)


def test_new_teacher(tmp_path: Path) -> None:
    output = run("new_teacher", tmp_path)
    assert number(r"starts (\S+) from", output) < 1e-5
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", output)]
    assert losses[-1] < losses[0]
    assert (tmp_path / "sd3_student" / "diffusion_pytorch_model.safetensors").is_file()


def test_static_gm_fit(tmp_path: Path) -> None:
    errors = [float(error) for error in re.findall(r"ends (\S+) from", run("static_gm_fit", tmp_path))]
    assert len(errors) == 4
    assert min(errors[1:]) < errors[0] < 0.05


def test_checkerboard(tmp_path: Path) -> None:
    output = run("checkerboard", tmp_path, "--iterations", "300", "--out", "board.png")
    assert number(r"student, 1 NFE: (\S+) on", output) > number(r"teacher, 4 Euler steps: (\S+) on", output)
    with Image.open(tmp_path / "board.png") as picture:
        assert picture.size == (800, 400)
