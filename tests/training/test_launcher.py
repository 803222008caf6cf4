"""The real deepspeed launcher with two CPU (or GPU) ranks. Each start checks as much as it can."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file

from piflow.models import GMDiTTransformer2DModelV2
from piflow.models.adapter_files import WEIGHTS
from piflow.models.export import export_checkpoint
from piflow.training.checkpoint import MANIFEST, read_manifest, write_manifest
from piflow.training.errors import CheckpointError, TrainingError
from piflow.training.launch import launch_module, launch_training, launcher_command, launcher_environment
from piflow.training.signals import ranks_below
from tests.processes import no_shared_memory_left, time_limit

pytestmark = pytest.mark.launcher


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    with time_limit(240), no_shared_memory_left():
        yield


@contextlib.contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process in its own session, of which nothing is left at the end."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **options
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


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
def report(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("checks")
    with time_limit(240), no_shared_memory_left():
        launch_module(["tests.training.launcher_checks", str(folder), str(teacher)], num_processes=2)
    return {"folder": folder, **json.loads((folder / "report.json").read_text())}


def test_loss_and_gradient_norm_equal_a_plain_loop(report: dict[str, Any]) -> None:
    assert report["world_size"] == 2
    assert report["losses"] == pytest.approx(report["expected_losses"], rel=1e-6)
    assert report["norms"] == pytest.approx(report["expected_norms"], rel=1e-5)
    assert report["norms"][0] == pytest.approx(report["expected_norms"][0], rel=1e-6)


def test_gradient_checkpointing_is_the_same_run(report: dict[str, Any]) -> None:
    losses, norms = zip(*report["checkpointed"])
    assert losses == pytest.approx(report["expected_losses"][:3], rel=1e-6)
    assert norms == pytest.approx(report["expected_norms"][:3], rel=1e-5)


def test_parameter_trace_is_never_invalidated(report: dict[str, Any]) -> None:
    assert report["trace_complete"]
    assert report["invalidations"] == 0


def test_resume_is_exact_to_the_bit(report: dict[str, Any]) -> None:
    assert report["verify"] is None
    assert report["resume_messages"][-1].endswith("step_000003 at iteration 3")
    assert report["position"] == 3 * 2 * 4
    assert report["resume_exact"]
    assert report["resume_ema_exact"]


def test_exported_average_equals_a_hand_built_one(report: dict[str, Any]) -> None:
    assert report["ema_difference"] < 1e-6
    assert report["same_parameters"]
    # Against the plain loop, AdamW makes whole steps out of gradients that are rounding error (the key biases').
    assert report["export_difference"] < 2e-4
    student = GMDiTTransformer2DModelV2.from_pretrained(report["folder"] / "run" / "student")
    assert student(torch.zeros(1, 1, 8, 8), 500.0, torch.tensor([3])).means.shape == (1, 4, 1, 8, 8)


def test_a_checkpoint_exports_the_average_or_the_raw_weights_to_the_bit(report: dict[str, Any], tmp_path: Path) -> None:
    run = report["folder"] / "run"
    averaged, raw = load_file(run / "student" / WEIGHTS), load_file(report["folder"] / "raw.safetensors")
    with pytest.raises(ValueError, match=r"in pickled files, which can run code.*--allow-pickle"):
        export_checkpoint(run, tmp_path / "raw", ema=False)
    for name, expected in {"averaged": averaged, "raw": raw}.items():
        folder = export_checkpoint(run, tmp_path / name, ema=name == "averaged", allow_pickle=name == "raw")
        weights = load_file(folder / WEIGHTS)
        assert weights.keys() >= expected.keys()
        assert all(torch.equal(weights[key], value) for key, value in expected.items())
        _, found = GMDiTTransformer2DModelV2.from_pretrained(folder, output_loading_info=True)
        assert not any(found.values())
    assert not any(torch.equal(averaged[key], value) for key, value in raw.items() if value.dim() > 1)


def test_code_in_a_checkpoint_is_not_run(report: dict[str, Any], tmp_path: Path) -> None:
    copied = shutil.copytree(report["folder"] / "run" / "checkpoints" / "step_000006", tmp_path / "step_000006")
    states = next((copied / "engine").glob("*optim_states.pt"))
    torch.save({**torch.load(states, weights_only=False), "code": Touch(tmp_path / "run_by_pickle")}, states)
    facts = read_manifest(copied).model_dump(exclude={"files"})
    (copied / MANIFEST).unlink()
    write_manifest(copied, facts)
    with pytest.raises(CheckpointError, match="engine holds other things than weights, which can run code"):
        export_checkpoint(copied, tmp_path / "out", ema=False, allow_pickle=True)
    assert not (tmp_path / "run_by_pickle").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


class Touch:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_loss_that_is_not_finite_ends_every_rank(report: dict[str, Any]) -> None:
    first, second = report["nan_messages"]
    assert first == second
    assert first.startswith("2 iterations in a row were skipped. The loss of rank 1 is nan at iteration 10; nothing")
    assert "Lower optimizer.learning_rate" in first
    assert re.search(r"Then go on with --resume \S+/checkpoints/step_000003, or start again in another", first)
    assert report["nan_unchanged"]
    assert report["nan_files_untouched"]


def test_a_nan_on_one_rank_skips_the_step_on_every_rank(report: dict[str, Any]) -> None:
    assert report["skipped_messages"] == [""] * 4
    assert report["skipped_unchanged"] == [True, True]
    assert report["skipped"] == [1, 1, 7]
    assert all(map(math.isfinite, report["step_after_a_skip"]))
    assert report["moved_after_a_skip"]


def test_weights_that_are_not_finite_are_neither_saved_nor_exported(report: dict[str, Any]) -> None:
    for first, second in report["broken_average_messages"]:
        assert first == second
        assert first.startswith("The student's weights are not finite at iteration 9; nothing was saved of it.")
    assert report["nan_files_untouched"]


def write_config(folder: Path, teacher: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(
        f"output_dir: {folder / 'run'}\niterations: 100000\nbatch_size_per_rank: 4\nlog_every: 1\n"
        f"teacher: {{path: {teacher}}}\nstudent: {{num_gaussians: 2}}\ndistillation: {{total_substeps: 8}}\n"
    )
    return path


def losses_of(lines: list[str]) -> dict[int, str]:
    return {int(m[1]): m[2] for line in lines if (m := re.match(r"(\d+)/\d+ \| loss ([\d.]+)", line))}


def test_sigterm_saves_and_the_run_goes_on(teacher: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, teacher)
    script = (
        "import sys\nfrom piflow.training.errors import Interrupted\n"
        "from piflow.training.launch import launch_training\n"
        f"try: launch_training({str(config)!r})\n"
        "except Interrupted as error: sys.exit(error.exit_code)"
    )
    lines: list[str] = []
    with started([sys.executable, "-u", "-c", script]) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith("3/"):
                process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
    stopped = max(losses_of(lines))
    output = "\n".join(lines)
    assert f"stopped by SIGTERM after iteration {stopped}" in output
    assert f"--module piflow.train {config} --resume latest" in output
    checkpoint = tmp_path / "run" / "checkpoints" / f"step_{stopped:06d}"
    assert checkpoint.is_dir()

    resumed: list[str] = []
    launch_training(config, [f"iterations={stopped + 2}"], resume="latest", on_line=resumed.append)
    assert any(f"resumed from {checkpoint} at iteration {stopped}" in line for line in resumed)
    assert any(f"iterations was 100000, is {stopped + 2}" in line for line in resumed)
    assert sorted(losses_of(resumed)) == [stopped + 1, stopped + 2]
    assert (tmp_path / "run" / "student" / "diffusion_pytorch_model.safetensors").is_file()
    assert any((tmp_path / "run" / "tensorboard").iterdir())

    shard = checkpoint / "rank_1.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    files = sorted(p for p in (tmp_path / "run").rglob("*"))
    refused: list[str] = []
    with pytest.raises(TrainingError, match="exit code 3"):
        launch_training(config, resume=str(checkpoint), on_line=refused.append)
    said = [line for line in refused if line.startswith("piflow.train: ")]
    assert len(said) == 1
    assert "rank_1.safetensors has 100 bytes" in said[0]
    assert "Traceback" not in "\n".join(refused)
    assert sorted(p for p in (tmp_path / "run").rglob("*")) == files


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_bare_launcher_killed_alone_saves_too(teacher: Path, tmp_path: Path, number: signal.Signals) -> None:
    """`kill PID` of the `deepspeed` command reaches no rank by itself: they notice that it is gone, save and stop."""
    command = launcher_command(["piflow.train", str(write_config(tmp_path, teacher))], 2)
    lines: list[str] = []
    with started(command, env=launcher_environment()) as process:
        assert process.stdout is not None
        for line in process.stdout:  # ends when the last rank has closed its end
            lines.append(line.rstrip("\n"))
            if line.startswith("3/"):
                process.send_signal(number)
                process.wait()
            assert not line.startswith("100/"), "the ranks run on without their launcher"
    stopped = max(losses_of(lines))
    assert f"stopped by SIGTERM after iteration {stopped}" in "\n".join(lines)
    assert (tmp_path / "run" / "checkpoints" / f"step_{stopped:06d}" / "manifest.json").is_file()


def test_the_whole_tree_stopped_with_data_workers_saves_too(teacher: Path, tmp_path: Path) -> None:
    """As the launcher does: SIGTERM to every process below it, the data workers among them."""
    command = launcher_command(["piflow.train", str(write_config(tmp_path, teacher)), "data.workers=1"], 2)
    lines: list[str] = []
    with started(command, env=launcher_environment()) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith("3/"):
                below = [child for rank in ranks_below(process.pid) for child in (rank, *rank.children())]
                assert len(below) >= 4
                for child in below:
                    child.send_signal(signal.SIGTERM)
        assert process.wait() == 143
    output = "\n".join(lines)
    stopped = max(losses_of(lines))
    assert f"stopped by SIGTERM after iteration {stopped}" in output
    assert "data.workers=1 --resume latest" in output
    assert "Traceback" not in output
    assert (tmp_path / "run" / "checkpoints" / f"step_{stopped:06d}" / "manifest.json").is_file()


def test_a_mistyped_key_is_one_message(teacher: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(TrainingError, match=r"did you mean `learning_rate`"):
        launch_training(write_config(tmp_path, teacher), ["optimizer.learnin_rate=1"], on_line=lines.append)
    assert sum("piflow.train: " in line for line in lines) == 1
    assert "Traceback" not in "\n".join(lines)
    assert not (tmp_path / "run").exists()
