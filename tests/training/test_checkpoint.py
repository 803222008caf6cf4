"""Finding checkpoints: damaged ones are named, passed over or refused, and never deleted."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors import safe_open
from safetensors.torch import save_file

from piflow.training.checkpoint import (
    MANIFEST,
    CheckpointFolder,
    check_fits,
    check_shared,
    find_checkpoint,
    random_states,
    restore_random_states,
    superseded,
    verify,
    write_manifest,
)
from piflow.training.config import CheckpointConfig, OptimizerConfig, StudentConfig, TrainConfig, load_config
from piflow.training.errors import CheckpointError, ConfigError, TrainingError
from piflow.training.loop import _folder_problem
from piflow.training.storage import Remote, RunFolder
from tests.processes import time_limit

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


def test_another_number_of_processes_is_said(folder: Path) -> None:
    (warning,) = check_fits(folder / "step_000100", CONFIG, 2)
    assert "written by 1 process(es), this run has 2: an iteration takes 64 samples instead of 32" in warning
    assert "the data goes on at sample 0" in warning


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
    assert _folder_problem(RunFolder(tmp_path / "new" / "checkpoints")) is None
    assert str(tmp_path / "file") in (_folder_problem(RunFolder(tmp_path / "file" / "checkpoints")) or "")
    assert not (tmp_path / "new").exists()


# ---- which stay


@pytest.mark.parametrize(
    ("keep", "keep_every", "protected", "gone"),
    [
        (None, None, (), []),
        (None, 100, (), []),
        (2, None, (), [1, 2, 100, 150]),
        (2, 100, (), [1, 2, 150]),
        (1, None, (2, 200), [1, 100, 150]),
        (9, None, (), []),
    ],
)
def test_superseded(keep: int | None, keep_every: int | None, protected: tuple[int, ...], gone: list[int]) -> None:
    """350 is of an attempt that was given up; it is neither counted nor removed."""
    names = [f"step_{n:06d}" for n in (250, 1, 2, 100, 150, 200, 350)] + ["unfinished_step_000001", "latest"]
    config = CheckpointConfig(keep=keep, keep_every=keep_every)
    found = superseded(names, "step_000250", config, {f"step_{n:06d}" for n in protected})
    assert found == [f"step_{n:06d}" for n in gone]


@pytest.mark.parametrize("text", ["checkpoint_every: 7", "checkpoint: {every: 7}"])
def test_both_ways_to_say_how_often(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"output_dir: out\niterations: 1\n{text}\n")
    assert load_config(path).checkpoint == CheckpointConfig(every=7)
    assert load_config(path, ["checkpoint.keep=2"]).checkpoint == CheckpointConfig(every=7, keep=2)
    with pytest.raises(ConfigError, match=r"unknown key `checkpoint\.keeep`: did you mean `keep`"):
        load_config(path, ["checkpoint.keeep=2"])
    with pytest.raises(ConfigError, match=r"checkpoint\.keep: .* \(got 0\)"):
        load_config(path, ["checkpoint.keep=0"])


def write_step(path: Path, iteration: int) -> dict[str, Any]:
    """Files of a checkpoint, without a manifest; returns what is to be in it."""
    (path / "engine").mkdir(parents=True)
    (path / "engine" / "shard.pt").write_bytes(bytes([iteration % 256]) * 64)
    save_file({"ema.w": torch.full((3,), float(iteration))}, path / "rank_0.safetensors")
    return {"iteration": iteration, "position": 0, "world_size": 1, "config": CONFIG.model_dump(mode="json")}


def save_step(store: CheckpointFolder, iteration: int) -> None:
    """What rank 0 does once all shards are written."""
    unfinished = store.local / f"unfinished_step_{iteration:06d}"
    path = store.publish(unfinished, write_step(unfinished, iteration))
    store.upload(path)
    store.prune_remote(path, [])
    store.prune(path, [])


CHANGING = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "shutil.copyfile"}


def killed_before(operation: int, action: Callable[[], Any]) -> bool:
    """Act in a forked process that is gone before its n-th operation on files; whether it had so many."""
    child = os.fork()
    if child == 0:
        left = operation

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
            if writes or event in CHANGING:
                if left == 0:
                    os._exit(9)
                left -= 1

        sys.addaudithook(audit)
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_killed_before_any_file_operation(tmp_path: Path) -> None:
    seen: set[str] = set()
    for n in range(1000):
        local, url = tmp_path / f"{n}" / "local", f"file://{tmp_path}/{n}/remote"
        store = CheckpointFolder(local, Remote(url), CheckpointConfig(keep=1))
        local.mkdir(parents=True)
        save_step(store, 1)
        killed = killed_before(n, lambda store=store: save_step(store, 2))  # type: ignore[misc]

        again = CheckpointFolder(local, Remote(url), CheckpointConfig(keep=1))
        again.clean()
        path, warnings = again.find("auto")
        assert path is not None, f"nothing left when killed before operation {n}"
        assert not warnings or "copied" in warnings[0]
        assert verify(path) is None
        assert not [p for p in local.iterdir() if not p.name.startswith(("step_", "latest", "replaced_"))]
        shutil.rmtree(local)
        local.mkdir()
        elsewhere, _ = again.find("auto")
        assert elsewhere is not None, f"nothing at the URL when killed before operation {n}"
        seen |= {path.name, elsewhere.name}
        if not killed:
            assert (path.name, elsewhere.name) == ("step_000002", "step_000002")
            assert sorted(os.listdir(tmp_path / f"{n}" / "remote")) == ["latest", "step_000002"]
            break
        shutil.rmtree(tmp_path / f"{n}")
    assert n > 25
    assert seen == {"step_000001", "step_000002"}


@pytest.mark.parametrize("killed_again", [False, True])
def test_killed_while_the_only_step_is_written_again(tmp_path: Path, killed_again: bool) -> None:
    """It is moved aside for the new one, which may be killed in between, and so may the process that cleans up."""
    for n in range(100):
        store = CheckpointFolder(tmp_path / f"{n}")
        store.local.mkdir()
        save_step(store, 1)
        killed = killed_before(n, lambda store=store: save_step(store, 1))  # type: ignore[misc]
        for operation in range(4 if killed_again else 0):
            killed_before(operation, store.clean)
        store.clean()
        assert store.find("auto") == (store.local / "step_000001", []), f"killed before operation {n}"
        if not killed:
            break
    assert 8 < n < 99


def test_what_is_whole_is_found_though_killed_before_it_was_pointed_to(tmp_path: Path) -> None:
    """From the note `latest.next` on: one that a kill came after is gone on with, and not trained again."""
    for n in range(100):
        store = CheckpointFolder(tmp_path / f"{n}")
        store.local.mkdir()
        save_step(store, 1)
        killed = killed_before(n, lambda store=store: save_step(store, 2))  # type: ignore[misc]
        noted = (store.local / "latest.next").exists() or not killed
        store.clean()
        path, warnings = store.find("auto")
        assert (path, warnings) == (store.local / f"step_{1 + noted:06d}", [])
        assert (store.local / "latest").read_text() == f"step_{1 + noted:06d}"
        assert {p.name for p in store.local.iterdir()} <= {"latest", "step_000001", "step_000002"}
        if not killed:
            break
    assert 8 < n < 99


@pytest.mark.parametrize("text", ["", "step_000", "..", "step_000300"])
def test_a_note_that_names_nothing_is_dropped(folder: Path, text: str) -> None:
    (folder / "latest.next").write_text(text)
    CheckpointFolder(folder).clean()
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_000100", "step_000200"]
    assert find_checkpoint(folder, "auto") == (folder / "step_000200", [])


def test_one_resumed_from_stays_however_its_path_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "run", target_is_directory=True)
    store = CheckpointFolder(tmp_path / "run", config=CheckpointConfig(keep=1))
    for spelled in ("run/step_000001", "./link/../run/step_000001", "link/step_000001"):
        save_step(store, 1)
        unfinished = store.local / "unfinished_step_000002"
        path = store.publish(unfinished, write_step(unfinished, 2))
        store.prune(path, [Path(spelled)])
        assert verify(tmp_path / "run" / "step_000001") is None


def look_on_rank(rank: int, folder: Path, results: Any) -> None:
    """One of two processes, that have a folder in common and one each."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    said = []
    for mine in (folder / "common", folder / f"rank_{rank}"):
        try:
            check_shared(mine)
            said.append("")
        except CheckpointError as error:
            said.append(str(error))
    results[rank] = said
    dist.destroy_process_group()


