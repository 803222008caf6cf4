"""Published adapters: the reference's outputs, sharing, switching, stacking, and what is refused without harm."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, QwenImagePipeline
from diffusers import QwenImageTransformer2DModel as QwenBase
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from piflow.models import DXQwenImageTransformer2DModel, GMQwenImageTransformer2DModel
from piflow.models.adapter_files import CONFIG, INDEX, WEIGHTS, read_adapter
from piflow.models.adapters import (
    PiFlowLoaderMixin,
    disable_piflow_adapter,
    enable_piflow_adapter,
    load_piflow_adapter,
    set_piflow_adapter,
    unload_piflow_adapter,
)
from piflow.models.export import export_adapter
from piflow.models.sharing import twin
from tests.golden_vectors import GOLDEN, load_group

ADAPTER = GOLDEN / "g08_export_gmqwen"
GROUP = load_group("g08_lora_export")
HEAD = ("norm_out.linear.", "proj_out")
NAME = "transformer_piflow"
TARGETS = GROUP["gmqwen.adapter.lora_disabled"].scalars["peft_config"][NAME]["target_modules"]


class Pipeline(PiFlowLoaderMixin, QwenImagePipeline):
    pass


@pytest.fixture
def base() -> QwenBase:
    return QwenBase.from_pretrained(GOLDEN / "g08_lora_base_qwen").eval()


@pytest.fixture
def pipe(base: QwenBase) -> Pipeline:
    return make_pipeline(Pipeline, base)


def make_pipeline(cls: type, transformer: nn.Module) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler()
    return cls(scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=transformer)


@torch.no_grad()
def call(model: nn.Module) -> Any:
    inputs = GROUP["gmqwen.adapter"].inputs
    dtype = model.img_in.weight.dtype
    tokens, text = inputs["tokens"].to(dtype), inputs["encoder_hidden_states"].to(dtype)
    output = model(tokens, text, timestep=inputs["timestep"], img_shapes=[[(1, 4, 3)]] * 2, return_dict=False)
    return output if hasattr(output, "_fields") else output[0]


def assert_is_reference(model: nn.Module, case: str = "gmqwen.adapter") -> None:
    output = call(model)
    for name, expected in GROUP[case].outputs.items():
        torch.testing.assert_close(getattr(output, name), expected, atol=1e-5, rtol=0)


def write_adapter(
    folder: Path,
    config: dict[str, Any] | None = None,
    edit: Callable[[dict[str, Tensor]], Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A copy of the reference's adapter with other keys in its config.json, tensors or metadata; None drops a key."""
    folder.mkdir(parents=True)
    tensors = load_file(ADAPTER / WEIGHTS)
    if edit:
        tensors = edit(tensors) or tensors
    content = {**json.loads((ADAPTER / CONFIG).read_text()), **(config or {})}
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS, metadata=metadata)
    return folder


def style(base: nn.Module, *paths: str) -> dict[str, Tensor]:
    """A LoRA of rank 2 with random weights, in diffusers' format."""
    generator = torch.Generator().manual_seed(len(paths))
    weights = {}
    for path in paths:
        layer = base.get_submodule(path)
        weights[f"transformer.{path}.lora_A.weight"] = torch.randn(2, layer.in_features, generator=generator)
        weights[f"transformer.{path}.lora_B.weight"] = torch.randn(layer.out_features, 2, generator=generator)
    return weights


STYLED = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.net.0.proj")


def test_outputs_are_the_reference(base: QwenBase) -> None:
    student = load_piflow_adapter(base, ADAPTER)
    assert isinstance(student, GMQwenImageTransformer2DModel)
    assert_is_reference(student)
    student.disable_lora()
    assert_is_reference(student, "gmqwen.adapter.lora_disabled")
    student.enable_lora()
    assert_is_reference(student)


def test_names_lora_config_and_policy_are_the_references(base: QwenBase) -> None:
    student = load_piflow_adapter(base, ADAPTER)
    assert sorted(student.state_dict()) == GROUP["gmqwen.adapter.keys"].scalars["keys"]
    [(name, expected)] = GROUP["gmqwen.adapter.lora_disabled"].scalars["peft_config"].items()
    assert list(student.peft_config) == [name]
    config = student.peft_config[name].to_dict()
    assert {key: sorted(v) if isinstance(v, set) else v for key, v in config.items() if key in expected} == expected
    assert student.policy_config == {"type": "GMFlow"}


