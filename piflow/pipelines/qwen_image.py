"""pi-Qwen-Image: few-step students in diffusers' Qwen-Image pipelines."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import QwenImageImg2ImgPipeline, QwenImageInpaintPipeline, QwenImagePipeline
from torch import Tensor

from .denoise import DEFAULT_NFE, ImageStartMixin, PiFlowPipelineMixin

DEFAULTS = {"num_inference_steps": DEFAULT_NFE, "true_cfg_scale": 1.0}


class PiQwenImagePipeline(PiFlowPipelineMixin, QwenImagePipeline):
    """QwenImagePipeline with a `GMQwenImageTransformer2DModel`, a DX student, or the base model as transformer."""

    student_defaults: ClassVar[dict[str, Any]] = DEFAULTS


class PiQwenImageImg2ImgPipeline(ImageStartMixin, QwenImageImg2ImgPipeline):
    """QwenImageImg2ImgPipeline with a student: of the nfe steps, the last `strength` nfe are taken."""

    student_defaults: ClassVar[dict[str, Any]] = DEFAULTS


class PiQwenImageInpaintPipeline(ImageStartMixin, QwenImageInpaintPipeline):
    """QwenImageInpaintPipeline with a student: of the nfe steps, the last `strength` nfe are taken."""

    student_defaults: ClassVar[dict[str, Any]] = DEFAULTS

    def _check_latents(self, latents: Tensor | None, grid: tuple[int, int, int]) -> None:
        if latents is not None:
            raise ValueError("latents: QwenImageInpaintPipeline of diffusers makes its own, give a generator instead")
