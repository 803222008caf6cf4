"""The pipeline benchmark at the width of the real models, and the promise it makes for a machine of 16 GB."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.pipeline import FULL_DEPTH, main, pipeline_case


def results(folder: Path, *words: str) -> list[dict[str, Any]]:
    assert main([*words, "--json", str(folder / "pipeline.json")]) == 0
    return json.loads((folder / "pipeline.json").read_text())["pipelines"]


@pytest.mark.slow
def test_where_the_time_goes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (result,) = results(tmp_path, "--models", "qwen-image", "--blocks", "1", "--size", "64", "--nfe", "2")
    seconds = result["seconds"]
    assert 0 < seconds["network"] + seconds["policy"] + seconds["vae"] < seconds["total"]
    assert seconds["network"] < result["network_seconds_at_full_depth"] < 60 * seconds["network"]
    assert "of the network at full depth" in capfd.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("model", FULL_DEPTH)
def test_a_megapixel_fits_a_machine_of_16_gb(model: str, tmp_path: Path) -> None:
    (result,) = results(tmp_path, "--models", model, "--nfe", "4")
    assert result["peak_memory_bytes"] < 15e9
    assert result["policy_share_at_full_depth"] < 0.02


def test_a_step_that_is_picked_keeps_its_noise_levels() -> None:
    case, _ = pipeline_case("flux-2", "cpu", tiny=True)
    operation = case.builders[0](2)
    whole = operation.candidates["ours"](**operation.problem)
    assert not torch.equal(whole[0], whole[1])
    assert torch.equal(operation.candidates["ours"](**operation.samples(torch.tensor([1]))), whole[1:])
