"""GMDiT: the published outputs, the teacher's velocity at the start, saving, checkpointing, bad labels."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from piflow.models import GMDiTTransformer2DModelV2, load_dit_teacher
from tests.golden_vectors import GOLDEN, load_group


def plain_teacher(shared: bool = False) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    teacher = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, num_layers=2, sample_size=8, num_embeds_ada_norm=5
    ).eval()
    if shared:
        teacher.transformer_blocks[1].norm1.emb = teacher.transformer_blocks[0].norm1.emb
        teacher.transformer_blocks[0].norm1.emb.time_proj.downscale_freq_shift = 0
    return teacher


def batch(size: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 3, 8, 8, generator=generator)
    return x, 1000 * torch.rand(size, generator=generator), torch.randint(0, 6, (size,), generator=generator)


def test_published_weights_give_published_outputs() -> None:
    case = load_group("g08_gmdit")["gmdit"]
    student = GMDiTTransformer2DModelV2.from_pretrained(GOLDEN / "g08_gmdit").eval()
    with torch.no_grad():
        output = student(**case.inputs)
    for name, expected in case.outputs.items():
        torch.testing.assert_close(getattr(output, name), expected, rtol=0, atol=1e-5)


def test_published_teacher_is_diffusers_dit() -> None:
    case = load_group("g08_gmdit")["dit_teacher"]
    teacher = load_dit_teacher(GOLDEN / "g08_dit_teacher")
    with torch.no_grad():
        u = teacher(case.inputs["hidden_states"], case.inputs["timestep"], case.inputs["class_labels"]).sample
    torch.testing.assert_close(u, case.outputs["u"], rtol=0, atol=1e-5)


def test_load_dit_teacher_names_the_missing_file(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_dit_teacher(tmp_path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "is damaged or its weights do not fit"),
        ("tensor missing", r"is damaged .*Missing key.*proj_out_2\.bias"),
        ("another size", "is damaged .*size mismatch"),
        ("config is no JSON", "config.json is not valid JSON"),
        ("config is a list", "expected a JSON object, got a list"),
        ("student", "holds a GMDiTTransformer2DModelV2, not a DiTTransformer2DModel"),
    ],
)
def test_damaged_teacher_is_named(tmp_path, how: str, message: str) -> None:
    plain_teacher().save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "diffusion_pytorch_model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "tensor missing":
        save_file({k: v for k, v in load_file(weights).items() if k != "proj_out_2.bias"}, weights)
    elif how == "another size":
        config.write_text(config.read_text().replace('"attention_head_dim": 8', '"attention_head_dim": 16'))
    elif how == "student":
        GMDiTTransformer2DModelV2.from_teacher(plain_teacher(), num_gaussians=2).save_pretrained(tmp_path)
    else:
        config.write_text("{" if how == "config is no JSON" else "[1]")
    with pytest.raises(ValueError, match=message):
        load_dit_teacher(tmp_path)


def test_save_keeps_published_names(tmp_path) -> None:
    student = GMDiTTransformer2DModelV2.from_pretrained(GOLDEN / "g08_gmdit")
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    published = json.loads((GOLDEN / "g08_gmdit" / "config.json").read_text())
    assert {key: config[key] for key in published if key != "_diffusers_version"} == {
        key: value for key, value in published.items() if key != "_diffusers_version"
    }
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    original = load_file(GOLDEN / "g08_gmdit" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key]) for key in saved)


@pytest.mark.parametrize("shared", [False, True])
def test_from_teacher_starts_at_the_teachers_velocity(shared: bool, tmp_path) -> None:
    teacher = plain_teacher(shared)
    student = GMDiTTransformer2DModelV2.from_teacher(teacher, num_gaussians=4, logstd=-0.5, spread=0.3).eval()
    assert student.config.shared_embedding is shared
    x, timestep, labels = batch()
    with torch.no_grad():
        means, logstds, logweights = student(x, timestep, labels)
        u = teacher(x, timestep, labels).sample
    torch.testing.assert_close((logweights.exp() * means).sum(dim=1), u, rtol=0, atol=2e-6)
    assert torch.equal(logstds, torch.full((4, 1, 1, 1, 1), -0.5))
    assert means.std(dim=1).min() > 0.01

    student.save_pretrained(tmp_path)
    again = GMDiTTransformer2DModelV2.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(again(x, timestep, labels), (means, logstds, logweights)))


def test_from_teacher_copies_and_never_drops_labels() -> None:
    teacher = plain_teacher()
    student = GMDiTTransformer2DModelV2.from_teacher(teacher, num_gaussians=2).train()
    x, timestep, labels = batch(64)
    with torch.no_grad():
        first, second = student(x, timestep, labels), student(x, timestep, labels)
        assert torch.equal(first.means, second.means)
        before = teacher.pos_embed.proj.weight.clone()
        student.pos_embed.proj.weight.add_(1.0)
    assert torch.equal(teacher.pos_embed.proj.weight, before)


def test_from_teacher_is_repeatable() -> None:
    teacher = plain_teacher()
    first, second = (
        GMDiTTransformer2DModelV2.from_teacher(teacher, 3, generator=torch.Generator().manual_seed(5)).state_dict()
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_constant_logstd_has_no_head() -> None:
    student = GMDiTTransformer2DModelV2.from_teacher(plain_teacher(), num_gaussians=2, constant_logstd=-2.0)
    assert not any("logstds" in key for key in student.state_dict())
    assert torch.equal(student(*batch()).logstds, torch.full((4, 1, 1, 1, 1), -2.0))


def test_gradient_checkpointing_changes_nothing() -> None:
    student = GMDiTTransformer2DModelV2.from_teacher(plain_teacher(), num_gaussians=4)

    def gradients() -> dict[str, torch.Tensor]:
        student.zero_grad()
        output = student(*batch())
        sum((part * part.detach().cos()).sum() for part in output).backward()
        return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    plain = gradients()
    student.enable_gradient_checkpointing()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys() == dict(student.named_parameters()).keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_not_square_and_scalar_timestep() -> None:
    student = GMDiTTransformer2DModelV2.from_teacher(plain_teacher(), num_gaussians=2)
    output = student(torch.randn(2, 3, 4, 8), 500.0, torch.tensor([0, 5]))
    assert output.means.shape == (2, 2, 3, 4, 8)
    assert output.logweights.shape == (2, 2, 1, 4, 8)


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((2, 3, 8, 8), [0, 6], "class label 6 is out of range: this network takes 0 to 4, and 5 for no class"),
        ((2, 3, 8, 8), [-1, 0], "class label -1 is out of range"),
        ((2, 3, 8, 8), [0], r"class_labels must be \(2,\)"),
        ((2, 4, 8, 8), [0, 1], r"hidden_states must be \(B, 3, H, W\)"),
        ((2, 3, 7, 8), [0, 1], "multiples of 2"),
    ],
)
def test_bad_input_is_named(shape: tuple[int, ...], labels: list[int], message: str) -> None:
    student = GMDiTTransformer2DModelV2.from_teacher(plain_teacher(), num_gaussians=2)
    with pytest.raises(ValueError, match=message):
        student(torch.zeros(shape), 500.0, torch.tensor(labels))


def test_bad_timestep_and_label_types_are_named() -> None:
    student = GMDiTTransformer2DModelV2.from_teacher(plain_teacher(), num_gaussians=2)
    x, labels = torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"timestep must be \(2,\) or a scalar, got \(3,\)"):
        student(x, torch.zeros(3), labels)
    with pytest.raises(ValueError, match=r"class_labels must be int64, got torch.float32"):
        student(x, 500.0, labels.float())
    with pytest.raises(ValueError, match=r"hidden_states must be \(B, 3, H, W\).*got \(3, 8, 8\)"):
        student(x[0], 500.0, labels)
