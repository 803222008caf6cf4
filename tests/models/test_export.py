"""Exported adapters: names, dtypes, metadata and config of the published format, read back by us and by diffusers."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from piflow.digits.teacher import load_teacher
from piflow.models import DXQwenImageTransformer2DModel, GMDiTTransformer2DModelV2, GMFluxTransformer2DModel
from piflow.models.adapter_files import CONFIG, WEIGHTS
from piflow.models.adapters import load_piflow_adapter
from piflow.models.export import export_adapter, export_checkpoint, write_folder
from piflow.training.checkpoint import write_manifest
from piflow.training.config import TrainConfig
from piflow.training.errors import CheckpointError
from tests.golden_vectors import GOLDEN, load_group

ADAPTER = GOLDEN / "g08_export_gmqwen"
PUBLISHED = json.loads((ADAPTER / "keys_and_metadata.json").read_text())
GROUP = load_group("g08_lora_export")
STUDENT = {"_class_name": "GMQwenImageTransformer2DModel"}


@pytest.fixture
def base() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel.from_pretrained(GOLDEN / "g08_lora_base_qwen").eval()


@torch.no_grad()
def call(model: nn.Module) -> Any:
    tokens, text, time = (GROUP["gmqwen.adapter"].inputs[k] for k in ("tokens", "encoder_hidden_states", "timestep"))
    output = model(tokens, text, timestep=time, img_shapes=[[(1, 4, 3)]] * 2, return_dict=False)
    return output if hasattr(output, "_fields") else output[0]


def facts(folder: Path) -> dict[str, Any]:
    """As in the reference's keys_and_metadata.json."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        tensors = {key: {"shape": list(s.get_shape()), "dtype": s.get_dtype()} for key, s in slices.items()}
        return {"metadata": file.metadata(), "tensors": tensors}


def trained(base: nn.Module, cls: Any, targets: list[str], **lora: Any) -> Any:
    """A student from the teacher with a LoRA, as a training leaves it."""
    generator = torch.Generator().manual_seed(0)
    student = cls.from_teacher(base, 3, share=False)
    student.add_adapter(LoraConfig(r=4, target_modules=targets, **lora))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".lora_" in name or name.startswith(("proj_out", "norm_out")):
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return student.eval()


@pytest.mark.parametrize("with_base", [True, False])
def test_the_reference_again(base: QwenImageTransformer2DModel, tmp_path: Path, with_base: bool) -> None:
    student = load_piflow_adapter(base, ADAPTER)
    folder = export_adapter(student, base if with_base else None, tmp_path / "out")
    assert facts(folder) == PUBLISHED
    expected, found = (json.loads((path / CONFIG).read_text()) for path in (ADAPTER, folder))
    assert found.pop("_diffusers_version") != expected.pop("_diffusers_version")
    assert found == expected
    weights, before = load_file(folder / WEIGHTS), load_file(ADAPTER / WEIGHTS)
    assert all(torch.equal(weights[key], before[key]) for key in before)
    assert sorted(os.listdir(tmp_path)) == ["out"]


@pytest.mark.parametrize("lora", [{"lora_alpha": 4}, {"lora_alpha": 10}, {"lora_alpha": 3, "use_rslora": True}])
@pytest.mark.parametrize("cls", ["GMQwenImageTransformer2DModel", "DXQwenImageTransformer2DModel"])
def test_a_trained_student_comes_back(
    base: QwenImageTransformer2DModel, tmp_path: Path, cls: str, lora: dict[str, Any]
) -> None:
    import piflow.models

    student = trained(base, getattr(piflow.models, cls), ["to_q", "img_mlp.net.2"], **lora)
    policy = {"type": "GMFlow"} if cls.startswith("GM") else {"type": "DX", "segment_size": 0.25}
    folder = export_adapter(student, base, tmp_path / "out", policy_config=policy)
    loaded = load_piflow_adapter(base, folder)
    assert type(loaded) is type(student)
    assert loaded.policy_config == policy
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in student.config.items() if k[0] != "_"
    }
    torch.testing.assert_close(call(loaded)[0], call(student)[0], atol=1e-5, rtol=1e-5)
    assert loaded.peft_config["transformer_piflow"].lora_alpha == 4


def test_dx_names_a_class_that_is_there_and_its_grid(base: QwenImageTransformer2DModel, tmp_path: Path) -> None:
    student = DXQwenImageTransformer2DModel.from_teacher(base, 5, policy="polynomial", shift=3.2)
    config = json.loads((export_adapter(student, base, tmp_path / "dx") / CONFIG).read_text())
    assert config["_class_name"] == "DXQwenImageTransformer2DModel"
    assert (config["n_grid"], config["policy"], config["shift"], config["out_channels"]) == (5, "polynomial", 3.2, 80)
    assert facts(tmp_path / "dx")["metadata"] == {"policy_config": '{"type": "DX"}'}


