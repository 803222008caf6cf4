"""Teacher and student in one set of weights; what does not fit is named before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Generator, Tensor, nn

from piflow.models.adapters import load_piflow_adapter
from piflow.models.export import published_config, write_folder
from piflow.training.config import TrainConfig, load_config
from piflow.training.data import build_loader
from piflow.training.engine import build_optimizer, check_optimizer
from piflow.training.errors import ConfigError
from piflow.training.lora import adapter_weights, lora_disabled
from piflow.training.module import PiIDModule, build_module
from piflow.training.networks import TextCalls, build_teacher, count_parameters, joined

TINY = Path(__file__).parents[2] / "configs" / "tiny"
TEXT = ("flux/gm_4nfe", "flux/dx_4nfe", "flux2/gm_4nfe", "qwen_image/gm_4nfe", "qwen_image/dx_4nfe")


def config_of(recipe: str, *overrides: str) -> TrainConfig:
    return load_config(TINY / f"{recipe}.yaml", overrides)


def first_batch(config: TrainConfig, size: int = 2) -> dict[str, Tensor]:
    return next(iter(build_loader(config.data, 0, size, 0, 0, 1)))


def inputs_of(module: PiIDModule, config: TrainConfig) -> dict[str, Any]:
    batch = first_batch(config)
    x_t = module.calls.state(batch["latents"])
    condition, _ = module.calls.conditions(batch)
    return module.calls.inputs(x_t, torch.tensor([0.9, 0.4]), condition, tuple(batch["latents"].shape[2:]))


def shake(module: nn.Module) -> None:
    """Trained weights other than those of the start."""
    generator = Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("recipe", TEXT)
def test_the_teacher_is_untouched_by_what_is_trained(recipe: str) -> None:
    config = config_of(recipe)
    module, alone = build_module(config), build_teacher(config)
    inputs = inputs_of(module, config)
    with torch.no_grad():
        expected = alone(**inputs, return_dict=False)[0]
        before = module.student(**inputs)
        shake(module)
        assert torch.equal(module.teacher(**inputs, return_dict=False)[0], expected)
        assert not torch.equal(module.student(**inputs)[0], before[0])
    assert all(p.requires_grad for name, p in module.student.named_parameters() if ".lora_" in name)


@pytest.mark.parametrize("recipe", TEXT)
def test_a_student_begins_as_its_teacher(recipe: str) -> None:
    config = config_of(recipe)
    module = build_module(config)
    inputs = inputs_of(module, config)
    with torch.no_grad():
        output, expected = module.student(**inputs), module.teacher(**inputs, return_dict=False)[0]
    torch.testing.assert_close(output[0].mean(dim=2), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recipe", TEXT)
def test_base_weights_are_there_once(recipe: str) -> None:
    config = config_of(recipe)
    module, alone = build_module(config), build_teacher(config)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    total = sum(p.numel() for p in module.parameters())
    assert total == sum(p.numel() for p in alone.parameters()) + trained
    names = {name for name, p in module.student.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert names == {name for name, _ in module.student.named_parameters() if name.startswith(("norm_out", "proj_out"))}
    counts = count_parameters(config)
    assert counts["trainable"] == trained
    assert counts["frozen"] == total - trained
    assert counts["LoRA"] + counts["head"] == trained
    assert counts["rest of the trainable"] == 0


def test_a_student_that_is_trained_whole_has_its_own_weights() -> None:
    config = config_of("qwen_image/gm_4nfe", "student.lora=null")
    module = build_module(config)
    assert all(p.requires_grad for p in module.student.parameters())
    assert not any(p.requires_grad for p in module.teacher.parameters())
    own = {p.data_ptr() for p in module.student.parameters()}
    assert not own & {p.data_ptr() for p in module.teacher.parameters()}


def test_switching_lora_off_leaves_requires_grad_alone() -> None:
    module = build_module(config_of("flux/gm_4nfe"))
    layers = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
    assert len(layers) == 8  # four of the double block, two of the single one, two of the time embedding
    wanted = [p.requires_grad for p in module.parameters()]
    with lora_disabled(module.student):
        assert all(layer.disable_adapters for layer in layers)
        assert [p.requires_grad for p in module.parameters()] == wanted
    assert not any(layer.disable_adapters for layer in layers)


@pytest.mark.parametrize("alpha", ["null", "8"])
def test_an_exported_adapter_computes_what_the_student_does(alpha: str, tmp_path: Path) -> None:
    config = config_of("qwen_image/gm_4nfe", f"student.lora.alpha={alpha}")
    module = build_module(config)
    shake(module)
    trained = {name: p.detach() for name, p in module.student.named_parameters() if p.requires_grad}
    assert config.student.lora is not None
    tensors = adapter_weights(trained, config.student.lora)
    write_folder(tmp_path / "adapter", published_config(module.student), tensors, {"type": "GMFlow", "nfe": 4})
    loaded = load_piflow_adapter(build_teacher(config), tmp_path / "adapter")
    module.eval()  # without the dropout of low-rank updates
    inputs = inputs_of(module, config)
    with torch.no_grad():
        for found, expected in zip(loaded(**inputs), module.student(**inputs)):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_tokens_are_packed_as_pipelines_do() -> None:
    from diffusers import Flux2Pipeline, QwenImagePipeline

    latents = torch.randn(2, 4, 6, 8, generator=Generator().manual_seed(0))
    packed = TextCalls("qwen_image", 16).state(latents)
    assert torch.equal(packed, QwenImagePipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(packed, TextCalls("flux2", 16).state(Flux2Pipeline._patchify_latents(latents)))


@pytest.mark.parametrize(("kind", "size"), [("flux", (6, 8)), ("flux2", (6, 8)), ("flux2", (3, 4))])
def test_positions_are_those_of_pipelines(kind: str, size: tuple[int, int]) -> None:
    from diffusers import Flux2Pipeline, FluxPipeline

    condition = {"prompt_embeds": torch.zeros(1, 5, 2), "pooled": torch.zeros(1, 3)}
    inputs = TextCalls(kind, 16).inputs(torch.zeros(1, 12, 16), torch.ones(1), condition, size)
    if kind == "flux":
        image, text = FluxPipeline._prepare_latent_image_ids(1, 3, 4, "cpu", torch.float32), torch.zeros(5, 3)
    else:
        image = Flux2Pipeline._prepare_latent_ids(torch.zeros(1, 16, 3, 4))[0]
        text = Flux2Pipeline._prepare_text_ids(condition["prompt_embeds"])[0]
    assert torch.equal(inputs["img_ids"], image.float())
    assert torch.equal(inputs["txt_ids"], text.float())


def test_padding_of_joined_prompts_changes_nothing() -> None:
    """Both branches of guidance in one call: each sample gets what it would get alone."""
    config = config_of("qwen_image/gm_4nfe")
    module = build_module(config)
    batch = first_batch(config)
    condition, null = module.calls.conditions(batch)
    assert condition["prompt_embeds"].shape[1] > null["prompt_embeds"].shape[1]
    x_t, sigma, size = module.calls.state(batch["latents"]), torch.tensor([0.9, 0.4]), tuple(batch["latents"].shape[2:])
    with torch.no_grad():
        both = module.calls.inputs(torch.cat([x_t, x_t]), torch.cat([sigma, sigma]), joined(condition, null), size)
        together = module.teacher(**both, return_dict=False)[0]
        alone = [
            module.teacher(**module.calls.inputs(x_t, sigma, c, size), return_dict=False)[0] for c in (condition, null)
        ]
        guided = module.teacher_velocity(condition, null, size)(x_t, sigma)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    expected = alone[1] + config.distillation.guidance_scale * (alone[0] - alone[1])
    torch.testing.assert_close(guided, expected, atol=1e-4, rtol=1e-4)


def test_dynamic_shift_follows_the_number_of_tokens() -> None:
    settings = "distillation.dynamic_shift={base_seq_len: 4, max_seq_len: 12, base_logshift: 0.0, max_logshift: 1.0}"
    config = config_of("flux/gm_4nfe", settings)
    module = build_module(config)
    module(first_batch(config), 0, Generator().manual_seed(0))
    assert module.last is not None
    assert module.schedule.shift_for(12) == pytest.approx(2.718281828)
    fixed = build_module(config_of("flux/gm_4nfe"))
    fixed(first_batch(config), 0, Generator().manual_seed(0))
    assert fixed.last is not None
    assert not torch.allclose(module.last.sigmas, fixed.last.sigmas)


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        (
            "flux/gm_4nfe",
            "student.lora.targets=[ff.net.2, to_x]",
            r"`to_x` is the end of no linear layer.*Near it",
        ),
        ("flux/dx_4nfe", "student.lora.targets=[proj_out_means]", "`proj_out_means` is the end of no linear layer"),
        ("flux/gm_4nfe", "distillation.embedded_guidance=null", "takes guidance as input: set distillation.embedded"),
        ("flux2/gm_4nfe", "teacher.random.guidance_embeds=false", "takes no guidance as input: leave out"),
        ("flux/gm_4nfe", "data.random.prompt_width=7", r"joint_attention_dim\) of width 24, the data 7"),
        ("flux/gm_4nfe", "data.random.pooled_width=7", r"pooled_projection_dim\) of width 12, the data 7"),
        ("flux/gm_4nfe", "data.random.prompt_width=null", "teacher.kind=flux needs prompts"),
        ("flux/gm_4nfe", "data.random.latents=[5, 8, 6]", "its tokens have 16 channels, so latents have 4 "),
        ("flux/gm_4nfe", "data.random.latents=[4, 7, 6]", "do not divide into tokens of 2 x 2"),
        ("flux/gm_4nfe", "data.random.latents=null", "distillation.data_free=false needs latents"),
        ("flux/gm_4nfe_data_free", "distillation.latent_shape=null", r"Set distillation.latent_shape: \[C, H, W\]"),
        (
            "flux/gm_4nfe_data_free",
            "data.random.latents=[4, 8, 8]",
            r"latent_shape \[4, 8, 6\] is not that of the",
        ),
        ("flux/gm_4nfe", "teacher.random.nonsense=1", "teacher.random is no configuration of a FluxTransformer2DModel"),
        ("flux/gm_4nfe", "teacher.random=null", "teacher.kind=flux needs teacher.path"),
        ("imagenet/dit_1nfe_fm", "data.random.num_classes=9", r"10 classes \(num_embeds_ada_norm\), the data 9"),
    ],
)
def test_what_does_not_fit_is_named(recipe: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_module(config_of(recipe, override))


def test_a_teacher_of_another_class_is_named_before_it_is_read(tmp_path: Path) -> None:
    overrides = ("teacher.random=null", f"teacher.path={tmp_path}")
    config = config_of("qwen_image/gm_4nfe", *overrides)
    with pytest.raises(ConfigError, match=r"has no readable config\.json"):
        build_module(config)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    expected = r"holds a FluxTransformer2DModel, this recipe needs a QwenImageTransformer2DModel\. Set teacher.kind="
    with pytest.raises(ConfigError, match=expected):
        build_module(config)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ConfigError, match=r"holds a UNet2DModel.*Give the folder of a QwenImageTransformer2DModel"):
        build_module(config, meta=True)
    pipeline = config_of("qwen_image/gm_4nfe", "teacher.random=null", f"teacher.path={tmp_path / 'pipeline'}")
    (tmp_path / "pipeline" / "transformer").mkdir(parents=True)
    (tmp_path / "pipeline" / "transformer" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds a whole pipeline. Give .*transformer"):
        build_module(pipeline)


def test_eight_bits_without_bitsandbytes_or_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("flux/gm_4nfe", "optimizer.kind=adamw_8bit")
    with monkeypatch.context() as without:
        without.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"needs bitsandbytes: `pip install 'piflow\[quantization\]'`"):
            build_optimizer(nn.Linear(2, 2), config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a GPU, this machine has none"):
        check_optimizer(config)
    check_optimizer(config, needs_gpu=False)  # of a dry run, for another machine
