"""The `piflow` command as a person types it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from piflow.cli import app
from piflow.models.adapter_files import WEIGHTS
from tests.golden_vectors import GOLDEN

STUDENT = GOLDEN / "g08_gmqwen"


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def test_help_names_the_sub_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "piflow.cli", "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert "export" in done.stdout


def test_export(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    code, said = run("export", "--ckpt", str(STUDENT), "--out-dir", out)
    assert (code, said) == (0, f"averaged student written to {out}\n")
    written, before = load_file(tmp_path / "out" / WEIGHTS), load_file(STUDENT / WEIGHTS)
    assert written.keys() == before.keys()
    assert all(torch.equal(written[key], before[key]) for key in before)

    code, said = run("export", "--ckpt", str(STUDENT), "--out-dir", out)
    assert code == 1
    assert said == f"piflow: {out} is there already: give another folder, or --overwrite (overwrite=True).\n"
    assert run("export", "--ckpt", str(STUDENT), "--out-dir", out, "--overwrite")[0] == 0
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--ckpt", "/no/such/run"], 1, "There is no checkpoint /no/such/run."),
        (["--ckpt", str(GOLDEN)], 3, "is incomplete: manifest.json is missing"),
        (["--ckpt", str(STUDENT), "--no-ema"], 1, "a saved student, without raw weights"),
        (["--ckpt", str(STUDENT), "--policy-config", '{"type": "DX"}'], 1, "asks for the policy 'DX', but is a GMQwen"),
        (["--ckpt", str(STUDENT), "--policy-config", "[1]"], 1, "--policy-config: expected a JSON object, got [1]"),
        (["--ckpt", str(STUDENT), "--policy-config", "{"], 1, "--policy-config: expected a JSON object, got {"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    found, said = run("export", *arguments, "--out-dir", str(tmp_path / "out"))
    assert found == code
    assert message in said
    assert said.startswith("piflow: ")
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("hidden", "words", "message"),
    [
        ("typer", ["--help"], "the command needs the package typer"),
        (
            "psutil",
            ["train", "configs/digits/nfe1.yaml"],
            "this needs the package psutil: pip install 'piflow[training]'",
        ),
    ],
)
def test_a_missing_package_is_one_message(hidden: str, words: list[str], message: str) -> None:
    script = f"import sys; sys.modules[{hidden!r}] = None; from piflow.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
