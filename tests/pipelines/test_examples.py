"""Every example runs at tiny size, by the functions that it consists of; what would be downloaded is a folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky6TI2VAPipeline,
    Kandinsky6Transformer3DModel,
    PiflowScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from piflow.models import DXKandinsky6Transformer3DModel
from piflow.schedulers import FusedPiflowScheduler
from tests.golden_vectors import GOLDEN
from tests.pipelines.tiny import FAMILIES, flux2_prompt, flux_prompt, picture, qwen_prompt, qwen_vae, seeded

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen-Image of the size that the reference's adapter was made for, as diffusers saves it."""
    folder = tmp_path_factory.mktemp("base")
    transformer = QwenImageTransformer2DModel.from_pretrained(GOLDEN / "g08_lora_base_qwen")
    QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), qwen_vae(), None, None, transformer).save_pretrained(folder)
    return folder


@pytest.fixture
def local(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of `load` that need no network, no GPU and no text encoder."""
    ours = example("gm_qwen").PiQwenImagePipeline
    load = ours.from_pretrained.__func__
    without = {"text_encoder": None, "tokenizer": None}
    monkeypatch.setattr(ours, "from_pretrained", classmethod(lambda cls, path, **k: load(cls, path, **k, **without)))
    return {
        "base": str(base_folder),
        "adapter": str(GOLDEN / "g08_export_gmqwen"),
        "subfolder": None,
        "device": "cpu",
    }


def half(prompt: dict[str, Any]) -> dict[str, Any]:
    return {key: value.bfloat16() if value.is_floating_point() else value for key, value in prompt.items()}


def test_gm_qwen(local: dict[str, Any]) -> None:
    gm_qwen = example("gm_qwen")
    pipe = gm_qwen.load(**local)
    image = gm_qwen.generate(pipe, None, width=30, height=18, **half(qwen_prompt()))
    assert image.size == (30, 18)
    assert np.asarray(image).std() > 1


def test_style_lora(local: dict[str, Any], tmp_path: Path) -> None:
    style_lora = example("style_lora")
    transformer = QwenImageTransformer2DModel.from_pretrained(GOLDEN / "g08_lora_base_qwen")
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    QwenImagePipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(transformer))
    pipe, name = style_lora.load(**local, style=str(tmp_path))
    small = {"prompt": None, "width": 16, "height": 16, "num_inference_steps": 4, **half(qwen_prompt())}
    images = {title: np.asarray(image) for title, image in style_lora.compare(pipe, name, **small).items()}
    assert list(images) == ["style 0.0", "style 0.5", "style 1.0", "base"]
    assert len({image.tobytes() for image in images.values()}) == 4


def test_two_adapters_of_gm_flux() -> None:
    gm_flux = example("gm_flux")
    pipe = FAMILIES["flux"].pipe()
    images = [gm_flux.generate(pipe, None, nfe=nfe, width=16, height=12, **flux_prompt()) for nfe in (4, 8)]
    assert images[0].size == (16, 12)
    assert images[0].tobytes() != images[1].tobytes()


def test_dx() -> None:
    for name, prompt in (("qwen", qwen_prompt()), ("flux", flux_prompt())):
        module = example(f"dx_{name}")
        image = module.generate(FAMILIES[name].pipe("DX"), None, width=16, height=12, **prompt)
        assert image.size == (16, 12)


def test_gm_flux2() -> None:
    gm_flux2 = example("gm_flux2")
    pipe = FAMILIES["flux2"].pipe()
    assert gm_flux2.generate(pipe, None, width=16, height=12, **flux2_prompt()).size == (16, 12)
    edited = gm_flux2.edit(pipe, [picture((64, 80)), picture((72, 64))], None, **flux2_prompt())
    assert edited.size == (64, 80)


def test_dit_digits(tmp_path: Path) -> None:
    dit_digits = example("dit_digits")
    pipe = dit_digits.load(tmp_path / "no student yet")
    pipe.set_progress_bar_config(disable=True)
    fresh = dit_digits.sheet(pipe, rows=1, num_inference_steps=4)
    assert isinstance(fresh, Image.Image)
    assert fresh.size == (320, 32)
    pipe.transformer.save_pretrained(tmp_path / "student")
    again = dit_digits.load(tmp_path / "student")
    again.set_progress_bar_config(disable=True)
    assert dit_digits.sheet(again, rows=1, num_inference_steps=4).tobytes() == fresh.tobytes()
    pipe.transformer = dit_digits.load_teacher()
    assert dit_digits.sheet(pipe, rows=1, num_inference_steps=8, guidance_scale=2.0).tobytes() != fresh.tobytes()


@pytest.fixture(scope="module")
def kandinsky() -> Kandinsky6TI2VAPipeline:
    teacher = seeded(
        lambda: Kandinsky6Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=24,
            in_text_dim2=12,
            time_dim=16,
            model_dim=24,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(4, 4, 4),
            in_audio_dim=5,
            out_audio_dim=5,
            visual_token_type_num_embeddings=2,
        )
    )
    vae = seeded(
        lambda: AutoencoderKLHunyuanVideo(
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            layers_per_block=1,
            norm_num_groups=2,
        )
    )
    student = DXKandinsky6Transformer3DModel.from_teacher(teacher, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, parameter in student.named_parameters():
            if "out_layer" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
    scheduler = PiflowScheduler(n_grid=4, shift=5.0)
    pipe = Kandinsky6TI2VAPipeline(student, vae, None, None, None, None, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("image", [None, picture((32, 16))], ids=["text", "image"])
def test_kandinsky6(kandinsky: Kandinsky6TI2VAPipeline, image: Image.Image | None) -> None:
    """The drop-in scheduler in diffusers' pipeline, against PiflowScheduler."""
    module = example("kandinsky6")
    generator = torch.Generator().manual_seed(0)
    prompt = {
        "prompt_embeds": torch.randn(1, 6, 24, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 12, generator=generator),
    }
    small = {"height": 16, "width": 32, "num_frames": 5, "num_inference_steps": 4, "sample_audio": False}

    def frames(output_type: str) -> Any:
        return module.generate(kandinsky, None, image=image, output_type=output_type, **prompt, **small).frames

    theirs = kandinsky.scheduler = PiflowScheduler.from_config(kandinsky.scheduler.config)
    expected = frames("latent")
    module.fuse(kandinsky)
    assert isinstance(kandinsky.scheduler, FusedPiflowScheduler)
    assert dict(kandinsky.scheduler.config) == dict(theirs.config)
    torch.testing.assert_close(frames("latent"), expected, atol=1e-5, rtol=0)
    assert frames("np").shape == (1, 5, 16, 32, 3)
