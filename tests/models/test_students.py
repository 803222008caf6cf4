"""What every student does: start at its teacher, save and load, train, take LoRA, caches, ControlNets and compilers."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

import piflow.models
from piflow.models.generic import student_class
from piflow.policies import DXPolicy, GMFlowPolicy, Policy
from tests.models import networks
from tests.models.networks import ARGUMENTS, SIGMA

TEACHERS = {
    "qwen": networks.qwen,
    "flux": networks.flux,
    "flux2": networks.flux2,
    "dit": networks.dit,
    "sd3": networks.sd3,
}
CLASSES = {
    "GM-qwen": "GMQwenImageTransformer2DModel",
    "DX-qwen": "DXQwenImageTransformer2DModel",
    "GM-flux": "GMFluxTransformer2DModel",
    "DX-flux": "DXFluxTransformer2DModel",
    "GM-flux2": "GMFlux2Transformer2DModel",
    "DX-flux2": "DXFlux2Transformer2DModel",
    "GM-dit": "GMDiTTransformer2DModelV2",
    "DX-dit": "DXDiTTransformer2DModel",
    "GM-sd3": "GMSD3Transformer2DModel",
    "DX-sd3": "DXSD3Transformer2DModel",
}
every = pytest.mark.parametrize("which", CLASSES)
packed = pytest.mark.parametrize("which", [which for which in CLASSES if which.endswith(("qwen", "flux", "flux2"))])
blocks_in_lora = pytest.mark.parametrize("which", [which for which in CLASSES if not which.endswith("dit")])


def make(which: str, **config: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Student, teacher and the arguments of both. GM students have settled on no symmetric mixture any more."""
    policy, family = which.split("-")
    teacher = TEACHERS[family]()
    size = {"num_gaussians": 3, "logstd": -1.0} if policy == "GM" else {"n_grid": 3}
    student = getattr(piflow.models, CLASSES[which]).from_teacher(teacher, **{**size, **config})
    return student, teacher, ARGUMENTS[family]


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second))


def policy_of(which: str, output: Any, x_src: Tensor, mode: str = "grid") -> Policy:
    layout = "spatial" if which.endswith(("dit", "sd3")) else "packed"
    if which.startswith("GM"):
        return GMFlowPolicy(*output, x_src, SIGMA, layout=layout)
    return DXPolicy(*output, x_src, SIGMA, segment_size=0.25, shift=3.0, mode=mode, layout=layout)


def test_every_name_is_exported() -> None:
    assert piflow.models.__all__ == sorted(piflow.models.__all__)
    for name in piflow.models.__all__:
        assert getattr(piflow.models, name).__name__ == name
    with pytest.raises(AttributeError, match="no student 'GMNothing': expected GM or DX before the name"):
        _ = piflow.models.GMNothing
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = piflow.models.nothing


# from_teacher


