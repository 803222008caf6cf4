"""The plan of a run against what the run's tensors take, and against the published arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

from piflow.cli import app
from piflow.training.advice import with_values
from piflow.training.config import TrainConfig, load_config
from piflow.training.errors import ConfigError
from piflow.training.launch import launch_module
from piflow.training.plan import Plan, memory_plan, with_published_size
from piflow.training.workload import LiveBytes
from tests.processes import no_shared_memory_left, time_limit

WIDE_DIT = {
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 1,
    "num_layers": 6,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
}
WIDE_QWEN = {
    "num_layers": 8,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "joint_attention_dim": 32,
    "axes_dims_rope": [8, 12, 12],
    "in_channels": 16,
    "out_channels": 4,
}
BLOCK = 600_000  # parameters of its blocks
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
QWEN = {
    "output_dir": "runs",
    "iterations": 1,
    "batch_size_per_rank": 2,
    "precision": "bfloat16",
    "teacher": {"kind": "qwen_image", "random": {}},
    "student": {"gradient_checkpointing": True, "lora": {"rank": 256, "targets": [*ATTENTION, "img_mlp.net.2"]}},
    "distillation": {"data_free": True, "nfe": 4, "latent_shape": [16, 128, 128], "guidance_scale": 4.0},
    "data": {"kind": "random", "random": {"prompt_length": 256, "prompt_width": 3584}},
}


def write_configs(folder: Path) -> None:
    """The digits student; a wider DiT with checkpoints; LoRA on a Qwen-Image that is gathered block by block."""
    common = {"iterations": 9, "student": {"num_gaussians": 2}, "distillation": {"total_substeps": 8}}
    digits = yaml.safe_load((Path(__file__).parents[2] / "configs/digits/nfe2.yaml").read_text())
    digits["zero"] |= {"reduce_bucket_size": 100_000}
    wide = {
        **common,
        "batch_size_per_rank": 4,
        "teacher": {"kind": "dit", "random": WIDE_DIT},
        "student": {"num_gaussians": 2, "gradient_checkpointing": True},
        "zero": {"max_reuse_distance": 10**9, "reduce_bucket_size": 1_000_000},
    }
    lora = {
        **common,
        "batch_size_per_rank": 2,
        "precision": "bfloat16",
        "teacher": {"kind": "qwen_image", "random": WIDE_QWEN},
        "student": {"num_gaussians": 2, "gradient_checkpointing": True, "lora": {"rank": 16, "targets": ATTENTION}},
        "distillation": {"total_substeps": 8, "data_free": True, "nfe": 2, "latent_shape": [4, 16, 16]},
        "data": {"kind": "random", "random": {"prompt_length": 16, "prompt_width": 32}},
        "zero": {"max_live_parameters": 3 * BLOCK, "prefetch_bucket_size": BLOCK, "reduce_bucket_size": 100_000},
    }
    for name, config in {"digits": digits, "wide": wide, "lora": lora}.items():
        config["output_dir"] = str(folder / name)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.launcher
def test_planned_bytes_are_those_of_the_runs(tmp_path: Path) -> None:
    """Item by item and the peak of all, on each of two ranks, within 15%; what is only counted, to the padding."""
    write_configs(tmp_path)
    with time_limit(600), no_shared_memory_left():
        launch_module(["tests.training.plan_checks", str(tmp_path)], num_processes=2)
    ranks = json.loads((tmp_path / "report.json").read_text())
    assert len(ranks) == 2
    for name in ("digits", "wide", "lora"):
        plan = memory_plan(load_config(tmp_path / f"{name}.yaml"), 2, 80e9, prompt_tokens=16)
        planned = {item.name: item.bytes for item in plan.items}
        for rank in ranks:
            measured = rank[name]
            assert planned["activations"] > plan.work.held
            assert 0 < measured["communication"] < 60
            assert plan.work.held == pytest.approx(measured["saved"], rel=0.15)
            assert planned["gathered"] == pytest.approx(measured["gathered"], rel=0.15)
            assert plan.peak == pytest.approx(measured["peak"], rel=0.15)
            for item in ("base", "trainable", "optimiser", "gradients", "ema"):
                assert planned[item] == pytest.approx(measured[item], rel=0.001)


@pytest.mark.slow
def test_full_size_agrees_with_the_arithmetic() -> None:
    """P parameters frozen, T trained, 8 GPUs, 2 images of 1024^2 on each; gigabytes by arithmetic."""
    plan = memory_plan(TrainConfig.model_validate(QWEN), 8, 141e9)
    p, t = plan.counts.base, plan.counts.trainable
    gigabytes = {item.name: item.bytes / 1e9 for item in plan.items}
    assert p == pytest.approx(20.43e9, rel=0.001)
    assert gigabytes["base"] == pytest.approx(2e-9 * p / 8, rel=0.001)
    assert gigabytes["trainable"] == pytest.approx(2e-9 * t / 8, rel=0.001)
    assert gigabytes["optimiser"] == pytest.approx(12e-9 * t / 8, rel=0.001)
    assert gigabytes["gradients"] + gigabytes["ema"] == pytest.approx(8e-9 * t / 8, rel=0.001)
    assert gigabytes["gathered"] == 2
    inputs_of_blocks = 2e-9 * 2 * (4096 + 256) * 3072 * 60
    assert inputs_of_blocks < plan.work.held / 1e9 < 1.1 * inputs_of_blocks  # the rest: what the output layers hold
    segments = 4
    assert plan.flops / segments == pytest.approx(1.1e15, rel=0.1)
    passes = 4 * 2 * p + 2 * 2 * t  # student forward and backward, the teacher twice, without low-rank updates
    assert plan.traffic / segments == pytest.approx(7 / 8 * (passes + 4 * t), rel=0.01)
    assert plan.fits


@pytest.mark.slow
def test_what_does_not_fit_gets_advice_that_fits() -> None:
    small = {**QWEN["teacher"], "random": {**WIDE_QWEN, "num_layers": 2}}
    config = TrainConfig.model_validate({
        **QWEN,
        "teacher": small,
        "student": {"lora": {"rank": 16, "targets": ATTENTION}, "gradient_checkpointing": True},
        "data": {"kind": "random", "random": {"prompt_length": 16, "prompt_width": 32}},
        "distillation": {**QWEN["distillation"], "latent_shape": [4, 16, 16]},
    })  # fmt: skip
    whole = memory_plan(config, 2, 1e12)
    assert whole.fits
    assert whole.changes == ()
    tight = memory_plan(config, 2, whole.needed - 1)
    assert not tight.fits
    assert any(change.startswith("zero.reduce_bucket_size=") and change.endswith("fits") for change in tight.changes)
    assert any(change.startswith("batch_size_per_rank=1: ") for change in tight.changes)
    assert any(change.startswith("4 GPUs: ") for change in tight.changes)
    saved = [float(change.split(": ")[1].split(" GB")[0]) for change in tight.changes if change.endswith(", fits")]
    assert saved == sorted(saved, reverse=True)
    for change in tight.changes:
        assert follow(config, change, whole.needed - 1).fits == change.endswith(", fits")

    least = min(follow(config, change, 1e12).needed for change in tight.changes)
    first, *alone = memory_plan(config, 2, least - 1).changes
    assert follow(config, first, least - 1).fits
    assert first.endswith(", fits")
    assert len(first.split(": ")[0].split()) > 1
    assert all(change.endswith("not enough alone") for change in alone)
    hopeless = memory_plan(config, 2, 1.0).changes
    assert all(change.endswith("not enough alone") for change in hopeless)


def follow(config: TrainConfig, change: str, gpu_memory: float) -> Plan:
    """The plan after doing what a line of advice says."""
    gpus, values = 2, {}
    for word in change.split(": ")[0].removesuffix(" GPUs").split():
        name, found, value = word.partition("=")
        if found:
            values[name] = yaml.safe_load(value)
        elif word != "on":
            gpus = int(word)
    return memory_plan(with_values(config, values), gpus, gpu_memory, advise=False)


def test_the_batch_is_made_as_small_as_needed(tmp_path: Path) -> None:
    write_configs(tmp_path)
    config = load_config(tmp_path / "lora.yaml", ["batch_size=48", "batch_size_per_rank=12"])
    third = memory_plan(with_values(config, {"batch_size_per_rank": 4}), 2, 1e12)
    changes = memory_plan(config, 2, third.needed + 1).changes
    assert any(change.startswith("batch_size_per_rank=4: ") and change.endswith("fits") for change in changes)


@pytest.mark.parametrize("recipe", ["qwen_image/gm_4nfe", "flux/dx_8nfe", "flux2/gm_4nfe", "imagenet/dit_2nfe"])
def test_a_run_is_planned_before_its_teacher_is_there(recipe: str) -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / f"{recipe}.yaml", ["teacher.path=nowhere"])
    sized, note = with_published_size(config)
    assert note.startswith("There is no teacher in nowhere: planned for a ")
    assert sized.teacher.path is None
    assert sized.teacher.random == ({"guidance_embeds": True} if "flux" in recipe else {})
    assert with_published_size(sized) == (sized, "")


def test_a_teacher_whose_files_are_there_is_read(tmp_path: Path) -> None:
    raw = {**QWEN, "teacher": {"kind": "qwen_image", "path": str(tmp_path)}}
    config = TrainConfig.model_validate(raw)
    assert with_published_size(config) == (config, "")
    with pytest.raises(ConfigError, match=r"no readable config\.json"):
        memory_plan(config, 2, 80e9)


@pytest.mark.parametrize(("gpus", "memory"), [(0, 80e9), (2, 0.0), (2, float("nan"))])
def test_a_plan_without_gpus_or_memory_is_refused(tmp_path: Path, gpus: int, memory: float) -> None:
    with pytest.raises(ConfigError, match="at least one GPU with some memory"):
        memory_plan(variant(tmp_path), gpus, memory)


def variant(folder: Path, **sections: Any) -> TrainConfig:
    write_configs(folder)
    raw = yaml.safe_load((folder / "wide.yaml").read_text())
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    return TrainConfig.model_validate(raw)


def test_settings_have_the_effect_that_they_have(tmp_path: Path) -> None:
    def items(config: TrainConfig, gpus: int = 2) -> dict[str, int]:
        return {item.name: item.bytes for item in memory_plan(config, gpus, 80e9).items}

    base = items(variant(tmp_path))
    kept = items(variant(tmp_path, student={"gradient_checkpointing": False}))
    assert kept["activations"] > 1.2 * base["activations"]
    eight = items(variant(tmp_path, optimizer={"kind": "adamw_8bit"}))
    assert eight["optimiser"] / base["optimiser"] == pytest.approx((4 + 2 + 8 / 256) / 12, rel=0.001)
    resident = variant(tmp_path, zero={"max_reuse_distance": 0, "param_persistence_threshold": 10**9})
    assert items(resident)["gathered"] == base["gathered"]
    assert items(resident, 1)["gathered"] == 0
    assert memory_plan(resident, 2, 80e9).traffic < memory_plan(variant(tmp_path), 2, 80e9).traffic
    assert memory_plan(variant(tmp_path, precision="bfloat16"), 2, 80e9).counts.itemsize == 2


def test_a_run_is_planned_before_its_data_are_cached() -> None:
    teacher = {"kind": "qwen_image", "random": {**WIDE_QWEN, "num_layers": 2}}
    raw = {**QWEN, "teacher": teacher, "student": {"gradient_checkpointing": True}}
    raw["distillation"] = {**QWEN["distillation"], "latent_shape": [4, 16, 16]}
    cached = {**raw, "data": {"kind": "prompts", "path": "nowhere"}}
    made_up = {**raw, "data": {"kind": "random", "random": {"prompt_width": 32, "prompt_length": 9}}}
    first, second = (memory_plan(TrainConfig.model_validate(config), 4, 80e9) for config in (cached, made_up))
    assert first == second


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size=8 does not divide"):
        memory_plan(variant(tmp_path, batch_size=8), 3, 80e9)


def test_live_bytes_counts_what_lives() -> None:
    layer = nn.Linear(64, 64, bias=False)
    x = torch.zeros(16, 64)
    with LiveBytes((x, list(layer.parameters()))) as live:
        view = layer.weight.t()
        assert live.now == 0
        y = layer(x)
        z = y + 1
        assert live.now == 2 * 16 * 64 * 4
        del y, z, view
        assert live.now == 0
        assert live.peak == 2 * 16 * 64 * 4


def test_the_command_prints_tables_and_json(tmp_path: Path) -> None:
    write_configs(tmp_path)
    words = ["plan", str(tmp_path / "lora.yaml"), "--gpus", "2", "--gpu-memory"]
    shown = CliRunner().invoke(app, [*words, "80"])
    assert shown.exit_code == 0, shown.output
    assert "It fits." in shown.output
    assert "gathered" in shown.output
    machine = CliRunner().invoke(app, [*words, "80", "--json", "batch_size_per_rank=4"])
    content = json.loads(machine.stdout)
    assert content["fits"]
    assert content["peak"] == sum(content["bytes"].values())
    assert content["iteration"]["flops_per_gpu"] > 0
    tight = CliRunner().invoke(app, [*words, "0.001"])
    assert tight.exit_code == 1
    assert "It does not fit: " in tight.output
    assert "GPUs" in tight.output
    larger = CliRunner().invoke(app, [*words, "80", "--json", "--size", "512"])
    assert json.loads(larger.stdout)["bytes"]["activations"] > 2 * content["bytes"]["activations"]
    odd = CliRunner().invoke(app, [*words, "80", "--size", "500"])
    assert "500 x 500 pixels do not divide into tokens: take a multiple of 16" in odd.stderr
    bytes_not_gigabytes = CliRunner().invoke(app, [*words, "80000000000"])
    assert bytes_not_gigabytes.exit_code == 2
    sized = CliRunner().invoke(app, ["plan", str(tmp_path / "wide.yaml"), *words[2:], "80", "--size", "64"])
    assert sized.exit_code == 2
    assert "has one image size" in sized.stderr
    wrong = CliRunner().invoke(app, ["plan", str(tmp_path / "none.yaml"), "--gpus", "2", "--gpu-memory", "80"])
    assert wrong.exit_code == 2
    assert "There is no configuration file" in wrong.stderr
