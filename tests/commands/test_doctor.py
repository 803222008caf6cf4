"""`piflow doctor`: the self-test really compares, and what it says of clashes, missing packages and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import piflow_kernels
from piflow.cli import app
from piflow.commands import diagnosis
from piflow.commands.self_test import number_of_cases, self_test

CPU = [torch.device("cpu")]


def doctor(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["doctor", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_report_of_this_machine() -> None:
    code, said, noted = doctor("--json")
    report = json.loads(said)
    assert (code, noted) == (0, "")
    assert report["ok"]
    assert report["self_test"]["passed"] is True
    assert {case["operator"] for case in report["self_test"]["cases"]} >= {"gm_rollout", "dx_mean_velocity_loss"}
    assert report["devices"][0]["device"] == "cpu"
    assert report["devices"][0]["backend"] == "torch"
    assert report["packages"]["torch"] == torch.__version__
    assert report["clashes"] == []
    code, said, _ = doctor()
    assert code == 0
    assert said.endswith("All is well.\n")


@pytest.mark.parametrize("operator", ["gm_velocity", "gm_rollout", "dx_mean_velocity", "dx_mean_velocity_loss"])
def test_an_operator_that_is_off_fails(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By four parts in 100,000, where rounding makes less than one."""
    right: Callable[..., Tensor] = getattr(piflow_kernels, operator)

    def wrong(**arguments: Any) -> Tensor:
        return right(**arguments) * (1 if arguments.get("backend") == "reference" else 1.00004)

    monkeypatch.setattr(piflow_kernels, operator, wrong)
    code, said, _ = doctor()
    assert code == 1
    assert f"FAILED       {operator} on cpu, network output in float32: off by 4.0e-05" in said
    assert said.endswith("Not all is well: see the lines in capitals.\n")


def test_what_a_library_prints_is_no_part_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    right = piflow_kernels.gm_rollout

    def talkative(**arguments: Any) -> Tensor:
        print("compiling ...")
        return right(**arguments)

    monkeypatch.setattr(piflow_kernels, "gm_rollout", talkative)
    code, said, noted = doctor("--json")
    assert (code, json.loads(said)["ok"]) == (0, True)
    assert "compiling ..." in noted


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.zeros_like(grad)


def test_a_wrong_gradient_alone_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = piflow_kernels.gm_rollout

    def wrong(**arguments: Any) -> Tensor:
        if arguments.get("backend") != "reference":
            arguments["logstds"] = _WithoutGradient.apply(arguments["logstds"])
        return right(**arguments)

    monkeypatch.setattr(piflow_kernels, "gm_rollout", wrong)
    tested = self_test(CPU)
    assert not tested["passed"]
    failed = [case for case in tested["cases"] if not case["passed"]]
    assert {case["operator"] for case in failed} == {"gm_rollout"}
    assert failed[0]["error"] == pytest.approx(1)


def test_an_operator_that_raises_or_gives_nan_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = piflow_kernels.dx_velocity

    def broken(**arguments: Any) -> Tensor:
        if arguments.get("backend") == "reference":
            return right(**arguments)
        raise RuntimeError("ptxas fatal\nand more lines")

    monkeypatch.setattr(piflow_kernels, "dx_velocity", broken)
    code, said, _ = doctor()
    assert code == 1
    assert "dx_velocity on cpu, network output in float32: RuntimeError: ptxas fatal\n" in said
    monkeypatch.setattr(
        piflow_kernels,
        "dx_velocity",
        lambda **a: right(**a) * (1 if a.get("backend") == "reference" else torch.tensor(float("nan"))),
    )
    case = next(case for case in self_test(CPU)["cases"] if case["operator"] == "dx_velocity")
    assert not case["passed"]


def test_cases_are_counted_beforehand() -> None:
    seen: list[dict[str, Any]] = []
    self_test(CPU, seen.append)
    assert len(seen) == number_of_cases(CPU)


def test_clashes_and_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against piflow's own metadata as setup.py writes it."""
    asked_for = {
        "piflow": ["torch>=2.11", 'diffusers<0.43,>=0.42; extra == "diffusers"', 'gradio>=6; extra == "apps"',
                   'pytest>=9; extra == "dev"'],
        "torch": ['triton==3.7.1; platform_system == "Linux"', 'tritonclash==1; platform_system == "Windows"'],
    }  # fmt: skip
    versions = {"torch": "2.13.0+cpu", "diffusers": "0.44.0", "triton": "3.9.0", "tritonclash": "2", "pytest": "8"}
    monkeypatch.setattr(diagnosis.metadata, "requires", asked_for.get)
    monkeypatch.setattr(diagnosis, "_version", versions.get)
    code, said, _ = doctor()
    assert code == 1
    assert "CLASH        diffusers 0.44.0: piflow needs <0.43,>=0.42\n" in said
    assert "CLASH        triton 3.9.0: torch needs ==3.7.1\n" in said
    assert said.count("CLASH") == 2
    assert "not here     gradio: pip install 'piflow[apps]'\n" in said
    versions |= {"diffusers": "0.42.1", "triton": "3.7.1"}
    assert doctor()[0] == 0
    assert [diagnosis.extra_with(name) for name in ("diffusers", "gradio", "something")] == [
        "diffusers",
        "apps",
        "training",
    ]


def test_with_torch_alone_the_command_says_what_is_missing(tmp_path: Path) -> None:
    """In an environment of its own that sees torch and what torch needs, and no extra of ours."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
    here = Path(torch.__file__).parent.parent
    needed = ["torch", "torchgen", "functorch", "typing_extensions.py", "sympy", "mpmath", "networkx", "jinja2"]
    needed += ["markupsafe", "fsspec", "filelock", "numpy", "numpy.libs", "triton", "setuptools", "packaging"]
    for name in needed:
        if (here / name).exists():
            (site / name).symlink_to(here / name)
    for package in ("piflow", "piflow_kernels"):
        (site / package).symlink_to(Path(piflow_kernels.__file__).parent.parent / package)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(python), "-m", "piflow.cli", *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    done = run("sample")
    assert done.returncode == 1
    assert "the command needs the package typer, the operators do not: pip install 'piflow[diffusers]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert run("--version").stdout.startswith("piflow ")
    done = run("doctor", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["self_test"]["passed"] is True
    assert sys.prefix not in done.stdout
    piped = ["bash", "-c", 'set -o pipefail; "$@" | true', "bash", str(python), "-m", "piflow.cli", "doctor"]
    done = subprocess.run(piped, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (141, False), done.stderr