@pytest.mark.parametrize("mode", ["grid", "polynomial"])
@every
def test_policy_starts_at_the_teachers_velocity(which: str, mode: str) -> None:
    if which.startswith("GM"):
        student, teacher, arguments = make(which, spread=0.2 if mode == "grid" else 0.0)  # with and without offsets
    else:
        student, teacher, arguments = make(which, policy=mode, shift=3.0)
        assert (student.config.policy, student.config.shift) == (mode, 3.0)
    x_src = arguments["hidden_states"]
    with torch.no_grad():
        expected = teacher(**arguments, return_dict=False)[0]
        velocity = policy_of(which, student(**arguments), x_src, mode).velocity(x_src, SIGMA)
    torch.testing.assert_close(velocity, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("which", [which for which in CLASSES if which.startswith("GM")])
def test_offsets_break_the_symmetry_and_average_to_zero(which: str) -> None:
    student, teacher, arguments = make(which, spread=0.3)
    with torch.no_grad():
        means, logstds, logweights = student(**arguments)
        expected = teacher(**arguments, return_dict=False)[0]
    components = 2 if "dit" not in which and "sd3" not in which else 1
    torch.testing.assert_close(means.mean(dim=components), expected, rtol=0, atol=2e-6)
    assert means.std(dim=components).min() > 1e-3
    torch.testing.assert_close(logstds, torch.full_like(logstds, -1.0))
    torch.testing.assert_close(logweights.exp(), torch.full_like(logweights, 1 / 3))


@pytest.mark.parametrize("which", [which for which in CLASSES if which.startswith("DX")])
def test_every_grid_point_is_the_teachers_output(which: str) -> None:
    student, teacher, arguments = make(which)
    with torch.no_grad():
        grid = student(**arguments).grid
        expected = teacher(**arguments, return_dict=False)[0].unsqueeze(1 if which.endswith(("dit", "sd3")) else 2)
    torch.testing.assert_close(grid, expected.expand_as(grid), rtol=0, atol=2e-6)


@every
def test_teacher_is_copied_or_shared(which: str) -> None:
    student, teacher, _ = make(which)
    storages = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert not any(parameter.data_ptr() in storages for parameter in student.parameters())
    assert student.dtype == teacher.dtype
    if not which.endswith("dit"):
        shared = getattr(piflow.models, CLASSES[which]).from_teacher(teacher, 2, share=True)
        own = {name for name, parameter in shared.named_parameters() if parameter.data_ptr() not in storages}
        assert own
        assert all(name.startswith(("norm_out", "proj_out")) for name in own)
        assert not any(name.startswith("proj_out") for name in {n for n, _ in shared.named_parameters()} - own)


@every
def test_generator_makes_every_draw(which: str) -> None:
    if which.startswith("GM"):
        first, second = (make(which, generator=torch.Generator().manual_seed(3))[0].state_dict() for _ in range(2))
        torch.manual_seed(5)
        other = make(which, generator=torch.Generator().manual_seed(4))[0].state_dict()
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not all(torch.equal(first[name], other[name]) for name in first)


# saving, loading, precision


@pytest.mark.parametrize("mode", ["grid", "polynomial"])
@every
def test_round_trip(which: str, mode: str, tmp_path) -> None:
    config = {"constant_logstd": -2.0} if which.startswith("GM") and mode == "polynomial" else {}
    if which.startswith("DX"):
        config = {"policy": mode, "shift": 3.2}
    student, _, arguments = make(which, **config)
    student.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["_class_name"] == CLASSES[which]
    assert saved.items() >= config.items()
    assert saved["num_gaussians" if which.startswith("GM") else "n_grid"] == 3
    assert load_file(tmp_path / "diffusion_pytorch_model.safetensors").keys() == student.state_dict().keys()
    again = getattr(piflow.models, saved["_class_name"]).from_pretrained(tmp_path)
    assert {k: v for k, v in again.config.items() if k in saved and k[0] != "_"} == {
        key: value for key, value in saved.items() if key[0] != "_"
    }
    rebuilt = type(student).from_config(student.config)
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {
        k: v.shape for k, v in student.state_dict().items()
    }
    with torch.no_grad():
        assert same(student(**arguments), again(**arguments))


@every
def test_copies_compute_the_same(which: str) -> None:
    student, _, arguments = make(which)
    twin = copy.deepcopy(student)
    with torch.no_grad():
        assert same(student(**arguments), twin(**arguments))
        next(iter(twin.parameters())).add_(1.0)
        assert not same(student(**arguments), twin(**arguments))


@every
def test_bfloat16_with_the_head_in_float32(which: str, tmp_path) -> None:
    student, teacher, arguments = make(which, **({"spread": 0.0} if which.startswith("GM") else {}))
    student.save_pretrained(tmp_path)
    student = type(student).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    arguments = {
        name: value.bfloat16() if name in ("hidden_states", "encoder_hidden_states", "pooled_projections") else value
        for name, value in arguments.items()
    }
    component = 1 if which.endswith(("dit", "sd3")) else 2
    with torch.no_grad():
        expected = teacher.bfloat16()(**arguments, return_dict=False)[0].float()
        low = student(**arguments)
        for name, module in student.named_children():
            if name.startswith("proj_out"):
                module.float()
        high = student(**arguments)
    for output, dtype in ((low, torch.bfloat16), (high, torch.float32)):
        assert {part.dtype for part in output} == {dtype}
        for velocity in output[0].float().unbind(component):
            torch.testing.assert_close(velocity, expected, rtol=2**-6, atol=2**-6)  # some roundings of bfloat16


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
@every
def test_device_map(which: str, device_map: Any, tmp_path) -> None:
    student, _, arguments = make(which)
    student.save_pretrained(tmp_path)
    placed = type(student).from_pretrained(tmp_path, device_map=device_map)
    assert placed.hf_device_map
    with torch.no_grad():
        assert same(student(**arguments), placed(**arguments))


@packed
def test_offloaded_to_disk_module_by_module(which: str, tmp_path) -> None:
    student, _, arguments = make(which)
    student.save_pretrained(tmp_path)
    names = [name for name, _ in student.named_children()]
    device_map = {name: "disk" if name.startswith(("norm_out", "proj_out", "transformer")) else "cpu" for name in names}
    placed = type(student).from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    with torch.no_grad():
        assert same(student(**arguments), placed(**arguments))


@blocks_in_lora
def test_layerwise_casting_leaves_the_head_alone(which: str) -> None:
    student, _, arguments = make(which)
    student.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    dtypes = {name: parameter.dtype for name, parameter in student.named_parameters()}
    assert torch.float8_e4m3fn in dtypes.values()
    assert {dtype for name, dtype in dtypes.items() if name.startswith("proj_out")} == {torch.float32}
    with torch.no_grad():
        assert all(part.isfinite().all() for part in student(**arguments))


# training


@every
def test_gradient_checkpointing_changes_no_gradient(which: str) -> None:
    student, _, arguments = make(which)
    student.train()

    def gradients() -> dict[str, Tensor]:
        student.zero_grad()
        sum((part * part.detach().cos()).sum() for part in student(**arguments)).backward()
        return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    plain = gradients()
    student.enable_gradient_checkpointing()
    assert student.is_gradient_checkpointing
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    assert any(name.startswith("proj_out") for name in plain)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def add_lora(student: Any, where: str = "to_q") -> None:
    student.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=[where], init_lora_weights=False), "style")


