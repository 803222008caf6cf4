"""The parts of the GPU script that need no GPU: its checks, interpreted; floors; the launch table's rewriting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu, launch_table
from benchmarks.shapes import DX_SHAPES, GM_SHAPES, dx_work, gm_work
from piflow_kernels import configs, dx_rollout, gm_rollout
from piflow_kernels.configs import FAMILIES, Family

CHECKS = """
import itertools, sys
from benchmarks import gpu
gm, dx = gpu.gm_cases, gpu.dx_cases
gpu.gm_cases = lambda device: itertools.islice(gm(device), 22, 26)
gpu.dx_cases = lambda device: itertools.islice(dx(device), 2)
sys.exit(gpu.main(["--device", "cpu", "--only", "correctness", "--out", sys.argv[1]]))
"""


@pytest.mark.slow
def test_correctness_runs_interpreted(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run(
        [sys.executable, "-c", CHECKS, tmp_path], env=environment, cwd=Path(gpu.__file__).parents[1], check=True
    )
    report = json.loads((tmp_path / "none" / "correctness.json").read_text())
    assert report["machine"]["gpu"] == "none"
    assert len(report["correctness"]) == 6
    assert all(result["passed"] for result in report["correctness"].values())


def test_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    name, operator, problem, leaves, n_steps, options = next(gpu.gm_cases("cpu"))
    run = gm_rollout
    monkeypatch.setattr(
        gpu.pk, "gm_rollout",
        lambda *a, backend, **kw: run(*a, **kw, backend="torch") * 1.001 if backend == "triton" else run(*a, **kw),
    )  # fmt: skip
    assert not gpu.compare(operator, problem, leaves, n_steps, options)["passed"], name


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        return
    for main in (gpu.main, launch_table.main):
        with pytest.raises(SystemExit):
            main([])
        assert "is to be seen" in capsys.readouterr().err


def test_floors() -> None:
    """Qwen-Image at 1024^2, by hand: 16384 pixels, 8 x 17 values of two bytes and three states of 16 floats."""
    work = gm_work(GM_SHAPES["qwen-image-1024"], torch.bfloat16)
    assert work.bytes == 16384 * (8 * 17 * 2 + 3 * 16 * 4)
    assert work.multiply_adds == 16384 * (36 * 16 + 2 * 8 * 16 + 37 * 64 + 8 * 8 * 37)
    assert work.exponentials == 16384 * 8 * 37
    assert work.floor_seconds(1e12, 1e18, 1e18) == work.bytes / 1e12
    assert work.floor_seconds(1e18, 1e12, 1e18) == work.multiply_adds / 1e12
    assert dx_work(DX_SHAPES["kandinsky-6-pro"], torch.bfloat16).bytes == 31 * 60 * 108 * 16 * (20 + 12)


def test_the_problems_are_ones_that_the_operators_take() -> None:
    import dataclasses

    gm = dataclasses.replace(GM_SHAPES["qwen-image-1024"], spatial=(3, 5))
    assert gm_rollout(**gm.problem(torch.bfloat16)).shape == (1, 16, 3, 5)
    dx = dataclasses.replace(DX_SHAPES["kandinsky-6-pro"], spatial=(2, 3, 5))
    assert dx_rollout(**dx.problem(torch.bfloat16)).shape == (1, 2, 3, 5, 16)


def test_the_table_is_rewritten_in_place() -> None:
    source = Path(configs.__file__).read_text()
    for name, family in FAMILIES.items():
        assert launch_table.rewritten(source, name, family) == source
    changed = launch_table.rewritten(source, "sm_90", Family(gram_warps=2, max_registers=255))
    assert '    "sm_90": Family(gram_warps=2, max_registers=255),\n' in changed
    assert len(changed.splitlines()) == len(source.splitlines())
    with pytest.raises(ValueError, match="expected one row 'sm_70'"):
        launch_table.rewritten(source, "sm_70", Family())


def test_candidates_are_constants_of_the_table() -> None:
    assert set(launch_table.CANDIDATES) == set(Family.__dataclass_fields__) - {"lanes", "max_registers"}
    for constant, (values, _, _) in launch_table.CANDIDATES.items():
        assert getattr(Family(), constant) in values