def test_base_tensors_are_shared_and_the_base_is_untouched(base: QwenBase) -> None:
    names, expected = list(base.state_dict()), call(base)
    flags = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    student = load_piflow_adapter(base, ADAPTER)
    own = {name.replace(".base_layer.", "."): tensor for name, tensor in student.state_dict().items()}
    shared = [name for name in names if not name.startswith(HEAD)]
    assert len(shared) == len(names) - 4
    assert all(own[name].data_ptr() == base.state_dict()[name].data_ptr() for name in shared)
    assert list(base.state_dict()) == names
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == flags
    assert torch.equal(call(base), expected)
    base.half()
    assert student.img_in.weight.dtype == torch.float16  # what moves one moves the other


@pytest.mark.parametrize("lora_dtype", [None, torch.bfloat16])
def test_head_and_lora_keep_their_precision_on_a_bfloat16_base(base: QwenBase, lora_dtype: torch.dtype | None) -> None:
    base.to(torch.bfloat16)
    student = load_piflow_adapter(base, ADAPTER, lora_dtype=lora_dtype)
    dtypes = {name: parameter.dtype for name, parameter in student.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if name.startswith(HEAD)} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if ".lora_" in name} == {lora_dtype or torch.float32}
    assert student.dtype == torch.bfloat16
    means, expected = call(student).means, GROUP["gmqwen.adapter"].outputs["means"]
    assert means.dtype == torch.float32
    assert torch.equal(student.proj_out_means.weight, load_file(ADAPTER / WEIGHTS)["proj_out_means.weight"])
    assert (means - expected).norm() < 0.15 * expected.norm()  # a network of width 32 in bfloat16


@pytest.mark.parametrize("cls", [Pipeline, QwenImagePipeline])
def test_a_pipeline_switches_off_and_on_to_the_bit(cls: type, base: QwenBase) -> None:
    pipe, before = make_pipeline(cls, base), call(base)
    student = load_piflow_adapter(pipe, ADAPTER)
    assert pipe.transformer is student
    assert pipe.components["transformer"] is student
    assert pipe.config.transformer == ("piflow.models.qwen_image", "GMQwenImageTransformer2DModel")
    means = call(pipe.transformer).means
    for _ in range(2):
        disable_piflow_adapter(pipe)
        assert pipe.transformer is base
        assert torch.equal(call(pipe.transformer), before)
        enable_piflow_adapter(pipe)
        assert torch.equal(call(pipe.transformer).means, means)


def test_a_bare_transformer_switches_too(base: QwenBase) -> None:
    student = load_piflow_adapter(base, ADAPTER)
    assert disable_piflow_adapter(student) is base
    assert enable_piflow_adapter(base) is student
    assert set_piflow_adapter(base, NAME) is student
    assert unload_piflow_adapter(student) is base
    with pytest.raises(ValueError, match="No pi-Flow adapter is loaded on this QwenImageTransformer2DModel"):
        enable_piflow_adapter(base)


def test_methods_of_a_pipeline(pipe: Pipeline, tmp_path: Path) -> None:
    base, before = pipe.transformer, call(pipe.transformer)
    assert pipe.load_piflow_adapter(tmp_path.parent / ADAPTER) == NAME
    other = write_adapter(tmp_path / "sub" / "other", edit=lambda t: {k: 2 * v for k, v in t.items()})
    assert pipe.load_piflow_adapter(tmp_path / "sub", subfolder=other.name, adapter_name="other") == "other"
    second = call(pipe.transformer).means
    pipe.set_piflow_adapter(NAME)
    assert_is_reference(pipe.transformer)
    assert pipe.transformer.active_adapters() == [NAME]
    assert not any(".other." in name for name in pipe.transformer.state_dict())  # its LoRA is off
    pipe.set_piflow_adapter("other")
    assert torch.equal(call(pipe.transformer).means, second)
    assert (second - GROUP["gmqwen.adapter"].outputs["means"]).abs().max() > 0.1
    pipe.disable_piflow_adapter()
    assert torch.equal(call(pipe.transformer), before)
    pipe.enable_piflow_adapter()
    assert torch.equal(call(pipe.transformer).means, second)
    pipe.unload_piflow_adapter(NAME)
    assert torch.equal(call(pipe.transformer).means, second)
    with pytest.raises(ValueError, match=r"adapter_name: expected one of \['other'\], which are loaded, got 'trans"):
        pipe.set_piflow_adapter(NAME)
    pipe.unload_piflow_adapter()
    assert pipe.transformer is base
    assert torch.equal(call(base), before)


