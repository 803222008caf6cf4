"""The benchmark at full size, on two narrow blocks: the same code."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.full_size import recipe, result_file
from piflow.training.launch import launcher_environment
from piflow.training.plan import build
from tests.processes import no_shared_memory_left


@pytest.mark.launcher
def test_the_tiny_scale_measures_every_part(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.full_size", "--scale", "tiny", "--steps", "1", "--json", str(file)]
    with no_shared_memory_left():
        done = subprocess.run(
            command, env=launcher_environment(), stdout=subprocess.PIPE, text=True, check=True, timeout=180
        )
    content = json.loads(file.read_text())
    result = content["full_size"]
    assert content["machine"]["torch"]
    assert result["share"].keys() == {"student", "teacher", "policy", "optimiser", "rest"}
    assert all(0 < share < 1 for share in result["share"].values())
    assert sum(result["share"].values()) == pytest.approx(1)
    assert 0 < result["seconds_per_step"] < result["seconds_in_all"]
    assert all(math.isfinite(loss) for loss in result["losses"])
    assert len(result["losses"]) == 2
    assert "s a step of 4 segments and 2 images" in done.stdout


def test_the_full_scale_is_the_published_recipe_at_full_size(tmp_path: Path) -> None:
    config = recipe("full", 2, str(tmp_path))
    module = build(config)
    assert sum(p.numel() for p in module.parameters() if not p.requires_grad) == 20_430_401_088
    assert config.student.lora is not None
    assert config.student.lora.rank == 256
    assert config.distillation.data_free
    assert config.distillation.latent_shape == (16, 128, 128)
    assert config.precision == "bfloat16"
    assert config.accumulation(1) == 1


def test_results_lie_beside_those_of_the_same_gpu() -> None:
    assert result_file("NVIDIA H200").parts[-3:] == ("results", "nvidia-h200", "full_size.json")
