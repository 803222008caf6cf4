"""A sharded base into ZeRO-3 partitions: what each rank holds, whether it is the files' content, and bad files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, QwenImageTransformer2DModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from piflow.training.errors import ConfigError
from piflow.training.launch import launch_module, launcher_environment
from piflow.training.loading import check_keys, local_folder, on_meta, survey, units
from tests.processes import no_shared_memory_left, time_limit

TINY = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 8,
    "axes_dims_rope": (4, 6, 6),
    "in_channels": 8,
    "out_channels": 8,
}


def write_base(folder: Path, dtype: torch.dtype, shard_size: str, **config: Any) -> None:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        QwenImageTransformer2DModel(**config).save_pretrained(folder, max_shard_size=shard_size)
    finally:
        torch.set_default_dtype(before)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A small base of several files in float32."""
    write_base(tmp_path / "base", torch.float32, "50KB", **TINY)
    return tmp_path / "base"


@pytest.mark.launcher
def test_no_rank_ever_holds_more_than_its_share_and_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every tensor in pages of its own, which go when it goes: so the mark counts tensors, not holes in malloc's heap.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    sizes = {"num_layers": 30, "num_attention_heads": 4, "attention_head_dim": 128, "joint_attention_dim": 256}
    write_base(tmp_path / "base", torch.bfloat16, "60MB", **sizes)
    with time_limit(240), no_shared_memory_left():
        launch_module(["tests.training.loading_checks", str(tmp_path), "--launched"], num_processes=2)
    shutil.rmtree(tmp_path / "base")
    ranks = json.loads((tmp_path / "report.json").read_text())
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["files"] > 5
        assert rank["held"] == 0
        assert rank["different"] == []
        assert 2 * rank["share"] > 1.3 * (1.3 * rank["share"] + rank["block"])  # who holds the whole is found out
        assert rank["share"] < rank["peak"] < 1.3 * rank["share"] + rank["block"]
        assert rank["refused"] == ranks[0]["refused"]
        assert "There is no folder" in rank["refused"]


@pytest.mark.launcher
def test_a_process_without_a_launcher_is_a_world_of_one(base: Path) -> None:
    """And float32 files become bfloat16 parameters."""
    environment = {name: value for name, value in launcher_environment().items() if name != "RANK"}
    environment["MASTER_PORT"] = str(20000 + os.getpid() % 9000)
    with time_limit(120), no_shared_memory_left():
        command = [sys.executable, "-m", "tests.training.loading_checks", str(base.parent)]
        subprocess.run(command, env=environment, check=True)
    (rank,) = json.loads((base.parent / "report.json").read_text())
    assert rank["files"] > 1
    assert rank["different"] == []
    assert rank["share"] == sum(2 * p.numel() for p in on_meta(QwenImageTransformer2DModel, TINY).parameters())


def test_every_parameter_is_in_one_unit(base: Path) -> None:
    module = on_meta(QwenImageTransformer2DModel, TINY)
    named = [(path, name) for path, unit in units(module) for name, _ in unit.named_parameters(prefix=path) if path]
    assert sorted(name for _, name in named) == sorted(name for name, _ in module.named_parameters())
    assert {path for path, name in named if "blocks" in name} == {"transformer_blocks.0", "transformer_blocks.1"}


def fits(base: Path) -> None:
    check_keys(on_meta(QwenImageTransformer2DModel, TINY), survey(base).shapes, str(base))


def shard_with(base: Path, key: str) -> Path:
    return survey(base).file_of[key]


def rewrite(file: Path, change: Any) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_files_as_diffusers_wrote_them_fit(base: Path) -> None:
    fits(base)
    assert survey(base).config["_class_name"] == "QwenImageTransformer2DModel"


def test_a_truncated_file_is_named(base: Path) -> None:
    file = shard_with(base, "img_in.weight")
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ConfigError, match=rf"{file.name} has \d+ bytes and is truncated or damaged: .*Download it aga"):
        survey(base)


def test_a_missing_file_is_named(base: Path) -> None:
    file = shard_with(base, "img_in.weight")
    file.unlink()
    with pytest.raises(ConfigError, match=rf"incomplete: {file.name} is missing"):
        survey(base)


def test_a_tensor_that_only_the_index_knows_is_named(base: Path) -> None:
    file = shard_with(base, "img_in.weight")
    rewrite(file, lambda tensors: tensors.pop("img_in.weight"))
    with pytest.raises(ConfigError, match=rf"{file.name} lacks img_in.weight, which the index places there"):
        survey(base)


def test_missing_unexpected_and_misshapen_parameters_are_named(base: Path) -> None:
    (index,) = base.glob("*.index.json")
    content = json.loads(index.read_text())
    file = shard_with(base, "img_in.weight")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["img_in.wait"] = tensors.pop("img_in.weight")
        tensors["img_in.bias"] = torch.zeros(3)

    rewrite(file, change)
    content["weight_map"]["img_in.wait"] = content["weight_map"].pop("img_in.weight")
    index.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as raised:
        fits(base)
    assert "do not fit a QwenImageTransformer2DModel" in str(raised.value)
    assert "img_in.weight missing in the files" in str(raised.value)
    assert "img_in.wait unknown to the network" in str(raised.value)
    assert "img_in.bias is [3] in the files and [32] in the network" in str(raised.value)


def test_a_folder_without_weights_and_a_broken_index(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There are no weights diffusion_pytorch_model"):
        survey(tmp_path / "nowhere")
    (index,) = base.glob("*.index.json")
    index.write_text("{")
    with pytest.raises(ConfigError, match=rf"{index.name} cannot be read as JSON"):
        survey(base)
    index.write_text('{"weight_map": 3}')
    with pytest.raises(ConfigError, match="has no weight_map"):
        survey(base)


def test_the_base_of_another_class_is_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match="a QwenImageTransformer2DModel, this recipe needs a DiTTransformer2DModel"):
        on_meta(DiTTransformer2DModel, survey(base).config)


def test_a_repository_is_found_in_the_cache_of_the_hub(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = base.parent / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(base, snapshot / "transformer")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(base.parent / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_folder("owner/name", "transformer") == snapshot / "transformer"
    assert local_folder("owner/name/transformer", weights=False) == snapshot / "transformer"
    with pytest.raises(ConfigError, match="There is no folder owner/other, and it cannot be had from the hub"):
        local_folder("owner/other")


def test_a_path_that_is_no_folder_is_not_looked_for_on_the_hub() -> None:
    for path in (Path("a/b"), "./b", "/a/b", "nowhere"):
        with pytest.raises(ConfigError, match=r"There is no folder .* Give a folder, or a repository"):
            local_folder(path)
