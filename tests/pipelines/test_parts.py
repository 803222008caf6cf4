"""Base models and adapters in place of a student, folders, text encoders, offloading."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from piflow.pipelines import PiFluxPipeline, PiQwenImagePipeline
from piflow.schedulers import FlowMapSDEScheduler
from tests.golden_vectors import GOLDEN
from tests.pipelines.tiny import FAMILIES, SCHEDULE, SIZE, TEXT_WIDTH, Family, qwen_base, qwen_vae, seeded

THEIRS = {
    "qwen": QwenImagePipeline,
    "qwen-img2img": QwenImageImg2ImgPipeline,
    "qwen-inpaint": QwenImageInpaintPipeline,
    "flux": FluxPipeline,
    "flux-img2img": FluxImg2ImgPipeline,
    "flux-inpaint": FluxInpaintPipeline,
    "flux2": Flux2Pipeline,
    "flux2-edit": Flux2Pipeline,
}
EULER = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}


@pytest.mark.parametrize("name", THEIRS)
def test_a_base_model_runs_as_in_diffusers(name: str) -> None:
    """Bit for bit, with diffusers' defaults and its rounding of sizes."""
    family = FAMILIES[name]
    pipe = family.pipe("base", FlowMatchEulerDiscreteScheduler(**EULER))
    theirs = THEIRS[name](**pipe.components)
    theirs.set_progress_bar_config(disable=True)
    for arguments in ({"num_inference_steps": 3}, {"num_inference_steps": 4, "height": 18}):
        ours = pipe(**family.arguments(**arguments)).images
        assert torch.equal(ours, theirs(**family.arguments(**arguments)).images)


def test_a_base_model_under_a_students_scheduler_takes_euler_steps() -> None:
    family = FAMILIES["flux"]
    pipe = family.pipe("base", FlowMapSDEScheduler(shift=3.2))
    euler = family.pipe("base", FlowMatchEulerDiscreteScheduler(shift=3.2))
    assert torch.equal(pipe(**family.arguments()).images, euler(**family.arguments()).images)
    assert isinstance(pipe.scheduler, FlowMapSDEScheduler)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_student_under_the_base_models_scheduler_gets_the_published_one(family: Family) -> None:
    pipe = family.pipe(scheduler=FlowMatchEulerDiscreteScheduler(**EULER))
    expected = family.pipe(scheduler=FlowMapSDEScheduler(**family.cls.student_schedule))
    assert torch.equal(pipe(**family.arguments()).images, expected(**family.arguments()).images)
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    assert FAMILIES["qwen"].cls.student_schedule == SCHEDULE


def adapted_pipe() -> tuple[Any, Any]:
    """A base pipeline of the reference's tiny base, ours and diffusers'."""
    base = QwenImageTransformer2DModel.from_pretrained(GOLDEN / "g08_lora_base_qwen")
    scheduler = FlowMatchEulerDiscreteScheduler(**EULER)
    pipes = [cls(scheduler, qwen_vae(), None, None, base) for cls in (PiQwenImagePipeline, QwenImagePipeline)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes[0], pipes[1]


def test_an_adapter_switched_on_and_off() -> None:
    """On, off, on, unloaded: the student's images and the base model's, bit for bit."""
    pipe, theirs = adapted_pipe()
    family = FAMILIES["qwen"]

    def images(pipe: Any, **arguments: Any) -> Any:
        return pipe(**family.arguments(**arguments)).images

    base = images(theirs, num_inference_steps=4)
    assert torch.equal(images(pipe, num_inference_steps=4), base)
    name = pipe.load_piflow_adapter(GOLDEN / "g08_export_gmqwen")
    student = images(pipe)
    assert not torch.allclose(student, base, atol=1e-2)
    pipe.disable_piflow_adapter()
    assert torch.equal(images(pipe, num_inference_steps=4), base)
    pipe.enable_piflow_adapter()
    assert torch.equal(images(pipe), student)
    pipe.set_adapters([name], [0.5])
    assert not torch.equal(images(pipe), student)
    pipe.set_adapters([name], [1.0])
    assert torch.equal(images(pipe), student)
    pipe.unload_piflow_adapter()
    assert torch.equal(images(pipe, num_inference_steps=4), base)


def test_a_wrong_adapter_leaves_the_pipeline_as_it_was() -> None:
    family = FAMILIES["qwen"]
    pipe, _ = adapted_pipe()
    before = pipe(**family.arguments(num_inference_steps=3)).images
    flux = FAMILIES["flux"].pipe("base")
    with pytest.raises(ValueError, match="FluxTransformer2DModel"):
        flux.load_piflow_adapter(GOLDEN / "g08_export_gmqwen")
    with pytest.raises(FileNotFoundError):
        pipe.load_piflow_adapter(GOLDEN / "g08_export_gmqwen", subfolder="missing")
    assert torch.equal(pipe(**family.arguments(num_inference_steps=3)).images, before)
    assert isinstance(flux, PiFluxPipeline)


@pytest.fixture(scope="module")
def text_parts() -> dict[str, Any]:
    """A real Qwen2.5-VL of one layer, and a tokenizer of bytes."""
    vocabulary = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[])
    language = {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": len(vocabulary),
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4},
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH}
    config = Qwen2_5_VLConfig(text_config=language, vision_config=vision)
    return {"text_encoder": seeded(lambda: Qwen2_5_VLForConditionalGeneration(config)), "tokenizer": tokenizer}


