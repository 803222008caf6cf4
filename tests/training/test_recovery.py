"""Runs that are killed, moved to another number of processes, or out of disk, under the real deepspeed launcher."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel

from piflow.training.checkpoint import STEP, find_checkpoint, read_manifest, step_of
from piflow.training.launch import launch_module, launch_training, launcher_command, launcher_environment
from piflow.training.signals import ranks_below
from tests.processes import no_shared_memory_left, time_limit

pytestmark = pytest.mark.launcher


@pytest.fixture(autouse=True)
def limited(request: pytest.FixtureRequest) -> Iterator[None]:
    with time_limit(1500 if request.node.get_closest_marker("long") else 300), no_shared_memory_left():
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny digits teacher with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, num_layers=2, sample_size=8, num_embeds_ada_norm=10
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reports(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Two ranks, then one without the first one's local folder, then two."""
    folder = tmp_path_factory.mktemp("checks")
    for stage, processes in (("first", 2), ("fewer", 1), ("more", 2)):
        with time_limit(200), no_shared_memory_left():
            launch_module(["tests.training.checkpoint_checks", str(folder), str(teacher), stage], processes)
        if stage == "first":
            shutil.rmtree(folder / "run")
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_the_average_swapped_in_is_the_average_and_out_is_exact(reports: dict[str, Any]) -> None:
    swap = reports["first"]["all"]["swap"]
    assert swap["in_exact"]
    assert swap["difference"] <= 1e-2 < swap["effect"]  # bfloat16 of a plain student with the same weights
    assert swap["out_exact"]
    assert swap["shards_exact"]
    assert swap["output_exact"]


def test_a_full_disk_is_one_message_and_nothing_is_lost(reports: dict[str, Any]) -> None:
    disk = reports["first"]["all"]["disk"]
    for full, (first, second) in zip((1, 0), disk["messages"]):
        for message in (first, second):
            assert re.search(rf"step_000004 could not be written: rank {full}: .*\S", message)
            assert "The last good one is step_000003." in message
            assert "let fewer stay with checkpoint.keep; then run the same command again" in message
    assert disk["untouched"]
    assert disk["leftovers"] == []
    assert reports["first"]["all"]["verify"] is None  # with room again, the next one is written


def test_a_url_that_fails_ends_only_the_last_save_and_nothing_is_lost(reports: dict[str, Any]) -> None:
    storage = reports["first"]["all"]["storage"]
    for first, second in storage["said"]:
        assert first == ""
        assert re.search(r"^file://\S+/remote cannot take a copy of \S+/step_000004: \w+", second)
    assert storage["verify"] is None
    assert storage["here"] == ["latest", "replaced_step_000004.1", "step_000003", "step_000004"]
    assert storage["before"] == storage["after"] == ["latest", "step_000003"]


def test_skipped_iterations_are_counted_on_after_a_resume(reports: dict[str, Any]) -> None:
    assert reports["more"]["lora"]["skipped"] == [1, 1]


@pytest.mark.parametrize("kind", ["all", "lora"])
@pytest.mark.parametrize(("stage", "sizes"), [("fewer", (2, 1)), ("more", (1, 2))])
def test_another_number_of_processes(reports: dict[str, Any], kind: str, stage: str, sizes: tuple[int, int]) -> None:
    """Weights, master weights, both moments, step counts and average: the same bits."""
    report = reports[stage][kind]
    assert report["different"] == []
    assert report["compared"] > 100
    assert report["scratch"] == []
    said = f"was written by {sizes[0]} process(es), this run has {sizes[1]}: an iteration takes "
    assert any(said in message for message in report["messages"])
    assert report["verify"] is None
    if kind == "all":
        assert report["progress"] == {"fewer": 4 * 8, "more": 4 * 8 + 3 * 4}[stage]


@pytest.mark.parametrize("kind", ["all", "lora"])
def test_what_is_frozen_is_not_saved(reports: dict[str, Any], kind: str) -> None:
    assert reports["first"][kind]["frozen"] > 10
    assert reports["first"][kind]["frozen_saved"] == 0