@blocks_in_lora
def test_lora_scale(which: str) -> None:
    student, _, arguments = make(which)
    name = "attention_kwargs" if which.endswith("qwen") else "joint_attention_kwargs"
    torch.manual_seed(1)
    with torch.no_grad():
        plain = student(**arguments)
        add_lora(student)
        full, again = student(**arguments), student(**arguments, **{name: {"scale": 1.0}})
        none = student(**arguments, **{name: {"scale": 0.0}})
        student.set_adapters("style", 0.5)
        half = student(**arguments)
        student.set_adapters("style", 1.0)
        half_by_scale = student(**arguments, **{name: {"scale": 0.5}})
        student.disable_adapters()
        disabled = student(**arguments)
    assert same(full, again)
    assert not torch.equal(full[0], plain[0])
    assert same(none, plain)
    assert same(disabled, plain)
    for part, expected in zip(half_by_scale, half):
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-6)
    assert not torch.equal(half[0], full[0])


@blocks_in_lora
def test_lora_is_trained_and_saved_by_itself(which: str, tmp_path) -> None:
    student, _, arguments = make(which)
    add_lora(student)
    student.save_lora_adapter(tmp_path, adapter_name="style")
    fresh, _, _ = make(which, **({"generator": torch.Generator()} if which.startswith("GM") else {}))
    fresh.load_state_dict({k.replace(".base_layer", ""): v for k, v in student.state_dict().items() if "lora" not in k})
    file = "pytorch_lora_weights.safetensors"
    fresh.load_lora_adapter(tmp_path, prefix=None, adapter_name="style", weight_name=file)
    with torch.no_grad():
        assert same(student(**arguments), fresh(**arguments))


