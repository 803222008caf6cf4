"""What a run records: the console, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from piflow.training.config import WandbConfig
from piflow.training.errors import ConfigError
from piflow.training.logging import RunLogger

RED = Image.fromarray(np.full((4, 6, 3), (255, 0, 0), np.uint8))


def record(folder: Path, first: int, last: int, enabled: bool = True, wandb: WandbConfig | None = None) -> None:
    """Iterations first + 1 to last of 8, each second one due."""
    with RunLogger(folder / "tensorboard", 8, first, 2, enabled, wandb, {"seed": 7}) as logger:
        for done in range(first + 1, last + 1):
            logger.step(done, 1 / done, 2.0, 1e-3, {"time/policy": done / 10, "loss_sigma_0.00_0.25": done})
        logger.picture(last, "samples", RED)
        logger.scalars(last, {"eval/score": 3.0})


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    found = {tag: [(e.step, round(e.value, 6)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return found | {"images": [(e.step, e.width) for tag in events.Tags()["images"] for e in events.Images(tag)]}


def test_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, 0, 6)
    record(tmp_path, 4, 8)  # a resumed run; what came after 4 is written over
    found = read(tmp_path)
    assert found["train/loss"] == [(n, round(1 / n, 6)) for n in (2, 4, 6, 8)]
    assert found["time/policy"] == [(n, n / 10) for n in (2, 4, 6, 8)]
    assert found["train/loss_sigma_0.00_0.25"] == [(n, n) for n in (2, 4, 6, 8)]
    assert found["eval/score"] == [(8, 3.0)]
    assert found["images"] == [(8, 6)]
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in said] == ["2/8", "4/8", "6/8", "6/8", "8/8"]
    assert said[-1].endswith("0:00 left")


def test_other_ranks_record_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, 0, 8, enabled=False, wandb=WandbConfig(project="none"))
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_every_rank_knows_what_is_due(tmp_path: Path) -> None:
    for enabled in (True, False):
        with RunLogger(tmp_path, 7, 0, 3, enabled) as logger:
            assert [done for done in range(1, 8) if logger.is_due(done)] == [3, 6, 7]


def test_wandb_offline(tmp_path: Path) -> None:
    offline = WandbConfig(project="pi-flow", name="trial", mode="offline")
    record(tmp_path, 0, 4, wandb=offline)
    record(tmp_path, 4, 8, wandb=offline)
    run_id = (tmp_path / "wandb_run_id").read_text()
    runs = sorted(tmp_path.glob("wandb/offline-run-*"))
    assert len(runs) == 2
    assert all(f"-{run_id}" in run.name for run in runs)  # resumed; within one second folders get a number
    for run, steps in zip(runs, ((2, 4), (6, 8))):
        content = (run / f"run-{run_id}.wandb").read_bytes()
        for fact in ("pi-flow", "trial", "seed", "train/loss", "eval/score", *(json.dumps(1 / n) for n in steps)):
            assert fact.encode() in content
        assert len(list(run.glob("files/media/images/samples_*.png"))) == 1
    assert read(tmp_path)["eval/score"] == [(4, 3.0), (8, 3.0)]


def test_wandb_is_asked_for_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as Python marks what cannot be imported
    with pytest.raises(ConfigError, match=r"logging.wandb needs the wandb package: pip install 'piflow\[wandb\]'"):
        record(tmp_path, 0, 1, wandb=WandbConfig(project="pi-flow", mode="offline"))