def test_resumed_from_a_url(reports: dict[str, Any]) -> None:
    assert re.match(r"copied file://\S+/remote/step_000004 to \S+/step_000004", reports["fewer"]["all"]["messages"][0])
    for stage, kept in (("first", (3, 4)), ("fewer", (4, 7)), ("more", (7, 10))):  # the last good one stays too
        names = ["latest", *(f"step_{n:06d}" for n in kept)]
        assert reports[stage]["all"]["kept"] == reports[stage]["all"]["kept_remotely"] == names


# ---- kill -9


def write_config(folder: Path, teacher: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(
        f"output_dir: {folder / 'run'}\niterations: 100000\nbatch_size_per_rank: 4\nlog_every: 1\n"
        f"teacher: {{path: {teacher}}}\nstudent: {{num_gaussians: 2}}\n"
        "distillation: {total_substeps: 8, policy_dropout: 0.2}\ncheckpoint: {every: 1}\n"
    )
    return path


def kill_one_run(config: Path, victim: str, delay: float) -> list[str]:
    """Start, kill `victim` so many seconds after the first iteration, wait for the end; returns the output."""
    lines: list[str] = []
    process = subprocess.Popen(
        launcher_command(["piflow.train", str(config)], 2), env=launcher_environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if re.match(r"\d+/\d+ \|", line):
                break
        ranks = {f"rank {cmdline_rank(rank)}": rank for rank in ranks_below(process.pid)}
        time.sleep(delay)
        killed_at = time.monotonic()
        if victim == "everything":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            ranks[victim].kill()
        lines += process.stdout.read().splitlines()  # ends when no process is left
        process.wait()
        assert time.monotonic() - killed_at < 60
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode != 0
    if victim != "everything":
        said = [line for line in lines if "piflow.train: " in line]
        assert len(said) == 1, "\n".join(lines)
        assert f"{victim} has died" in said[0]
        assert "run the same command again to go on from the last checkpoint" in said[0]
    return lines


def cmdline_rank(process: Any) -> int:
    (option,) = (word for word in process.cmdline() if word.startswith("--local_rank="))
    return int(option.partition("=")[2])


def reached(lines: list[str]) -> int:
    return max(int(m[1]) for line in lines if (m := re.match(r"(\d+)/\d+ \|", line)))


def losses(folder: Path) -> dict[int, str | None]:
    """In hexadecimal, by iteration."""
    paths = [path for path in (folder / "checkpoints").iterdir() if STEP.fullmatch(path.name)]
    return {step_of(path.name): read_manifest(path).loss for path in paths}


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_moments(teacher: Path, tmp_path: Path, kills: int) -> None:
    """Whatever was killed and when, the next start finds a good checkpoint, and the losses are those of a quiet run."""
    moments = random.Random()
    config, folder = write_config(tmp_path, teacher), tmp_path / "run"
    last = 0
    for n in range(kills):
        victim, delay = ("rank 1", "everything", "rank 0")[n % 3], moments.uniform(0, 1.5)
        lines = kill_one_run(config, victim, delay)
        path, warnings = find_checkpoint(folder / "checkpoints", "auto")
        assert path is not None, f"{victim} killed {delay} s after the first iteration"
        assert warnings == []
        assert step_of(path.name) >= max(reached(lines) - 1, last)  # an iteration is shown before it is saved
        assert not last or any(f"resumed from {folder}/checkpoints/step_{last:06d} " in line for line in lines)
        last = step_of(path.name)

    launch_training(config, [f"iterations={last + 2}"])
    quiet = tmp_path / "quiet"
    launch_training(config, [f"output_dir={quiet}", f"iterations={last + 2}"])
    assert losses(folder) == losses(quiet)
    assert sorted(losses(quiet)) == list(range(1, last + 3))
    assert not [p for p in (folder / "checkpoints").iterdir() if p.name.startswith(("unfinished", "removed"))]