def test_style_lora_on_top_by_weight(pipe: Pipeline) -> None:
    base, before = pipe.transformer, call(pipe.transformer)
    name = pipe.load_piflow_adapter(ADAPTER)
    weights = style(base, *STYLED)
    pipe.load_lora_weights(weights, adapter_name="style")
    head = {key: value.clone() for key, value in pipe.transformer.state_dict().items() if key.startswith(HEAD)}
    pipe.set_adapters([name, "style"], [1.0, 0.7])
    styled = call(pipe.transformer).means

    merged, merged_student = copy.deepcopy(base), load_piflow_adapter(base, ADAPTER, adapter_name="merged")
    for path in STYLED:
        low, high = (weights[f"transformer.{path}.lora_{side}.weight"] for side in "AB")
        merged.get_submodule(path).weight.data += 0.7 * high @ low
    torch.testing.assert_close(
        styled, call(load_piflow_adapter(merged, ADAPTER, adapter_name="m")).means, atol=1e-4, rtol=1e-4
    )
    assert_is_reference(merged_student)

    assert all(torch.equal(pipe.transformer.state_dict()[key], value) for key, value in head.items())
    pipe.set_adapters([name, "style"], [1.0, 0.0])
    assert_is_reference(pipe.transformer)
    pipe.set_adapters([name, "style"], [1.0, 0.7])
    pipe.disable_piflow_adapter()
    assert torch.equal(call(pipe.transformer), before)  # the style came on top of the adapter, and goes with it
    pipe.set_piflow_adapter(name)
    assert torch.equal(call(pipe.transformer).means, styled)
    pipe.delete_adapters("style")
    assert_is_reference(pipe.transformer)


def test_unloading_style_loras_keeps_the_adapters_own(pipe: Pipeline) -> None:
    name = pipe.load_piflow_adapter(ADAPTER)
    pipe.load_lora_weights(style(pipe.transformer.piflow_family.base, *STYLED), adapter_name="style")
    pipe.set_adapters([name, "style"], [1.0, 0.7])
    pipe.unload_lora_weights()
    assert list(pipe.transformer.peft_config) == [name]
    assert_is_reference(pipe.transformer)


def test_style_lora_of_the_base_is_on_the_student_too(pipe: Pipeline) -> None:
    base = pipe.transformer
    pipe.load_lora_weights(style(base, *STYLED), adapter_name="style")
    pipe.set_adapters("style", 0.7)
    before = call(base)
    name = pipe.load_piflow_adapter(ADAPTER)
    with_style = call(pipe.transformer).means
    assert torch.equal(call(base), before)
    assert (with_style - GROUP["gmqwen.adapter"].outputs["means"]).abs().max() > 0.1
    pipe.set_adapters([name, "style"], [1.0, 0.0])
    assert_is_reference(pipe.transformer)
    assert torch.equal(call(base), before)
    pipe.set_adapters(["style", name], [0.7, 1.0])
    assert torch.equal(call(pipe.transformer).means, with_style)