def prompted(pipe: Any, prompt: Any = "a cat", **arguments: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, generator=generator, output_type="latent", **SIZE, **arguments).images


def test_prompts(text_parts: dict[str, Any]) -> None:
    """Strings, lists and embeddings of them give the same images; negative prompts need a guidance scale."""
    pipe = FAMILIES["qwen"].pipe(**text_parts)
    one = prompted(pipe)
    embeds, mask = pipe.encode_prompt("a cat")
    assert torch.equal(one, prompted(pipe, None, prompt_embeds=embeds, prompt_embeds_mask=mask))
    assert not torch.equal(one, prompted(pipe, "a dog in the snow"))
    assert prompted(pipe, ["a cat", "a dog in the snow"], num_images_per_prompt=2).shape == (4, 12, 16)
    assert torch.equal(one, prompted(pipe, negative_prompt="a dog"))
    assert not torch.equal(one, prompted(pipe, negative_prompt="a dog", true_cfg_scale=3.0))
    with pytest.raises(ValueError, match="prompt: expected a string or a list of strings, got an empty list"):
        prompted(pipe, [])


def test_from_a_base_models_folder(text_parts: dict[str, Any], tmp_path: Path) -> None:
    """model_index.json of diffusers' own pipeline; the base model runs, and a student put in its place."""
    theirs = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**EULER), vae=qwen_vae(), transformer=qwen_base(), **text_parts
    )
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path)
    pipe = PiQwenImagePipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(prompted(pipe, num_inference_steps=3), prompted(theirs, num_inference_steps=3))
    student = FAMILIES["qwen"].pipe(**text_parts)
    pipe.transformer = student.transformer
    assert torch.equal(prompted(pipe), prompted(student))


@pytest.mark.parametrize("kind", ["GM", "DX"])
def test_save_and_load(text_parts: dict[str, Any], tmp_path: Path, kind: str) -> None:
    scheduler = FlowMapSDEScheduler(shift=2.5, h="inf")
    pipe = FAMILIES["qwen"].pipe(kind, scheduler, **text_parts)
    expected = prompted(pipe)  # before it is saved: a call leaves no trace in the configuration
    pipe.save_pretrained(tmp_path)
    again = PiQwenImagePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.transformer) is type(pipe.transformer)
    assert again.scheduler.config.shift == 2.5
    assert torch.equal(prompted(again), expected)


def test_saving_keeps_what_the_adapter_said_of_its_policy(tmp_path: Path) -> None:
    family = FAMILIES["qwen"]
    pipe = family.pipe("DX")
    plain = pipe(**family.arguments(num_inference_steps=8)).images
    pipe.transformer.policy_config = {"type": "DX", "segment_size": 1 / 3.5}
    expected = pipe(**family.arguments(num_inference_steps=8)).images
    assert not torch.equal(plain, expected)
    pipe.save_pretrained(tmp_path / "first")
    for folder, following in (("first", "second"), ("second", "third")):
        again = family.cls.from_pretrained(tmp_path / folder, **dict.fromkeys(family.empty))
        again.set_progress_bar_config(disable=True)
        assert torch.equal(again(**family.arguments(num_inference_steps=8)).images, expected)
        again.save_pretrained(tmp_path / following)


def test_a_pipeline_is_not_saved_with_an_adapter_on_it(tmp_path: Path) -> None:
    pipe, _ = adapted_pipe()
    pipe.load_piflow_adapter(GOLDEN / "g08_export_gmqwen")
    with pytest.raises(ValueError, match=r"save_pretrained: .* save after unload_piflow_adapter\(\)"):
        pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    pipe.unload_piflow_adapter()
    pipe.save_pretrained(tmp_path)
    assert QwenImageTransformer2DModel.from_pretrained(tmp_path / "transformer")


@pytest.mark.parametrize("name", ["dit", "flux2"])
def test_save_and_load_without_a_text_encoder(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    pipe = family.pipe(**({"vae": None} if name == "dit" else {}))
    pipe.save_pretrained(tmp_path)
    again = family.cls.from_pretrained(tmp_path, **dict.fromkeys(family.empty))
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(**family.arguments()).images, pipe(**family.arguments()).images)


@pytest.mark.parametrize("name", ["qwen", "flux-img2img", "flux2-edit", "dit"])
def test_offloading_by_model(name: str) -> None:
    """With the CPU as accelerator: the hooks are put on again after each call, the transformer's among them."""
    family = FAMILIES[name]
    pipe = family.pipe(vae=copy.deepcopy(family.vae()))
    expected = pipe(**family.arguments(output_type="np")).images
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert (pipe(**family.arguments(output_type="np")).images == expected).all()
        assert len(pipe._all_hooks) == 2
        assert hasattr(pipe.transformer, "_hf_hook")
    pipe.remove_all_hooks()
    assert not hasattr(pipe.transformer, "_hf_hook")


@pytest.mark.parametrize("name", ["qwen", "flux-img2img", "flux2-edit"])
def test_offloading_by_group(name: str) -> None:
    family = FAMILIES[name]
    pipe = family.pipe(vae=copy.deepcopy(family.vae()))
    expected = pipe(**family.arguments(output_type="np")).images
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert (pipe(**family.arguments(output_type="np")).images == expected).all()