def test_a_folder_that_not_all_machines_see_is_refused(tmp_path: Path) -> None:
    for name in ("common", "rank_0", "rank_1"):
        (tmp_path / name).mkdir()
    with torch.multiprocessing.Manager() as manager, time_limit(100):
        results = manager.dict()
        torch.multiprocessing.spawn(look_on_rank, (tmp_path, results), nprocs=2)
        first, second = results[0], results[1]
    assert first[0] == second[0] == ""
    for said in (first[1], second[1]):
        assert said.startswith("rank 1: does not see what rank 0 writes into ")
        assert "set output_dir or directories.checkpoints to one" in said
    assert not list(tmp_path.glob("*/*"))


# ---- at a URL


@pytest.fixture
def remote() -> Remote:
    return Remote(f"memory://{uuid.uuid4().hex}/run")


@pytest.mark.parametrize("resume", ["auto", "latest"])
def test_the_newest_is_found_here_or_there(tmp_path: Path, remote: Remote, resume: str) -> None:
    here, elsewhere = (CheckpointFolder(tmp_path / name, remote) for name in ("here", "elsewhere"))
    assert here.find("auto") == (None, [])
    save_step(here, 100)
    save_step(elsewhere, 200)
    path, messages = here.find(resume)
    assert path == tmp_path / "here" / "step_000200"
    assert messages == [f"copied {remote}/step_000200 to {path}"]
    assert verify(path) is None
    assert here.find(resume) == (path, [])
    here.remote = None
    save_step(here, 300)
    here.remote = remote
    newest = tmp_path / "here" / "step_000300"
    assert here.find(resume) == (newest, [f"copied {newest} to {remote}"])
    assert here.find(resume) == (newest, [])
    assert elsewhere.find(resume)[0] == tmp_path / "elsewhere" / "step_000300"
    with pytest.raises(CheckpointError, match="already holds step_000300"):
        elsewhere.find("never")