def test_style_lora_of_the_bases_output_layers_before_or_after(
    base: QwenBase, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On GM: `norm_out` takes it; `proj_out`, which a mixture has not, is left out with a warning."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    weights = style(base, STYLED[0], "norm_out.linear", "proj_out")
    after = make_pipeline(Pipeline, copy.deepcopy(base))
    name = after.load_piflow_adapter(ADAPTER)
    after.load_lora_weights(weights, adapter_name="style")
    assert "unexpected keys found in the model: proj_out.lora_A.weight, proj_out.lora_B.weight" in caplog.text
    after.set_adapters([name, "style"], [1.0, 0.7])
    expected = call(after.transformer).means
    assert (expected - GROUP["gmqwen.adapter"].outputs["means"]).abs().max() > 0.1

    before = make_pipeline(Pipeline, base)
    before.load_lora_weights(weights, adapter_name="style")
    before.set_adapters("style", 0.7)
    of_the_base = call(base)
    before.load_piflow_adapter(ADAPTER)
    assert "LoRAs of the base on ['proj_out'] are left out: the student has other output layers." in caplog.text
    assert torch.equal(call(before.transformer).means, expected)
    assert torch.equal(call(base), of_the_base)
    before.set_adapters([name, "style"], [1.0, 0.0])
    assert_is_reference(before.transformer)


def test_style_lora_of_proj_out_moves_every_velocity_of_a_dx_student(base: QwenBase, tmp_path: Path) -> None:
    """As it moves the base's own: the student is the base's, whose every velocity is the base's output."""
    folder = export_adapter(DXQwenImageTransformer2DModel.from_teacher(base, 4), base, tmp_path / "dx")
    pipe, weights = make_pipeline(Pipeline, base), style(base, STYLED[0], "norm_out.linear", "proj_out")
    pipe.load_lora_weights(weights, adapter_name="style")
    expected = call(base)
    pipe.unload_lora_weights()
    pipe.load_piflow_adapter(folder)
    pipe.load_lora_weights(weights, adapter_name="style")
    grid = call(pipe.transformer).grid
    torch.testing.assert_close(grid, expected[:, :, None].expand_as(grid), atol=1e-5, rtol=1e-5)
    assert (expected - call(base)).abs().max() > 0.1


def test_what_is_done_to_one_transformer_reaches_the_others_own_layers(pipe: Pipeline) -> None:
    """A device and, of the base, a dtype: its output layers are not the student's."""
    base, before = pipe.transformer, call(pipe.transformer)
    name = pipe.load_piflow_adapter(ADAPTER)
    pipe.to(torch.float64)
    pipe.load_piflow_adapter(ADAPTER, adapter_name="second")
    pipe.disable_piflow_adapter()
    assert {parameter.dtype for parameter in base.parameters()} == {torch.float64}
    torch.testing.assert_close(call(base), before.double(), atol=1e-4, rtol=1e-4)
    pipe.to(torch.float32)
    pipe.set_piflow_adapter("second")
    assert_is_reference(pipe.transformer)
    pipe.transformer.to("meta")
    for switch in (pipe.disable_piflow_adapter, lambda: pipe.set_piflow_adapter(name)):
        switch()
        assert all(parameter.is_meta for parameter in pipe.transformer.parameters())


def test_a_compiled_student_leaves_and_returns_compiled(pipe: Pipeline) -> None:
    base, before = pipe.transformer, call(pipe.transformer)
    pipe.load_piflow_adapter(ADAPTER)
    compiled = pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    pipe.disable_piflow_adapter()
    assert torch.equal(call(pipe.transformer), before)
    pipe.enable_piflow_adapter()
    assert pipe.transformer is compiled
    assert_is_reference(compiled)
    pipe.unload_piflow_adapter()
    assert pipe.transformer is base
    assert torch.equal(call(base), before)


def test_layerwise_casting_of_the_base_is_the_students_too(pipe: Pipeline) -> None:
    base = pipe.transformer.to(torch.bfloat16)
    base.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)

    def means(model: nn.Module) -> Tensor:
        inputs = GROUP["gmqwen.adapter"].inputs
        tokens, text = (inputs[name].bfloat16() for name in ("tokens", "encoder_hidden_states"))
        with torch.no_grad():
            return model(tokens, text, timestep=inputs["timestep"], img_shapes=[[(1, 4, 3)]] * 2, return_dict=False)[0]

    before, expected = means(base), GROUP["gmqwen.adapter"].outputs["means"]
    pipe.load_piflow_adapter(ADAPTER)
    assert pipe.transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    assert pipe.transformer.proj_out_means.weight.dtype == torch.float32
    assert (means(pipe.transformer) - expected).norm() < 0.2 * expected.norm()
    pipe.disable_piflow_adapter()
    assert torch.equal(means(base), before)


def test_fused_loras_are_not_switched_away_from(pipe: Pipeline) -> None:
    before = call(pipe.transformer)
    pipe.load_piflow_adapter(ADAPTER)
    student = pipe.transformer
    student.fuse_lora()
    for switch in (pipe.disable_piflow_adapter, lambda: pipe.load_piflow_adapter(ADAPTER, adapter_name="second")):
        with pytest.raises(ValueError, match="fused into the weights, which base and students share"):
            switch()
    assert pipe.transformer is student
    student.unfuse_lora()
    pipe.disable_piflow_adapter()
    torch.testing.assert_close(call(pipe.transformer), before, atol=1e-4, rtol=1e-4)