@pytest.mark.parametrize("which", ["GM-qwen", "DX-qwen", "GM-flux", "DX-flux"])
def test_lora_on_the_head(which: str) -> None:
    student, _, arguments = make(which)
    name = "attention_kwargs" if which.endswith("qwen") else "joint_attention_kwargs"
    with torch.no_grad():
        plain = student(**arguments)
        add_lora(student, "proj_out_means" if which.startswith("GM") else "proj_out")
        assert not torch.equal(student(**arguments)[0], plain[0])
        assert same(student(**arguments, **{name: {"scale": 0.0}}), plain)


# the base class's own abilities


@pytest.mark.parametrize("which", [*CLASSES][:4])
def test_first_block_cache(which: str) -> None:
    student, _, arguments = make(which)
    with torch.no_grad():
        expected = student(**arguments)
        student.enable_cache(FirstBlockCacheConfig(threshold=math.inf))
        with student.cache_context("cond"):
            first = student(**arguments)
            second = student(**{**arguments, "hidden_states": 1.5 * arguments["hidden_states"]})
        student.disable_cache()
        moved = student(**{**arguments, "hidden_states": 1.5 * arguments["hidden_states"]})
    assert same(first, expected)
    assert not torch.equal(second[0], moved[0])  # the blocks after the first were not run again
    assert all(part.isfinite().all() for part in second)


@pytest.mark.parametrize("which", ["GM-qwen", "DX-qwen", "GM-flux", "DX-flux", "GM-sd3", "DX-sd3"])
def test_controlnet_residuals(which: str) -> None:
    """They reach the head as they reach the teacher's own output layer."""
    student, teacher, arguments = make(which)
    name = "block_controlnet_hidden_states" if which.endswith("sd3") else "controlnet_block_samples"
    tokens = 16 if which.endswith("sd3") else 12
    control = {name: [networks.noise(2, tokens, 32, seed=7)]}
    if which.endswith("flux"):
        control["controlnet_single_block_samples"] = [networks.noise(2, tokens, 32, seed=8)]
    x_src = arguments["hidden_states"]
    with torch.no_grad():
        plain, controlled = student(**arguments), student(**arguments, **control)
        expected = teacher(**arguments, **control, return_dict=False)[0]
        velocity = policy_of(which, controlled, x_src).velocity(x_src, SIGMA)
    assert (controlled[0] - plain[0]).abs().max() > 0.01
    torch.testing.assert_close(velocity, expected, rtol=0, atol=2e-6)


