"""Students under the published names: reference outputs, parameter names and shapes, initialisation."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

import piflow.models
from tests.golden_vectors import GOLDEN, Case, load_group

GMQWEN = load_group("g08_gmqwen")
QWEN_CASES = [case.id for case in GMQWEN.cases if (GOLDEN / case.raw["weights"]).is_dir()]


def student_of(folder: str) -> Any:
    name = json.loads((GOLDEN / folder / "config.json").read_text())["_class_name"]
    return getattr(piflow.models, name).from_pretrained(GOLDEN / folder).eval()


def pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H/2 W/2, 4 C) with channel index (C, 2, 2)."""
    b, c, h, w = latents.shape
    return latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """(B, h w, K, 4 C) -> (B, K, C, 2 h, 2 w)."""
    b, _, k, c = tokens.shape
    pixels = tokens.reshape(b, h, w, k, c // 4, 2, 2).permute(0, 3, 4, 1, 5, 2, 6)
    return pixels.reshape(b, k, c // 4, 2 * h, 2 * w)


def assert_mixture(output: Any, case: Case) -> None:
    """Equal to 1e-5, in the packed layout or after unpacking into the wrapper's."""
    parts = output._asdict()
    if case.id.endswith("wrapper"):
        parts = {name: unpack(part, 4, 3) for name, part in parts.items() if name != "logstds"}
        parts["logstds"] = output.logstds[..., None]
    for name, expected in case.outputs.items():
        torch.testing.assert_close(parts[name], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case_id", QWEN_CASES)
def test_gmqwen(case_id: str) -> None:
    case = GMQWEN[case_id]
    inputs = {**case.inputs, "img_shapes": [[(1, 4, 3)]] * 2}
    if case_id.endswith("wrapper"):
        inputs["hidden_states"] = pack(inputs["hidden_states"])
    with torch.no_grad():
        assert_mixture(student_of(case.raw["weights"])(**inputs), case)


def test_gmqwen_cases_are_all_there() -> None:
    assert len(QWEN_CASES) == 8  # full and masked, packed and wrapper, predicted and constant logstd


@pytest.mark.parametrize("case_id", ["packed", "wrapper"])
def test_gmflux(case_id: str) -> None:
    case = load_group("g08_gmflux")[case_id]
    inputs = {name: value for name, value in case.inputs.items() if name not in ("latents", "tokens")}
    tokens = pack(case.inputs["latents"])
    assert torch.equal(tokens, case.inputs["tokens"])
    with torch.no_grad():
        assert_mixture(student_of("g08_gmflux")(hidden_states=tokens, **inputs), case)


def test_dxqwen_grid() -> None:
    case = load_group("g08_dxqwen_grid_cases")["dxqwen.grid"]
    inputs = {name: case.inputs[name] for name in ("encoder_hidden_states", "timestep")}
    with torch.no_grad():
        grid = student_of("g08_dxqwen_grid")(
            hidden_states=case.inputs["tokens"], img_shapes=[[(1, 4, 3)]] * 2, **inputs
        ).grid
    torch.testing.assert_close(grid.flatten(2), case.outputs["packed"], rtol=0, atol=1e-5)
    torch.testing.assert_close(unpack(grid, 4, 3), case.outputs["out"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("config_name", ["config.json", "config_private_class.json"])
@pytest.mark.parametrize("folder", ["g08_dxdit", "g08_dxflux", "g08_dxqwen_poly", "g08_gmflux2"])
def test_parameter_names_and_shapes(folder: str, config_name: str) -> None:
    config = json.loads((GOLDEN / "keys_only" / folder / config_name).read_text())
    student = getattr(piflow.models, config["_class_name"].lstrip("_")).from_config(config)
    shapes = {name: list(parameter.shape) for name, parameter in student.state_dict().items()}
    assert shapes == json.loads((GOLDEN / "keys_only" / folder / "state_dict_shapes.json").read_text())
    if folder.startswith("g08_dx"):
        assert student.config.n_grid == config["out_channels"] // config["in_channels"]


def test_private_class_name_loads_weights(tmp_path) -> None:
    folder = GOLDEN / "g08_gmflux"
    (tmp_path / "config.json").write_text((folder / "config_private_class.json").read_text())
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / weights).write_bytes((folder / weights).read_bytes())
    private = piflow.models.GMFluxTransformer2DModel.from_pretrained(tmp_path).state_dict()
    public = student_of("g08_gmflux").state_dict()
    assert all(torch.equal(private[name], public[name]) for name in public)


def test_policy_of_a_published_config_is_given_by_hand() -> None:
    folder = GOLDEN / "g08_dxqwen_grid"
    student = piflow.models.DXQwenImageTransformer2DModel.from_pretrained(folder, policy="polynomial", shift=3.2)
    assert (student.config.policy, student.config.shift, student.config.n_grid) == ("polynomial", 3.2, 4)


def test_gmqwen_initialisation() -> None:
    """As the reference's, but that its offsets do not average to zero."""
    reference = {
        name.removeprefix("gmqwen.init."): tensor
        for name, tensor in load_group("g08_lora_export").tensors.items()
        if name.startswith("gmqwen.init.")
    }
    teacher = QwenImageTransformer2DModel.from_pretrained(GOLDEN / "g08_lora_base_qwen")
    student = piflow.models.GMQwenImageTransformer2DModel.from_teacher(
        teacher, 3, logstd_inner_dim=16, generator=torch.Generator().manual_seed(0)
    )
    ours = {name: student.state_dict()[name] for name in reference}
    differ = ("proj_out_means.bias", "proj_out_logstds.1.weight")
    for name, expected in reference.items():
        assert ours[name].shape == expected.shape
        if name not in differ and not name.startswith("norm_out"):
            torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-6)
    for name in ("norm_out.linear.weight", "norm_out.linear.bias"):
        assert torch.equal(ours[name], teacher.state_dict()[name])
    bound = (6 / (32 + 16)) ** 0.5  # of Xavier's uniform distribution, as the reference's
    for parameters in (ours, reference):
        assert 0.9 * bound < parameters["proj_out_logstds.1.weight"].abs().max() <= bound

    offsets, expected = (
        (parameters["proj_out_means.bias"].view(3, 16) - teacher.proj_out.bias).view(3, 4, 4).detach()
        for parameters in (ours, reference)
    )
    for each in (offsets, expected):
        torch.testing.assert_close(each, each[..., :1].expand_as(each), rtol=0, atol=1e-7)  # one over the sub-pixels
        assert 0.02 < each[..., 0].std() < 0.08
    torch.testing.assert_close(offsets.mean(dim=0), torch.zeros(4, 4), rtol=0, atol=1e-7)


def test_dxqwen_initialisation() -> None:
    reference = load_group("g08_lora_export").tensors
    teacher = QwenImageTransformer2DModel.from_pretrained(GOLDEN / "g08_lora_base_qwen")
    student = piflow.models.DXQwenImageTransformer2DModel.from_teacher(teacher, 4).state_dict()
    for name in ("proj_out.weight", "proj_out.bias"):
        assert torch.equal(student[name], reference[f"dxqwen.init.{name}"])