def test_diffusers_takes_the_lora_and_safetensors_the_rest(base: QwenImageTransformer2DModel, tmp_path: Path) -> None:
    folder = export_adapter(load_piflow_adapter(base, ADAPTER), base, tmp_path / "out")
    base.load_lora_adapter(load_file(folder / WEIGHTS), prefix=None, adapter_name="pi")
    loaded = {key.replace(".pi.", "."): value for key, value in base.state_dict().items() if ".lora_" in key}
    lora = {key: value for key, value in load_file(ADAPTER / WEIGHTS).items() if ".lora_" in key}
    assert loaded.keys() == lora.keys()
    assert all(torch.equal(loaded[key], lora[key]) for key in lora)


def test_weights_that_differ_from_the_base_are_written_whole(base: QwenImageTransformer2DModel, tmp_path: Path) -> None:
    student = trained(base, DXQwenImageTransformer2DModel, ["to_q"])
    with torch.no_grad():
        student.img_in.bias.add_(0.1)
        student.transformer_blocks[0].attn.to_q.base_layer.bias.add_(0.1)
    folder = export_adapter(student, base, tmp_path / "out")
    assert {"img_in.bias", "transformer_blocks.0.attn.to_q.bias"} <= facts(folder)["tensors"].keys()
    assert "img_in.weight" not in facts(folder)["tensors"]
    torch.testing.assert_close(call(load_piflow_adapter(base, folder))[0], call(student)[0], atol=1e-5, rtol=1e-5)


def test_dtypes_stay(base: QwenImageTransformer2DModel, tmp_path: Path) -> None:
    student = load_piflow_adapter(base.to(torch.bfloat16), ADAPTER, lora_dtype=torch.bfloat16)
    dtypes = {
        key: fact["dtype"] for key, fact in facts(export_adapter(student, base, tmp_path / "out"))["tensors"].items()
    }
    assert {dtype for key, dtype in dtypes.items() if ".lora_" in key} == {"BF16"}
    assert {dtype for key, dtype in dtypes.items() if ".lora_" not in key} == {"F32"}