def test_flux2_hands_out_its_kv_cache() -> None:
    for which in ("GM-flux2", "DX-flux2"):
        student, teacher, arguments = make(which)
        arguments = {**arguments, "kv_cache_mode": "extract", "num_ref_tokens": 4}
        with torch.no_grad():
            output, cache = student(**arguments)
            expected, _ = teacher(**arguments, return_dict=False)
            mean = output[0].mean(dim=2)
        assert cache.num_ref_tokens == 4
        torch.testing.assert_close(mean, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("which", ["GM-qwen", "DX-flux", "GM-flux2", "GM-dit", "DX-sd3"])
def test_compiles_into_one_graph(which: str) -> None:
    student, _, arguments = make(which)
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for part, expected in zip(compiled(**arguments), student(**arguments)):
            torch.testing.assert_close(part, expected, rtol=0, atol=1e-6)
    torch.compiler.reset()


@packed
def test_parallel_plans(which: str) -> None:
    """Context parallelism gathers a GM student's tokens before the conditioning is appended, a DX student's output."""
    student, teacher, _ = make(which)
    gathered = student._cp_plan["norm_out" if which.startswith("GM") else "proj_out"]
    assert gathered is type(teacher)._cp_plan["proj_out"]
    assert ("proj_out" in student._cp_plan) == which.startswith("DX")
    for plan in (student._cp_plan, student._tp_plan):
        for name in plan:
            first = name.partition(".")[0]
            assert not first or hasattr(student, first)
    assert student._tp_plan == type(teacher)._tp_plan
    assert student._no_split_modules == type(teacher)._no_split_modules


# bad input


@every
def test_bad_settings_are_named(which: str) -> None:
    number = "num_gaussians" if which.startswith("GM") else "n_grid"
    with pytest.raises(ValueError, match=f"{number}: expected a whole number, at least 1, got 0"):
        make(which, **{number: 0})
    with pytest.raises(ValueError, match=f"{number}: expected a whole number, at least 1, got 2.5"):
        make(which, **{number: 2.5})
    if which.startswith("DX"):
        with pytest.raises(ValueError, match="policy: expected 'grid' or 'polynomial', got 'spline'"):
            make(which, policy="spline")


@every
def test_wrong_teacher_is_named(which: str) -> None:
    cls = getattr(piflow.models, CLASSES[which])
    other = "sd3" if not which.endswith("sd3") else "flux"
    student, teacher, _ = make(which)
    wrong = f"teacher: expected a {type(teacher).__name__}, which {cls.__name__} extends, got a "
    with pytest.raises(ValueError, match=wrong + type(TEACHERS[other]()).__name__):
        cls.from_teacher(TEACHERS[other]())
    with pytest.raises(ValueError, match=wrong + cls.__name__):
        cls.from_teacher(student)


@pytest.mark.parametrize("which", ["DX-qwen", "DX-flux", "DX-flux2", "DX-dit"])
def test_out_channels_that_do_not_fit(which: str) -> None:
    cls = getattr(piflow.models, CLASSES[which])
    with pytest.raises(ValueError, match=r"out_channels: expected n_grid x in_channels = 4 x 16 = 64, got 48"):
        cls(n_grid=4, in_channels=16, out_channels=48, num_layers=0)
    with pytest.raises(ValueError, match=r"out_channels: expected .* got 50"):
        cls(in_channels=16, out_channels=50, num_layers=0)


@pytest.mark.parametrize("which", ["GM-qwen", "GM-flux", "GM-flux2", "GM-dit"])
def test_gm_settings_that_do_not_fit(which: str) -> None:
    if which != "GM-dit":
        with pytest.raises(ValueError, match=r"logweights_channels: expected a divisor of out_channels = 16"):
            make(which, logweights_channels=3)
    with pytest.raises(ValueError, match="gm_num_logstd_layers: expected a whole number, at least 1, got 0"):
        make(which, gm_num_logstd_layers=0)


def test_class_by_base() -> None:
    assert student_class(type(networks.qwen()), "GM") is piflow.models.GMQwenImageTransformer2DModel
    cls = student_class(type(networks.sd3()), "DX")
    assert cls is piflow.models.DXSD3Transformer2DModel
    assert pickle.loads(pickle.dumps(cls)) is cls  # for processes that are spawned


@blocks_in_lora
def test_lora_on_shared_modules_is_off_for_the_teachers_turn(which: str) -> None:
    """One set of blocks for both: a student's LoRA trains, the teacher's velocity stays what it was."""
    teacher, arguments = TEACHERS[which.split("-")[1]](), ARGUMENTS[which.split("-")[1]]
    with torch.no_grad():
        expected = teacher(**arguments, return_dict=False)[0]
        student = getattr(piflow.models, CLASSES[which]).from_teacher(teacher, 2, share=True)
        plain = student(**arguments)
        add_lora(student)
        assert not torch.equal(student(**arguments)[0], plain[0])
        student.disable_adapters()
        assert torch.equal(teacher(**arguments, return_dict=False)[0], expected)


def test_style_lora_of_the_base_with_its_output_layer(tmp_path) -> None:
    """Its blocks apply; what it has for the base's output layer fits no mixture and is left out."""
    style = networks.flux()
    style.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "proj_out"], init_lora_weights=False))
    style.save_lora_adapter(tmp_path)
    student, _, arguments = make("GM-flux")
    with torch.no_grad():
        plain = student(**arguments)
        student.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
        assert not torch.equal(student(**arguments)[0], plain[0])
    lora = {name for name in student.state_dict() if "lora" in name}
    assert any(name.startswith("single_transformer_blocks.0.proj_out") for name in lora)
    assert not any(name.startswith("proj_out") for name in lora)


@pytest.mark.slow
def test_context_parallel_on_two_processes() -> None:
    """Tokens split over two processes, through gloo: each process has the whole output of an undivided run."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(networks.__file__).with_name("context_parallel.py")
    root = script.parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([*launch, str(script)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2 * 6
