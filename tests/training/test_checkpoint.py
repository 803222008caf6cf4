"""Finding checkpoints: damaged ones are named, passed over or refused, and never deleted."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from piflow.training.checkpoint import (
    MANIFEST,
    check_fits,
    find_checkpoint,
    random_states,
    restore_random_states,
    verify,
    write_manifest,
)
from piflow.training.config import OptimizerConfig, StudentConfig, TrainConfig
from piflow.training.errors import CheckpointError
from piflow.training.loop import _folder_problem

CONFIG = TrainConfig.model_validate({"output_dir": "run", "iterations": 300})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good checkpoints of a few bytes, the newer one last."""
    for iteration in (100, 200):
        path = tmp_path / f"step_{iteration:06d}"
        (path / "engine").mkdir(parents=True)
        (path / "engine" / "shard.pt").write_bytes(bytes([iteration]) * 64)
        save_file({"ema.w": torch.full((3,), float(iteration))}, path / "rank_0.safetensors")
        facts = {"iteration": iteration, "position": 0, "world_size": 1, "config": CONFIG.model_dump(mode="json")}
        write_manifest(path, facts)
    (tmp_path / "latest").write_text("step_000200")
    return tmp_path


def damage(path: Path, how: str) -> None:
    shard = path / "engine" / "shard.pt"
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:10])
    elif how == "changed":
        shard.write_bytes(b"x" * 64)
    elif how == "missing":
        shard.unlink()
    elif how == "no manifest":
        (path / MANIFEST).unlink()
    else:
        manifest = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_bytes(BAD_MANIFESTS[how](manifest))


BAD_MANIFESTS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "no JSON": lambda manifest: b"{",
    "no text": lambda manifest: b"\xff\xfe",
    "files is a list": lambda manifest: json.dumps({**manifest, "files": [1]}).encode(),
    "a file is a number": lambda manifest: json.dumps({**manifest, "files": {"x": 3}}).encode(),
    "no files": lambda manifest: json.dumps({**manifest, "files": {}}).encode(),
    "no iteration": lambda manifest: json.dumps({"files": manifest["files"]}).encode(),
}
DAMAGES = {
    "truncated": r"engine/shard.pt has 10 bytes, not 64",
    "changed": r"engine/shard.pt has another content",
    "missing": r"engine/shard.pt is missing",
    "no manifest": r"manifest.json is missing",
    **dict.fromkeys(BAD_MANIFESTS, r"manifest.json cannot be read"),
}


@pytest.mark.parametrize("resume", ["auto", "latest"])
def test_newest_is_found(folder: Path, resume: str) -> None:
    assert find_checkpoint(folder, resume) == (folder / "step_000200", [])


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_is_passed_over_with_a_warning(folder: Path, how: str) -> None:
    damage(folder / "step_000200", how)
    before = sorted(folder.rglob("*"))
    path, warnings = find_checkpoint(folder, "latest")
    assert path == folder / "step_000100"
    assert len(warnings) == 1
    assert "step_000200" in warnings[0]
    with pytest.raises(CheckpointError, match=DAMAGES[how]):
        find_checkpoint(folder, str(folder / "step_000200"))
    assert sorted(folder.rglob("*")) == before


def test_all_damaged_is_an_error(folder: Path) -> None:
    damage(folder / "step_000100", "truncated")
    damage(folder / "step_000200", "missing")
    with pytest.raises(CheckpointError, match=r"shard.pt is missing.*has 10 bytes.*Restore the file from a copy"):
        find_checkpoint(folder, "auto")


def test_latest_pointer_is_obeyed_and_may_dangle(folder: Path) -> None:
    (folder / "latest").write_text("step_000100\n")
    assert find_checkpoint(folder, "latest")[0] == folder / "step_000100"
    (folder / "latest").write_text("step_000300")
    path, warnings = find_checkpoint(folder, "latest")
    assert path == folder / "step_000200"
    assert "step_000300" in warnings[0]


@pytest.mark.parametrize("text", [b"garbage", b"", b"..", b"step_\0", b"\xff\xfe", b"/", b"step_000100/engine"])
def test_latest_pointer_that_names_no_checkpoint_is_passed_over(folder: Path, text: bytes) -> None:
    (folder / "latest").write_bytes(text)
    path, warnings = find_checkpoint(folder, "auto")
    assert path == folder / "step_000200"
    assert len(warnings) == 1
    assert "latest names no checkpoint" in warnings[0]


def test_newest_is_a_number_not_a_text(folder: Path) -> None:
    (folder / "latest").unlink()
    (folder / "step_000200").rename(folder / "step_1000000")
    (folder / "step_000100").rename(folder / "step_999999")
    (folder / "step_x").mkdir()
    assert find_checkpoint(folder, "auto") == (folder / "step_1000000", [])


def test_another_configuration_is_named(folder: Path) -> None:
    path = folder / "step_000100"
    assert check_fits(path, CONFIG, 1) == []
    other = CONFIG.model_copy(update={"optimizer": OptimizerConfig(learning_rate=0.5), "iterations": 400})
    (warning,) = check_fits(path, other, 1)
    assert "iterations was 300, is 400; optimizer.learning_rate was 0.0001, is 0.5" in warning
    unfit = CONFIG.model_copy(update={"student": StudentConfig(num_gaussians=3), "precision": "bfloat16"})
    with pytest.raises(CheckpointError, match=r"student.num_gaussians was 8, is 3; precision was 'float32', is 'bf"):
        check_fits(path, unfit, 1)
    with pytest.raises(CheckpointError, match=r"written by 1 process\(es\), this run has 2\. Start it with 1"):
        check_fits(path, CONFIG, 2)


def test_nothing_there(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "none", "auto") == (None, [])
    assert find_checkpoint(tmp_path / "none", "never") == (None, [])
    with pytest.raises(CheckpointError, match="Leave out `--resume latest`"):
        find_checkpoint(tmp_path / "none", "latest")
    with pytest.raises(CheckpointError, match=r"There is no checkpoint .*elsewhere"):
        find_checkpoint(tmp_path, str(tmp_path / "elsewhere"))


def test_never_refuses_to_overwrite(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="already holds step_000200"):
        find_checkpoint(folder, "never")


def test_unfinished_checkpoints_are_not_candidates(folder: Path) -> None:
    (folder / "unfinished_step_000300").mkdir()
    assert find_checkpoint(folder, "auto")[0] == folder / "step_000200"


def test_intact_verifies(folder: Path) -> None:
    assert verify(folder / "step_000100") is None


def test_random_states_round_trip_through_safetensors(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), float(np.random.rand()), random.random()  # noqa: NPY002

    tensors, metadata = random_states()
    save_file(tensors, tmp_path / "rng.safetensors", metadata=metadata)
    expected = [draw() for _ in range(3)]
    with safe_open(tmp_path / "rng.safetensors", "pt") as file:
        restore_random_states({key: file.get_tensor(key) for key in file.keys()}, file.metadata())  # noqa: SIM118
    assert [draw() for _ in range(3)] == expected


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert _folder_problem(tmp_path / "new" / "checkpoints") is None
    assert str(tmp_path / "file") in (_folder_problem(tmp_path / "file" / "checkpoints") or "")
    assert list((tmp_path / "new" / "checkpoints").iterdir()) == []
