"""`piflow train --json`: one object on stdout, whatever the run comes to, and everything else on stderr."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from piflow.cli import app
from piflow.commands.train import outcome
from piflow.training.checkpoint import read_manifest
from piflow.training.config import load_config
from piflow.training.launch import launcher_environment
from tests.commands.runs import finished_run
from tests.processes import no_shared_memory_left, time_limit

CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = str(CONFIGS / "digits" / "nfe1.yaml")
SMALL = ["batch_size_per_rank=2", "student.num_gaussians=2", "distillation.total_substeps=8", "log_every=1"]
TINY = str(CONFIGS / "tiny" / "qwen_image" / "gm_4nfe.yaml")


@pytest.fixture
def limited() -> Iterator[None]:
    with time_limit(300), no_shared_memory_left():
        yield


def train(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["train", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_a_dry_run_says_in_json_what_it_prints(tmp_path: Path) -> None:
    words = [TINY, f"output_dir={tmp_path / 'out'}", "optimizer.learning_rate=3e-4", "--dry-run", "--processes", "4"]
    code, said, noted = train(*words, "--json")
    found = json.loads(said)
    assert (code, noted) == (0, "")
    assert (found["state"], found["output_dir"], found["processes"]) == ("dry run", str(tmp_path / "out"), 4)
    assert found["batch"] == {"size": 4, "of_each_process": 1, "in_turn": 1}
    assert found["config"]["optimizer"]["learning_rate"] == 3e-4
    assert found["peak"] == sum(found["bytes"].values())

    _, printed, _ = train(*words)
    assert found["config"] == yaml.safe_load(printed)
    for name, count in found["parameters"].items():
        assert f"# {name}: {count:,} parameters\n" in printed
    for name, count in found["bytes"].items():
        assert f"# {count / 1e9:.3g} GB {name} (" in printed.replace("#   ", "# ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_configuration_that_cannot_be_used_is_a_message(more: list[str]) -> None:
    """As of every sub-command: nothing on stdout, and exit code 2."""
    code, said, noted = train(DIGITS, "distillation.nfe=0", "--json", *more)
    assert (code, said) == (2, "")
    assert noted.startswith("piflow: ")
    assert "distillation.nfe" in noted


def test_outcomes(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    config = load_config(run / "config.yaml")
    expected = {
        "state": "finished", "exit_code": 0, "problem": None, "output_dir": str(run), "student": str(run / "student"),
        "checkpoint": str(run / "checkpoints" / "step_000002"), "iteration": 2, "iterations": 2, "loss": 0.25,
        "processes": 2, "seconds": 1.5,
    }  # fmt: skip
    assert outcome(config, 0, 2, 1.5) == expected
    for code, state in ((128 + signal.SIGINT, "stopped"), (128 + signal.SIGTERM, "stopped"), (1, "failed")):
        assert outcome(config, code, 2, 1.5) == expected | {"state": state, "exit_code": code, "student": None}

    elsewhere = load_config(run / "config.yaml", [f"directories.checkpoints={run / 'checkpoints'}", "output_dir=other"])
    assert outcome(elsewhere, 1, 2, 1.5)["checkpoint"] == expected["checkpoint"]
    nothing = {"checkpoint": None, "iteration": 0, "loss": None}
    before = load_config(run / "config.yaml", [f"output_dir={tmp_path / 'new'}"])
    assert outcome(before, 1, 2, 1.5, "no disk").items() >= {**nothing, "problem": "no disk"}.items()
    (run / "checkpoints" / "step_000002" / "manifest.json").write_text("{")
    assert outcome(config, 3, 2, 1.5).items() >= nothing.items()


def piflow(*words: str) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, "-m", "piflow.cli", "train", DIGITS, *SMALL, *words, "--processes", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.mark.launcher
@pytest.mark.usefixtures("limited")
def test_a_run_that_is_stopped_goes_on_and_cannot_begin_again(tmp_path: Path) -> None:
    """Through the real launcher."""
    out = f"output_dir={tmp_path}"
    command = [sys.executable, "-m", "piflow.cli", "train", DIGITS, *SMALL, out, "--processes", "1", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            while not process.stderr.readline().startswith("3/"):
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            said, noted = process.communicate(timeout=100)
        finally:
            process.terminate()
    stopped = json.loads(said)
    assert (process.returncode, stopped["state"], stopped["exit_code"]) == (130, "stopped", 130)
    assert 3 <= stopped["iteration"] < stopped["iterations"]
    assert (stopped["student"], stopped["processes"]) == (None, 1)
    assert "stopped by SIGINT after iteration" in noted

    last = stopped["iteration"] + 2
    code, finished, noted = piflow(out, f"iterations={last}")
    manifest = read_manifest(Path(finished["checkpoint"]))
    assert (code, finished["state"], finished["problem"]) == (0, "finished", None)
    assert (finished["iteration"], finished["iterations"], manifest.iteration) == (last, last, last)
    assert finished["loss"] == float.fromhex(manifest.loss or "")
    assert finished["output_dir"] == str(tmp_path)
    assert (Path(finished["student"]) / "config.json").is_file()
    assert "resumed from" in noted
    assert f"student saved in {finished['student']}" in noted

    code, failed, noted = piflow(out, "--resume", "never")
    assert (code, failed["state"], failed["exit_code"]) == (3, "failed", 3)
    assert failed["problem"].startswith(f"{tmp_path / 'checkpoints'} already holds ")
    assert (failed["iteration"], failed["student"]) == (last, None)
    assert failed["problem"] in noted


@pytest.mark.launcher
@pytest.mark.usefixtures("limited")
def test_one_rank_speaks_for_all(tmp_path: Path) -> None:
    """Ranks that another launcher has started."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["-m", "piflow.cli", "train", DIGITS, *SMALL, f"output_dir={tmp_path}", "iterations=1", "--json"]
    done = subprocess.run([*launcher, *words], capture_output=True, text=True, timeout=200, env=launcher_environment())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["state"], found["iteration"], found["processes"]) == ("finished", 1, 2)
    assert "1/1 | loss" in done.stderr