def test_a_damaged_copy_is_passed_over(tmp_path: Path, remote: Remote) -> None:
    store = CheckpointFolder(tmp_path / "here", remote)
    save_step(store, 100)
    save_step(store, 200)
    remote.fs.pipe_file(f"{remote.root}/step_000200/engine/shard.pt", b"x" * 64)
    shutil.rmtree(tmp_path / "here")
    path, messages = store.find("auto")
    assert path == tmp_path / "here" / "step_000100"
    assert len(messages) == 2
    assert "step_000200 is passed over: " in messages[0]
    assert "engine/shard.pt has another content" in messages[0]
    assert [p.name for p in store.local.iterdir() if p.is_dir()] == ["step_000100"]


def test_a_damaged_one_here_is_replaced_by_its_copy(tmp_path: Path, remote: Remote) -> None:
    store = CheckpointFolder(tmp_path / "here", remote)
    save_step(store, 100)
    damage(tmp_path / "here" / "step_000100", "truncated")
    path, _ = store.find("auto")
    assert path == tmp_path / "here" / "step_000100"
    assert verify(path) is None
    assert (tmp_path / "here" / "replaced_step_000100.1").is_dir()


def test_an_unfinished_copy_is_none_and_is_cleaned_up(tmp_path: Path, remote: Remote, monkeypatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    store = CheckpointFolder(tmp_path / "here", remote)
    save_step(store, 100)
    write_step(tmp_path / "step_000200", 200)
    with pytest.raises(TrainingError, match=r"cannot take a copy of .*manifest\.json"):
        remote.upload(tmp_path / "step_000200", last=MANIFEST)  # it has no manifest: killed before it came
    assert remote.exists("step_000200/engine/shard.pt")
    store.clean()
    assert remote.folders() == ["step_000100"]
    shutil.rmtree(store.local)
    assert store.find("auto")[0] == tmp_path / "here" / "step_000100"


def test_retention_here_and_there(tmp_path: Path, remote: Remote) -> None:
    store = CheckpointFolder(tmp_path / "here", remote, CheckpointConfig(keep=2, keep_every=200))
    for iteration in range(100, 700, 100):
        save_step(store, iteration)
    expected = [f"step_{n:06d}" for n in (200, 400, 500, 600)]
    assert sorted(p.name for p in store.local.glob("*_*")) == expected
    assert remote.folders() == expected
    assert remote.read("latest") == b"step_000600"