def test_alphas_and_mixed_ranks_of_the_file(base: QwenBase, tmp_path: Path) -> None:
    """`<module>.alpha`, or the LoraConfig in the metadata; each gives the LoRA of half strength."""
    path = "transformer_blocks.0.img_mlp.net.2"

    def halved(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("lora_B.weight")]:
            tensors[key] = tensors[key] / 2
        tensors[f"{path}.lora_B.weight"][:, 1:] = 0

    def with_alphas(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            tensors[key.replace("lora_A.weight", "alpha")] = torch.tensor(2.0)
        for side, dim in (("A", 0), ("B", 1)):
            tensors[f"{path}.lora_{side}.weight"] = tensors[f"{path}.lora_{side}.weight"].narrow(dim, 0, 1)
        tensors[f"{path}.alpha"] = torch.tensor(0.5)

    patterns = {"rank_pattern": {path: 1}, "alpha_pattern": {path: 0.5}}
    config = {"r": 4, "lora_alpha": 2, "target_modules": TARGETS, **patterns}

    def narrow(tensors: dict[str, Tensor]) -> None:
        with_alphas(tensors)
        for key in [key for key in tensors if key.endswith(".alpha")]:
            del tensors[key]

    expected = call(load_piflow_adapter(base, write_adapter(tmp_path / "0", edit=halved), adapter_name="a")).means
    alphas = load_piflow_adapter(base, write_adapter(tmp_path / "1", edit=with_alphas), adapter_name="b")
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    said = load_piflow_adapter(base, write_adapter(tmp_path / "2", None, narrow, metadata), adapter_name="c")
    for student in (alphas, said):
        torch.testing.assert_close(call(student).means, expected, atol=1e-5, rtol=1e-5)
    assert (expected - GROUP["gmqwen.adapter"].outputs["means"]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["_GMQwenImageTransformer2DModel", "GMQwenImageTransformer2DModel"])
def test_private_class_names_are_accepted(base: QwenBase, tmp_path: Path, name: str) -> None:
    assert_is_reference(load_piflow_adapter(base, write_adapter(tmp_path / "a", {"_class_name": name})))


BROKEN_DX = {
    **dict.fromkeys(("num_gaussians", "constant_logstd", "gm_num_logstd_layers", "logstd_inner_dim")),
    **{"logweights_channels": None, "out_channels": 64, "guidance_embeds": False, "patch_size": 1},
}


def dx_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    body = {key: value for key, value in tensors.items() if not key.startswith(HEAD)}
    return body | GROUP["dxqwen.init"].outputs


@pytest.mark.parametrize(
    "name", ["DXQwenImageTransformer2DModel", "_DXQwenImageTransformer2DModel", "QwenImageTransformer2DModel"]
)
def test_broken_dx_exports_are_accepted(base: QwenBase, tmp_path: Path, name: str) -> None:
    """A class that no loader knew, or the base's name instead, and no n_grid. Expected: LoRA merged by hand."""
    folder = write_adapter(tmp_path / "dx", {**BROKEN_DX, "_class_name": name}, dx_weights)
    student = load_piflow_adapter(base, folder)
    assert type(student) is DXQwenImageTransformer2DModel
    assert (student.config.n_grid, student.config.out_channels) == (4, 64)
    assert student.policy_config == {"type": "DX"}

    whole, tensors = dict(base.state_dict()), load_file(folder / WEIGHTS)
    for key in tensors:
        if key.endswith("lora_A.weight"):
            path = key.removesuffix("lora_A.weight")
            whole[f"{path}weight"] = whole[f"{path}weight"] + tensors[f"{path}lora_B.weight"] @ tensors[key]
    whole |= {key: value for key, value in tensors.items() if ".lora_" not in key}
    merged = DXQwenImageTransformer2DModel(**{k: v for k, v in base.config.items() if k != "out_channels"}, n_grid=4)
    merged.load_state_dict(whole)
    torch.testing.assert_close(call(student).grid, call(merged.eval()).grid, atol=1e-5, rtol=1e-5)


def test_policy_config_is_honoured(base: QwenBase, tmp_path: Path) -> None:
    policy = {"type": "DX", "mode": "polynomial", "shift": 3.2, "segment_size": 0.25}
    metadata = {"policy_config": json.dumps(policy)}
    config = {**BROKEN_DX, "_class_name": "DXQwenImageTransformer2DModel"}
    student = load_piflow_adapter(base, write_adapter(tmp_path / "dx", config, dx_weights, metadata))
    assert student.policy_config == policy
    assert (student.config.policy, student.config.shift) == ("polynomial", 3.2)
    without = load_piflow_adapter(base, write_adapter(tmp_path / "gm"), adapter_name="gm")
    assert without.policy_config == {"type": "GMFlow"}


def test_flags_that_tensors_do_not_show_follow_the_base(base: QwenBase, tmp_path: Path) -> None:
    flagged = QwenBase.from_config({**base.config, "zero_cond_t": True}).eval()
    student = load_piflow_adapter(flagged, ADAPTER)
    assert student.config.zero_cond_t
    assert student.zero_cond_t


def split_in_shards(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    files = {f"diffusion_pytorch_model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for file, keys in files.items():
        save_file({key: tensors[key] for key in keys}, folder / file, metadata={"policy_config": '{"type": "GMFlow"}'})
    weight_map = {key: file for file, keys in files.items() for key in keys}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_shards_with_an_index(base: QwenBase, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "sharded")
    split_in_shards(folder)
    student = load_piflow_adapter(base, folder)
    assert_is_reference(student)
    assert student.policy_config == {"type": "GMFlow"}


def in_hub_cache(cache: Path, subfolder: str = "") -> None:
    """The adapter as huggingface_hub keeps `someone/pi` after a download."""
    commit = "0" * 40
    snapshot = cache / "models--someone--pi" / "snapshots" / commit
    (snapshot.parent.parent / "refs").mkdir(parents=True)
    (snapshot.parent.parent / "refs" / "main").write_text(commit)
    shutil.copytree(ADAPTER, snapshot / subfolder)


@pytest.mark.parametrize("subfolder", [None, "gmqwen_k8"])
def test_a_repository_in_the_cache(base: QwenBase, tmp_path: Path, subfolder: str | None) -> None:
    in_hub_cache(tmp_path, subfolder or "")
    hub = {"cache_dir": tmp_path, "local_files_only": True}
    assert_is_reference(load_piflow_adapter(base, "someone/pi", subfolder=subfolder, **hub))


def test_offloading_goes_with_the_transformer(pipe: Pipeline) -> None:
    before = call(pipe.transformer)
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.load_piflow_adapter(ADAPTER)
    assert hasattr(pipe.transformer, "_hf_hook")
    assert_is_reference(pipe.transformer)
    pipe.disable_piflow_adapter()
    assert hasattr(pipe.transformer, "_hf_hook")
    assert torch.equal(call(pipe.transformer), before)


def test_group_offloading_goes_with_the_transformer(pipe: Pipeline) -> None:
    before, cpu = call(pipe.transformer), torch.device("cpu")
    pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    pipe.load_piflow_adapter(ADAPTER)
    base = pipe.transformer.piflow_family.base
    assert _is_group_offload_enabled(pipe.transformer)
    assert not _is_group_offload_enabled(base)
    assert_is_reference(pipe.transformer)
    pipe.disable_piflow_adapter()
    assert _is_group_offload_enabled(base)
    assert torch.equal(call(base), before)


def test_device_map_of_the_base(base: QwenBase) -> None:
    before = call(base)
    dispatched = dispatch_model(base, {"": "cpu"}, force_hooks=True)
    student = load_piflow_adapter(dispatched, ADAPTER)
    assert student.img_in._hf_hook is not dispatched.img_in._hf_hook
    assert_is_reference(student)
    assert torch.equal(call(dispatched), before)


def test_a_copy_of_a_student_is_a_pair_of_its_own(base: QwenBase) -> None:
    copied = copy.deepcopy(load_piflow_adapter(base, ADAPTER))
    assert copied.piflow_family.base is not base
    assert copied.img_in.weight is copied.piflow_family.base.img_in.weight
    assert_is_reference(copied)


def test_twin_keeps_a_module_that_occurs_twice_one_module() -> None:
    layer = nn.Linear(2, 2)
    tree = twin(nn.ModuleList([layer, layer, nn.Linear(2, 2)]))
    assert tree[0] is tree[1]
    assert tree[0] is not layer
    assert tree[0].weight is layer.weight


def test_a_train_mode_base_gives_a_train_mode_student(base: QwenBase) -> None:
    student = load_piflow_adapter(base.train(), ADAPTER)
    assert all(module.training for module in student.modules())
    assert not load_piflow_adapter(base.eval(), ADAPTER, adapter_name="b").proj_out_means.training


# What is refused: each message says what and where, and the pipeline then computes what it did before.


def wider() -> QwenBase:
    config = QwenBase.load_config(GOLDEN / "g08_lora_base_qwen")
    return QwenBase.from_config({**config, "num_attention_heads": 3})


def deeper() -> QwenBase:
    config = QwenBase.load_config(GOLDEN / "g08_lora_base_qwen")
    return QwenBase.from_config({**config, "num_layers": 3})


def shallower() -> QwenBase:
    config = QwenBase.load_config(GOLDEN / "g08_lora_base_qwen")
    return QwenBase.from_config({**config, "num_layers": 1})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            wider,
            r"not made for this base: time_text_embed.timestep_embedder.linear_1.weight is \(32, 256\) in the "
            r"adapter's GMQwenImageTransformer2DModel, \(48, 256\) in the base QwenImageTransformer2DModel",
        ),
        (deeper, r"transformer_blocks.2.\S+ is missing in the adapter's GMQwen\w+, \(192, 32\) in the base QwenImage"),
        (
            shallower,
            r"transformer_blocks.1.\S+ is \(192, 32\) in the adapter's GMQwen\w+, missing in the base QwenImage",
        ),
    ],
)
def test_wrong_base_names_the_first_tensor_and_both_classes(make: Callable[[], QwenBase], message: str) -> None:
    torch.manual_seed(0)
    base = make().eval()
    pipe, before, names = make_pipeline(Pipeline, base), call(base), list(base.state_dict())
    with pytest.raises(ValueError, match=message):
        pipe.load_piflow_adapter(ADAPTER)
    assert pipe.transformer is base
    assert list(base.state_dict()) == names
    assert torch.equal(call(base), before)


