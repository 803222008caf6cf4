"""Every tiny recipe under the real launcher with two ranks, in one start; and a rank that dies."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from piflow.models.adapter_files import read_adapter
from piflow.models.export import export_checkpoint
from piflow.training.launch import launch_module, launcher_environment
from piflow.training.signals import ranks_below
from tests.processes import no_shared_memory_left, time_limit
from tests.training.recipe_checks import GATHERED, ITERATIONS, PARITY, RECIPES, TINY

pytestmark = pytest.mark.launcher

CONFIGS = TINY.parent


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("recipes")
    with time_limit(600), no_shared_memory_left():
        launch_module(["tests.training.recipe_checks", str(folder)], num_processes=2)
    return {"folder": folder, **json.loads((folder / "report.json").read_text())}


def test_every_recipe_has_a_tiny_variant() -> None:
    families = ("imagenet", "flux", "flux2", "qwen_image")
    recipes = [path for family in families for path in (CONFIGS / family).glob("*.yaml")]
    assert sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in recipes) == RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains(recipe: str, report: dict[str, Any]) -> None:
    seen = report[recipe]
    assert all(map(math.isfinite, [*seen["losses"], *seen["norms"]]))
    assert min(seen["norms"]) > 0
    assert seen["invalidations"] == 0
    assert seen["trace_complete"]
    assert seen["frozen_unchanged"]
    assert seen["moved"] > 0.8  # all that the loss depends on: not the text branch of Qwen-Image's last block
    assert seen["position"] == ITERATIONS * (8 if recipe.startswith("imagenet") else 4)


@pytest.mark.parametrize("recipe", PARITY)
def test_loss_and_gradient_norm_equal_a_plain_loop(recipe: str, report: dict[str, Any]) -> None:
    seen = report[recipe]
    assert seen["losses"] == pytest.approx(seen["expected_losses"], rel=1e-6)
    assert seen["norms"] == pytest.approx(seen["expected_norms"], rel=1e-6)


@pytest.mark.parametrize("recipe", PARITY)
def test_gradients_equal_those_of_a_plain_loop(recipe: str, report: dict[str, Any]) -> None:
    errors = report[recipe]["gradient_errors"]
    assert len(errors) > 10
    assert max(errors.values()) < 1e-6


@pytest.mark.parametrize("recipe", GATHERED)
def test_gathered_parameters_stay_below_two_and_a_half_blocks(recipe: str, report: dict[str, Any]) -> None:
    seen = report["gathered"][recipe]
    assert seen["block"] < seen["peak"] < 2.5 * seen["block"] < seen["whole"] / 2
    assert seen["invalidations"] == 0


def test_bfloat16_has_float32_master_weights(report: dict[str, Any]) -> None:
    seen = report["bfloat16"]
    assert seen["dtypes"] == [["torch.bfloat16"], ["torch.float32"]]
    assert seen["losses"][0] == pytest.approx(seen["expected_losses"][0], rel=1e-6)
    assert seen["norms"][0] == pytest.approx(seen["expected_norms"][0], rel=1e-2)  # of bfloat16 gradients there
    assert seen["moved"] == 1


def test_a_lora_run_resumes_exactly_to_the_bit(report: dict[str, Any]) -> None:
    seen = report["resume"]
    assert seen["resumed"] == [seen["history"]] * 2


def test_a_nan_within_an_iteration_skips_the_step_on_every_rank(report: dict[str, Any]) -> None:
    seen = report["resume"]
    assert seen["skipped"] == [[True, 1, False]] * 2
    assert all(map(math.isfinite, seen["after_skip"]))
    assert seen["invalidations"] == 0


def test_a_teacher_from_files_is_the_same_run(report: dict[str, Any]) -> None:
    made, loaded = report["qwen_image/gm_4nfe"], report["loaded"]
    assert loaded["lora"]["losses"] == made["losses"]
    whole = loaded["whole"]
    assert whole["losses"] == pytest.approx(whole["expected_losses"], rel=1e-6)
    assert whole["norms"] == pytest.approx(whole["expected_norms"], rel=1e-6)
    assert whole["frozen_unchanged"]


def test_what_cannot_be_ends_the_run_before_the_base_is_read(report: dict[str, Any]) -> None:
    """Bad data, a folder that cannot be written, a checkpoint that is not there: with a base that is damaged."""
    problems = ("holds no good shard", "Choose another output_dir", "checkpoint")
    for said, expected in zip(report["refused"], problems, strict=True):
        assert said[0] == said[1]
        assert expected in said[0]


@pytest.mark.parametrize("recipe", ["flux/gm_4nfe", "flux2/gm_4nfe", "qwen_image/dx_4nfe"])
def test_a_run_exports_an_adapter(recipe: str, report: dict[str, Any]) -> None:
    adapter = read_adapter(report["folder"] / recipe / "student")
    policy = "DX" if "dx" in recipe else "GM"
    assert adapter.config["_class_name"].startswith(policy)
    assert adapter.policy_config == {"type": {"DX": "DX", "GM": "GMFlow"}[policy], "nfe": 4}
    assert {name.rpartition(".lora_")[2] for name in adapter.lora} == {"A.weight", "B.weight"}
    assert all(name.startswith(("norm_out.", "proj_out")) for name in adapter.weights)
    assert len(adapter.weights) >= 3


@pytest.mark.parametrize("recipe", ["flux/gm_4nfe", "qwen_image/dx_4nfe", "imagenet/dit_1nfe_fm"])
def test_a_checkpoint_exports_what_its_run_exported(recipe: str, report: dict[str, Any], tmp_path: Path) -> None:
    run = report["folder"] / recipe
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")  # without anything else of the run
    out = export_checkpoint(tmp_path, tmp_path / "out")
    theirs, ours = read_adapter(run / "student"), read_adapter(out)
    for kind in ("lora", "weights"):
        expected, actual = getattr(theirs, kind), getattr(ours, kind)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert ours.config["_class_name"] == theirs.config["_class_name"]


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process in its own session, of which nothing is left at the end."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=launcher_environment(), cwd=CONFIGS.parent,
    )  # fmt: skip
    try:
        yield process
    finally:
        below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for one in below:
            with contextlib.suppress(psutil.Error):
                one.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_dead_rank_ends_the_job_with_a_message_within_a_minute(tmp_path: Path) -> None:
    """Through `piflow train`, and while the other rank waits for it in a collective."""
    recipe = TINY / "qwen_image" / "gm_4nfe_data_free.yaml"
    overrides = [f"output_dir={tmp_path}", "iterations=100000"]
    command = [sys.executable, "-u", "-m", "piflow.cli", "train", str(recipe), *overrides, "--processes", "2"]
    lines: list[str] = []
    with time_limit(200), no_shared_memory_left(), started(command) as process:
        assert process.stdout is not None
        ranks: list[psutil.Process] = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("3/"):
                ranks = ranks_below(process.pid)
                killed_at = time.monotonic()
                ranks[1].kill()
        code = process.wait(timeout=60)
        assert time.monotonic() - killed_at < 60
    assert len(ranks) == 2
    said = "".join(lines[-5:])  # by rank 0, or by the launcher where it is faster
    assert code in (1, 256 - signal.SIGKILL)
    assert "rank 1 has died" in said or "lost a process, killed by SIGKILL" in said
    assert "Traceback" not in said
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
