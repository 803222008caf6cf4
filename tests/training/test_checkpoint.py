"""Finding checkpoints: damaged ones are named, passed over or refused, and never deleted."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from piflow.training.checkpoint import (
    MANIFEST,
    find_checkpoint,
    random_states,
    restore_random_states,
    verify,
    write_manifest,
)
from piflow.training.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good checkpoints of a few bytes, the newer one last."""
    for iteration in (100, 200):
        path = tmp_path / f"step_{iteration:06d}"
        (path / "engine").mkdir(parents=True)
        (path / "engine" / "shard.pt").write_bytes(bytes([iteration]) * 64)
        save_file({"ema.w": torch.full((3,), float(iteration))}, path / "rank_0.safetensors")
        write_manifest(path, {"iteration": iteration, "position": 0, "world_size": 1})
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
        (path / MANIFEST).write_text("{")


DAMAGES = {
    "truncated": r"engine/shard.pt has 10 bytes, not 64",
    "changed": r"engine/shard.pt has another content",
    "missing": r"engine/shard.pt is missing",
    "no manifest": r"manifest.json is missing",
    "bad manifest": r"manifest.json cannot be read",
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
