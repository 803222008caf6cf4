"""The `piflow` command as a person types it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.main import get_command
from typer.testing import CliRunner

from piflow import __version__ as version
from piflow.cli import app
from piflow.models.adapter_files import WEIGHTS
from tests.golden_vectors import GOLDEN

STUDENT = GOLDEN / "g08_gmqwen"
CONFIG = str(Path(__file__).parent.parent / "configs" / "digits" / "nfe1.yaml")
COMMANDS = [
    "app",
    "cache-latents",
    "cache-prompts",
    "demo",
    "doctor",
    "evaluate",
    "export",
    "inspect",
    "plan",
    "sample",
]
COMMANDS += ["train"]


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def piflow(*words: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "piflow.cli", *map(str, words)]
    surroundings = {**os.environ, "COLUMNS": "200", "TERM": "dumb", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, env=surroundings)


def test_help_of_the_command_imports_next_to_nothing() -> None:
    """All sub-commands are there; torch and diffusers, which take seconds, are not."""
    script = """
import sys
sys.argv = ["piflow", "--help"]
from piflow.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "numpy", "diffusers", "transformers", "triton", "deepspeed", "gradio", "pydantic", "safetensors"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert command in done.stdout
    assert "130 interrupted" in done.stdout


def test_every_sub_command_is_known_here() -> None:
    assert sorted(get_command(app).commands) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself_with_an_example_that_it_would_take(command: str) -> None:
    """Every option has a help, and each example names options and arguments that there are."""
    code, said = run(command, "--help")
    assert code == 0
    assert "Example" in said
    found = get_command(app).commands[command]
    assert found.help
    assert all("\n" not in paragraph for paragraph in found.help.split("\n\n")), "lines would break where the code's do"
    for parameter in found.params:
        assert getattr(parameter, "help", None), f"{command}: {parameter.name} does not explain itself"
    examples = [shlex.split(line) for line in found.epilog.split("\n\n")[1:]]
    assert examples
    for words in examples:
        assert words[:2] == ["piflow", command]
        found.make_context(command, words[2:])


def test_version() -> None:
    done = piflow("--version")
    assert (done.returncode, done.stdout) == (0, f"piflow {version}\n")


def test_usage_errors_are_two() -> None:
    assert piflow("sample", "--no-such-option").returncode == 2
    assert piflow("inspect").returncode == 2
    assert piflow("nonsense").returncode == 2
    assert piflow("sample", "--seed", "x").returncode == 2


def test_wrong_configuration_is_told_before_anything_is_launched() -> None:
    done = piflow("train", "none.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("piflow: There is no configuration file none.yaml")
    assert len(done.stderr.splitlines()) == 1


def test_shell_completion_completes() -> None:
    """The script for bash, and what it asks the command for: sub-commands, and options of one."""
    shell = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = piflow("--show-completion", "bash", **shell).stdout
    assert "complete -o default -F _piflow_completion piflow" in script

    def completed(line: str) -> list[str]:
        asked = {"_PIFLOW_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
        return sorted(piflow(**asked).stdout.split())

    assert completed("piflow e") == ["evaluate", "export"]
    assert completed("piflow sample --se") == ["--seed"]
    assert completed("piflow cache-latents --classes i") == ["imagenet-folder"]


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    """As in `piflow inspect ... | head -c 1`, where the pipe is closed before the command has written."""
    command = [sys.executable, "-m", "piflow.cli", "inspect", str(STUDENT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert said == ""


@pytest.mark.parametrize("words", [["sample", "--help"], ["plan", CONFIG, "--gpus", "8", "--gpu-memory", "80"]])
def test_a_reader_that_goes_away_is_no_answer(words: list[str]) -> None:
    """1 would be read as `does not fit`: where click and rich meet the closed pipe, the code is that of SIGPIPE."""
    command = [sys.executable, "-m", "piflow.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=0) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (128 + signal.SIGPIPE, "")


@pytest.mark.slow
def test_progress_is_on_a_terminal_only(tmp_path: Path) -> None:
    """The same command with stderr on a pseudo-terminal, and on a pipe; what it prints is the same."""
    words = ["sample", "digits", "--class", "3", "--out"]
    piped = piflow(*words, tmp_path / "a")
    assert (piped.returncode, piped.stdout, piped.stderr) == (0, f"{tmp_path / 'a'}/00001.png\n", "")

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "piflow.cli", *words, str(tmp_path / "b")]
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # Linux says so when the other end is closed
            while chunk := os.read(ours, 4096):
                shown += chunk
        assert process.stdout is not None
        assert process.stdout.read() == f"{tmp_path / 'b'}/00001.png\n"
    os.close(ours)
    assert process.returncode == 0
    assert b"loading digits" in shown


@pytest.mark.slow
def test_ctrl_c_leaves_no_traceback(tmp_path: Path) -> None:
    """In the middle of the work: exit code 130, and what is finished stays."""
    command = [sys.executable, "-m", "piflow.cli", "sample", "digits", "--seed", "0-99999", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob("*.png")) and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said, noted = process.communicate(timeout=120)
    assert (process.returncode, said, noted) == (130, "", "")
    assert list(tmp_path.glob("*.png"))


def test_demo_tells_what_it_cannot_use(tmp_path: Path) -> None:
    code, said = run("demo", "--out", str(tmp_path / "out"), "--config", str(tmp_path / "none.yaml"))
    assert code == 2
    assert "There is no configuration file" in said
    code, said = run("demo", "--out", str(tmp_path / "out"), "--set", "distillation.nfe=0")
    assert code == 2
    assert "distillation.nfe" in said
    assert not (tmp_path / "out").exists()


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
    code, said = run("export", "--ckpt", str(STUDENT), "--out-dir", out, "--overwrite", "--json")
    assert json.loads(said) == {"folder": out, "weights": "averaged"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--ckpt", "/no/such/run"], 1, "There is no checkpoint /no/such/run."),
        (["--ckpt", str(GOLDEN)], 3, "is incomplete: manifest.json is missing"),
        (["--ckpt", str(STUDENT), "--no-ema"], 1, "a saved student, without raw weights"),
        (["--ckpt", str(STUDENT), "--policy-config", '{"type": "DX"}'], 1, "asks for the policy 'DX', but is a GMQwen"),
        (["--ckpt", str(STUDENT), "--policy-config", "[1]"], 2, "--policy-config: expected a JSON object, got [1]"),
        (["--ckpt", str(STUDENT), "--policy-config", "{"], 2, "--policy-config: expected a JSON object, got {"),
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