def test_flux(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=8,
        pooled_projection_dim=12, in_channels=16, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    ).eval()  # fmt: skip
    student = trained(base, GMFluxTransformer2DModel, ["to_q", "proj_mlp", "linear_1"])
    loaded = load_piflow_adapter(base, export_adapter(student, base, tmp_path / "flux"))
    inputs = {
        "hidden_states": torch.randn(1, 6, 16),
        "encoder_hidden_states": torch.randn(1, 3, 8),
        "pooled_projections": torch.randn(1, 12),
        "timestep": torch.tensor([0.7]),
        "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(3, 3),
        "guidance": torch.tensor([3.5]),
    }
    with torch.no_grad():
        for found, expected in zip(loaded(**inputs), student(**inputs)):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_saved_student_with_lora(base: QwenImageTransformer2DModel, tmp_path: Path) -> None:
    load_piflow_adapter(base, ADAPTER).save_pretrained(tmp_path / "saved")
    folder = export_checkpoint(tmp_path / "saved", tmp_path / "out")
    assert facts(folder) == PUBLISHED
    loaded = load_piflow_adapter(base, folder, adapter_name="again")
    torch.testing.assert_close(call(loaded).means, GROUP["gmqwen.adapter"].outputs["means"], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="a saved student, without raw weights"):
        export_checkpoint(tmp_path / "saved", tmp_path / "raw", ema=False)
    with pytest.raises(ValueError, match="policy_config asks for the policy 'DX', but is a GMQwenImageTransformer2D"):
        export_checkpoint(tmp_path / "saved", tmp_path / "dx", policy_config={"type": "DX"})
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"base holds no student of piflow\.models"):
        export_checkpoint(tmp_path / "base", tmp_path / "dx")


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, GMDiTTransformer2DModelV2]:
    """A checkpoint as two ranks write it, each with its padded half of the average; and the student it holds."""
    generator = torch.Generator().manual_seed(1)
    config = TrainConfig.model_validate({"output_dir": "run", "iterations": 7, "student": {"num_gaussians": 3}})
    student = GMDiTTransformer2DModelV2.from_teacher(load_teacher(), 3, generator=generator)
    folder = tmp_path / "run" / "checkpoints" / "step_000007"
    folder.mkdir(parents=True)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    halves: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, parameter in student.named_parameters():
        padded = torch.zeros(2 * ((parameter.numel() + 1) // 2))
        padded[: parameter.numel()] = parameter.detach().flatten()
        for rank, half in enumerate(padded.chunk(2)):
            halves[rank][f"ema.{name}"] = half.clone()
    for rank, shards in enumerate(halves):
        save_file(shards, folder / f"rank_{rank}.safetensors")
    facts = {"iteration": 7, "position": 0, "world_size": 2, "config": config.model_dump(mode="json")}
    write_manifest(folder, facts)
    (folder.parent / "latest").write_text(folder.name)
    return folder, student


@pytest.mark.parametrize("which", ["step", "checkpoints", "run"])
def test_a_training_checkpoint_by_any_of_its_folders(
    checkpoint: tuple[Path, GMDiTTransformer2DModelV2], tmp_path: Path, which: str
) -> None:
    folder, student = checkpoint
    path = {"step": folder, "checkpoints": folder.parent, "run": folder.parent.parent}[which]
    out = export_checkpoint(path, tmp_path / "out")
    assert facts(out)["metadata"] == {"policy_config": '{"type": "GMFlow", "nfe": 1}'}
    loaded, found = GMDiTTransformer2DModelV2.from_pretrained(out, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    expected = student.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


def test_damaged_checkpoints_are_refused(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = checkpoint
    (folder / "rank_1.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"damaged: rank_1\.safetensors has 5 bytes"):
        export_checkpoint(folder, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        export_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"incomplete: manifest\.json is missing"):
        export_checkpoint(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_an_earlier_export_is_replaced_and_only_if_asked(tmp_path: Path) -> None:
    one, two = ({"w": torch.full((2,), value)} for value in (1.0, 2.0))
    out = write_folder(tmp_path / "out", {**STUDENT, "a": 1}, one, {})
    with pytest.raises(FileExistsError, match="is there already"):
        write_folder(out, {**STUDENT, "a": 2}, two, {})
    assert json.loads((out / CONFIG).read_text()) == {**STUDENT, "a": 1}
    write_folder(out, {**STUDENT, "a": 2}, two, {}, overwrite=True)
    assert torch.equal(load_file(out / WEIGHTS)["w"], two["w"])
    (out / "thesis.tex").write_text("years")
    with pytest.raises(FileExistsError, match=r"is no earlier export, it holds thesis\.tex"):
        write_folder(out, {**STUDENT, "a": 3}, one, {}, overwrite=True)
    assert sorted(os.listdir(out)) == [CONFIG, WEIGHTS, "thesis.tex"]
    assert os.listdir(tmp_path) == ["out"]


def test_another_networks_folder_and_a_link_are_not_replaced(base: QwenImageTransformer2DModel, tmp_path: Path) -> None:
    base.save_pretrained(tmp_path / "base")  # the very names of an export
    with pytest.raises(FileExistsError, match="is no earlier export, it holds no student"):
        write_folder(tmp_path / "base", STUDENT, {}, {}, overwrite=True)
    QwenImageTransformer2DModel.from_pretrained(tmp_path / "base")
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    assert write_folder(tmp_path / "link", STUDENT, {"w": torch.ones(2)}, {}) == tmp_path / "disk"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "link" / WEIGHTS).is_file()


def test_a_full_disk_is_one_message(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"out cannot be written: .*[Ff]ile too large"):
            write_folder(tmp_path / "out", STUDENT, {"w": torch.ones(5000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert os.listdir(tmp_path) == []


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path) -> None:
    out = write_folder(tmp_path / "out", {**STUDENT, "a": 1}, {"w": torch.ones(2)}, {})
    with pytest.raises(TypeError):
        write_folder(out, {"a": object()}, {"w": torch.zeros(2)}, {}, overwrite=True)
    with pytest.raises(TypeError):
        write_folder(tmp_path / "new", {}, {"w": torch.zeros(2)}, {"policy": object()})
    assert os.listdir(tmp_path) == ["out"]
    assert torch.equal(load_file(out / WEIGHTS)["w"], torch.ones(2))


def test_what_is_no_student_or_another_base(base: QwenImageTransformer2DModel, tmp_path: Path) -> None:
    student = load_piflow_adapter(base, ADAPTER)
    with pytest.raises(
        ValueError, match=r"student: expected a student of piflow\.models, got a QwenImageTransformer2D"
    ):
        export_adapter(base, None, tmp_path / "out")
    with pytest.raises(ValueError, match="base: expected a QwenImageTransformer2DModel, which the student extends"):
        export_adapter(student, nn.Linear(1, 1), tmp_path / "out")
    with pytest.raises(ValueError, match=r"adapter_name: expected one of \['transformer_piflow'\], got 'x'"):
        export_adapter(student, base, tmp_path / "out", adapter_name="x")
    two = trained(base, DXQwenImageTransformer2DModel, ["to_q"])
    two.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), "second")
    with pytest.raises(ValueError, match=r"several LoRAs, give one of \['default', 'second'\]"):
        export_adapter(two, base, tmp_path / "out")
    export_adapter(two, base, tmp_path / "out", adapter_name="second")
    assert "transformer_blocks.0.attn.to_k.lora_A.weight" in facts(tmp_path / "out")["tensors"]