def test_base_of_another_class() -> None:
    flux = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=8,
        pooled_projection_dim=8, in_channels=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"GMQwenImage\w+, to be put on a QwenImage\w+, not on this FluxTransformer2D"):
        load_piflow_adapter(flux, ADAPTER)
    student = GMQwenImageTransformer2DModel.from_pretrained(GOLDEN / "g08_gmqwen")
    with pytest.raises(ValueError, match="not on this GMQwenImageTransformer2DModel"):
        load_piflow_adapter(student, ADAPTER)


def without(*starts: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: value for key, value in tensors.items() if not key.startswith(starts)}


def no_config(folder: Path) -> None:
    (folder / CONFIG).unlink()


def write_config(folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text)


def truncated(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def missing_shard(folder: Path) -> None:
    split_in_shards(folder)
    sorted(folder.glob("*-of-*"))[1].unlink()


LORA_KEY = "transformer_blocks.0.img_mlp.net.2.lora_A.weight"
BAD: dict[str, tuple[dict[str, Any], Callable[[Path], Any] | None, type[Exception], str]] = {
    "no config": ({}, no_config, FileNotFoundError, r"has no config\.json"),
    "config is no JSON": ({}, lambda f: write_config(f, "{"), ValueError, "is not valid JSON"),
    "config is a list": ({}, lambda f: write_config(f, "[]"), ValueError, "expected a JSON object"),
    "no class": ({"config": {"_class_name": None}}, None, ValueError, "expected a `_class_name`"),
    "unknown class": (
        {"config": {"_class_name": "GMQwenTransformer"}}, None, ValueError,
        r"no class 'GMQwenTransformer' in piflow.models; did you mean 'GMQwenImageTransformer2DModel'",
    ),
    "no weights": ({}, lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, "it is no pi-Flow adapter"),
    "truncated": ({}, truncated, ValueError, "is damaged or cut short"),
    "missing shard": ({}, missing_shard, FileNotFoundError, "has no diffusion_pytorch_model-00002-of-00002"),
    "pickled": ({}, pickled, ValueError, r"diffusion_pytorch_model\.bin, a pickled file.*allow_pickle=True"),
    "no head": (
        {"edit": without("proj_out_means")}, None, ValueError,
        r"lacks 2 tensors of the output layers that a GMQwen\w+ needs: proj_out_means.weight, proj_out_means.bias",
    ),
    "only LoRA": ({"edit": without(*HEAD)}, None, ValueError, "lacks 8 tensors of the output layers"),
    "head of another size": (
        {"config": {"num_gaussians": 4}}, None, ValueError,
        r"proj_out_means.weight is \(48, 32\) in the weights, config.json makes it \(64, 32\)",
    ),
    "unknown tensor": (
        {"edit": lambda t: t | {"proj_out_x.weight": torch.ones(1)}}, None, ValueError, "has proj_out_x.weight",
    ),
    "LoRA of another size": (
        {"edit": lambda t: t | {LORA_KEY: torch.ones(4, 96)}}, None, ValueError,
        rf"{LORA_KEY} is \(4, 96\) in the adapter's GMQwen\w+, \(4, 128\) in the base",
    ),
    "LoRA of an unknown layer": (
        {"edit": lambda t: t | {"blocks.0.lora_A.weight": torch.ones(4, 4)}}, None, ValueError,
        r"blocks.0.lora_A.weight is \(4, 4\) in the adapter's \w+, missing in the base",
    ),
    "half a LoRA": ({"edit": without(LORA_KEY)}, None, ValueError, "but not both of lora_A and lora_B"),
    "configuration of another type": (
        {"config": {"axes_dims_rope": 7}}, None, ValueError,
        r"config\.json makes no GMQwenImageTransformer2DModel: 'int' object is not iterable",
    ),
    "head of integers": (
        {"edit": lambda t: t | {"proj_out_means.bias": t["proj_out_means.bias"].int()}}, None, ValueError,
        r"proj_out_means\.bias is torch\.int32, not floating point",
    ),
    "several alphas": (
        {"edit": lambda t: t | {"x.alpha": torch.ones(2)}}, None, ValueError,
        r"x\.alpha: expected one number, got \(2,\)",
    ),
    "shards that are no names": (
        {}, lambda f: (split_in_shards(f), (f / INDEX).write_text('{"weight_map": {"a": 3}}')), ValueError,
        "expected a `weight_map`, {tensor: file}",
    ),
    "unknown policy": (
        {"metadata": {"policy_config": '{"type": "GMX"}'}}, None, ValueError, "asks for the policy 'GMX', but is a GM",
    ),
    "policy out of its domain": (
        {"metadata": {"policy_config": '{"shift": 0}'}}, None, ValueError,
        "shift in policy_config: expected a number above 0, got 0",
    ),
    "another policy": (
        {"metadata": {"policy_config": '{"type": "DX"}'}}, None, ValueError, "asks for the policy 'DX', but is a GM",
    ),
    "policy is no JSON": ({"metadata": {"policy_config": "{"}}, None, ValueError, "policy_config .* is not valid JSON"),
    "policy is a list": ({"metadata": {"policy_config": "[]"}}, None, ValueError, "policy_config .* expected a JSON"),
    "LoRA of another rank than it says": (
        {"metadata": {"lora_adapter_metadata": json.dumps({"r": 2, "target_modules": TARGETS})}}, None, ValueError,
        r"its LoRA cannot be put on: \S+1.lora_A.weight is \(4, 256\), but by the rank in the metadata \(2, 256\)",
    ),
    "LoRA that peft does not know": (
        {"metadata": {"lora_adapter_metadata": '{"rank": 4}'}}, None, ValueError, "its LoRA cannot be put on: .*rank",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_and_nothing_has_changed(pipe: Pipeline, tmp_path: Path, case: str) -> None:
    written, spoil, error, message = BAD[case]
    folder = write_adapter(tmp_path / "bad", **written)
    if spoil:
        spoil(folder)
    base, before, names = pipe.transformer, call(pipe.transformer), list(pipe.transformer.state_dict())
    flags = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    with pytest.raises(error, match=message):
        pipe.load_piflow_adapter(folder)
    assert pipe.transformer is base
    assert (list(base.state_dict()), hasattr(base, "piflow_family")) == (names, False)
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == flags
    assert torch.equal(call(base), before)
    pipe.load_piflow_adapter(ADAPTER)
    with pytest.raises(error, match=message):
        pipe.load_piflow_adapter(folder, adapter_name="bad")
    assert_is_reference(pipe.transformer)


def test_pickled_weights_by_name_only(base: QwenBase, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "pickled")
    pickled(folder)
    assert_is_reference(load_piflow_adapter(base, folder, allow_pickle=True))
    (folder / "diffusion_pytorch_model.bin").unlink()
    torch.save({"code": Path}, folder / "diffusion_pytorch_model.ckpt")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_adapter(folder, allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/nothing", "its config.json is not in the cache and cannot be downloaded"),
        ("/no/such/folder", "There is no folder /no/such/folder, and it is no name of a Hugging Face repository"),
    ],
)
def test_no_such_repository_or_folder(pipe: Pipeline, tmp_path: Path, name: str, message: str) -> None:
    base = pipe.transformer
    with pytest.raises(FileNotFoundError, match=message):
        pipe.load_piflow_adapter(name, cache_dir=tmp_path, local_files_only=True)
    assert pipe.transformer is base


def test_arguments_that_make_no_sense(pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match="has no transformer of the name 'unet'"):
        pipe.load_piflow_adapter(ADAPTER, target_module_name="unet")
    with pytest.raises(ValueError, match=r"expected letters, digits, - and _, got 'v1\.2'"):
        pipe.load_piflow_adapter(ADAPTER, adapter_name="v1.2")
    with pytest.raises(ValueError, match=r"is a file: give the folder that holds it"):
        pipe.load_piflow_adapter(ADAPTER / WEIGHTS)
    pipe.load_piflow_adapter(ADAPTER)
    with pytest.raises(ValueError, match="'transformer_piflow' is already loaded"):
        pipe.load_piflow_adapter(ADAPTER)


@pytest.fixture(scope="module")
def on_quantised_bases() -> dict[str, Any]:
    packages = Path(sys.prefix) / "quantization"
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, (str(packages), str(root), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.models.quantized_adapters"],
        env={**os.environ, "PYTHONPATH": path}, cwd=root, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("kind", "error"),
    [("bitsandbytes nf4", 0.1), ("bitsandbytes int8", 0.03), ("GGUF Q8_0", 0.02), ("torchao int8", 0.03)],
)
def test_quantised_base(on_quantised_bases: dict[str, Any], kind: str, error: float) -> None:
    facts = on_quantised_bases[kind]
    assert facts["quantised tensors"] >= 5
    assert facts["error"] < error
    assert facts["error without LoRA"] > 2 * facts["error"]
    assert facts["own dtypes"] == ["torch.float32"]
    assert facts["own types"] == ["Parameter"]
    assert facts["shared"]
    assert facts["base unchanged"]
    assert facts["repeats"]
