"""Real pipelines at tiny size: every component is the real class with random weights, one token is 4x4 pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
)
from diffusers.models.autoencoders import AutoencoderKLQwenImage
from PIL import Image
from torch import Tensor, nn

from piflow import models
from piflow.pipelines import (
    PiDiTPipeline,
    PiFlux2Pipeline,
    PiFluxImg2ImgPipeline,
    PiFluxInpaintPipeline,
    PiFluxPipeline,
    PiQwenImageImg2ImgPipeline,
    PiQwenImageInpaintPipeline,
    PiQwenImagePipeline,
)
from piflow.schedulers import FlowMapSDEScheduler
from tests.golden_vectors import GOLDEN

SCHEDULE = {"shift": 3.2, "final_step_size_scale": 0.5}
TEXT_WIDTH, POOLED_WIDTH, TEXT_TOKENS = 24, 12, 6


def seeded(build: Callable[[], Any]) -> Any:
    """The module that `build` makes, in evaluation mode, the same one each time; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


@cache
def qwen_base() -> QwenImageTransformer2DModel:
    return seeded(
        lambda: QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(4, 6, 6),
        )
    )


@cache
def flux_base() -> FluxTransformer2DModel:
    return seeded(
        lambda: FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=POOLED_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
    )


@cache
def flux2_base() -> Flux2Transformer2DModel:
    return seeded(
        lambda: Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        )
    )


@cache
def dit_base() -> DiTTransformer2DModel:
    return seeded(
        lambda: DiTTransformer2DModel(
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            sample_size=8,
            num_embeds_ada_norm=10,
            norm_type="ada_norm_zero",
        )
    )


@cache
def qwen_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage.from_pretrained(GOLDEN / "g09_qwen_vae")


@cache
def vae() -> AutoencoderKL:
    return seeded(
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            norm_num_groups=2,
            latent_channels=4,
            scaling_factor=0.7,
            shift_factor=0.1,
        )
    )


@cache
def flux2_vae() -> AutoencoderKLFlux2:
    return seeded(
        lambda: AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            norm_num_groups=2,
            latent_channels=4,
        )
    )


def student_of(base: nn.Module, kind: str) -> nn.Module:
    """A GM or DX student with the teacher's body and a head disturbed so that policies are not its velocity."""
    name = {"GM": {"DiTTransformer2DModel": "GMDiTTransformer2DModelV2"}}.get(kind, {}).get(
        type(base).__name__, kind + type(base).__name__
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        student = getattr(models, name).from_teacher(base, *([3] if kind == "GM" else [4])).eval()
        for path, parameter in student.named_parameters():
            if path.startswith("proj_out"):
                parameter.data += 0.1 * torch.randn_like(parameter)
    return student


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A random image of (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def text(prompts: int = 1, seed: int = 0) -> Tensor:
    """Prompt embeddings (B, 6, 24)."""
    return torch.randn(prompts, TEXT_TOKENS, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def pooled(prompts: int = 1, seed: int = 0) -> Tensor:
    """Pooled prompt embeddings (B, 12)."""
    return torch.randn(prompts, POOLED_WIDTH, generator=torch.Generator().manual_seed(seed + 100))


def qwen_prompt(prompts: int = 1) -> dict[str, Tensor]:
    return {
        "prompt_embeds": text(prompts),
        "prompt_embeds_mask": torch.ones(prompts, TEXT_TOKENS, dtype=torch.int64),
    }


def flux_prompt(prompts: int = 1) -> dict[str, Tensor]:
    return {"prompt_embeds": text(prompts), "pooled_prompt_embeds": pooled(prompts)}


def flux2_prompt(prompts: int = 1) -> dict[str, Tensor]:
    return {"prompt_embeds": text(prompts)}


SIZE = {"height": 16, "width": 12}
IMAGE = {"image": picture((12, 16)), "strength": 0.5}
MASK = {**IMAGE, "mask_image": Image.fromarray(np.repeat([[0], [255]], 8, axis=0).repeat(12, axis=1).astype(np.uint8))}


@dataclass(frozen=True)
class Family:
    """How to build one pipeline class, and the arguments of its calls."""

    cls: type
    base: Callable[[], nn.Module]
    vae: Callable[[], nn.Module]
    prompt: Callable[..., dict[str, Any]]
    call: dict[str, Any]
    empty: tuple[str, ...]

    def pipe(self, kind: str = "GM", scheduler: Any = None, **parts: Any) -> Any:
        """A pipeline with a "GM" or "DX" student, or with the "base" model."""
        transformer = self.base() if kind == "base" else student_of(self.base(), kind)
        scheduler = FlowMapSDEScheduler(**SCHEDULE) if scheduler is None else scheduler
        parts = {**dict.fromkeys(self.empty), "transformer": transformer, "vae": self.vae(), **parts}
        pipe = self.cls(scheduler=scheduler, **parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def arguments(self, prompts: int = 1, seed: int | None = 0, **changes: Any) -> dict[str, Any]:
        """Of a call for latents of `prompts` prompts."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return {**self.prompt(prompts), **self.call, "generator": generator, "output_type": "latent", **changes}


def labels(prompts: int = 1) -> dict[str, Any]:
    return {"class_labels": list(range(prompts))}


QWEN = partial(Family, base=qwen_base, vae=qwen_vae, prompt=qwen_prompt, empty=("text_encoder", "tokenizer"))
FLUX = partial(
    Family,
    base=flux_base,
    vae=vae,
    prompt=flux_prompt,
    empty=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
)
FAMILIES = {
    "qwen": QWEN(PiQwenImagePipeline, call=SIZE),
    "qwen-img2img": QWEN(PiQwenImageImg2ImgPipeline, call=SIZE | IMAGE),
    "qwen-inpaint": QWEN(PiQwenImageInpaintPipeline, call=SIZE | MASK),
    "flux": FLUX(PiFluxPipeline, call=SIZE),
    "flux-img2img": FLUX(PiFluxImg2ImgPipeline, call=SIZE | IMAGE),
    "flux-inpaint": FLUX(PiFluxInpaintPipeline, call=SIZE | MASK),
    "flux2": Family(PiFlux2Pipeline, flux2_base, flux2_vae, flux2_prompt, SIZE, ("text_encoder", "tokenizer")),
    "flux2-edit": Family(
        PiFlux2Pipeline,
        flux2_base,
        flux2_vae,
        flux2_prompt,
        {**SIZE, "image": [picture((64, 64)), picture((64, 80), seed=1)]},
        ("text_encoder", "tokenizer"),
    ),
    "dit": Family(PiDiTPipeline, dit_base, vae, labels, {}, ()),
}
