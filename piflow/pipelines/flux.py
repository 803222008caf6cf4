"""pi-FLUX.1: few-step students in diffusers' FLUX pipelines."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from torch import Tensor

from .denoise import DEFAULT_NFE, ImageStartMixin, PiFlowPipelineMixin

DEFAULTS = {"num_inference_steps": DEFAULT_NFE, "guidance_scale": 3.5}


class PiFluxMixin(PiFlowPipelineMixin):
    """What the FLUX pipelines share."""

    student_defaults: ClassVar[dict[str, Any]] = DEFAULTS

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """diffusers' embeddings; those that the caller gives are repeated for each image too, which diffusers omits."""
        encode = super().encode_prompt  # type: ignore[misc]
        given = inspect.signature(encode).bind(*args, **kwargs).arguments
        embeddings, pooled, ids = encode(*args, **kwargs)
        if given.get("prompt_embeds") is not None:
            images = given.get("num_images_per_prompt", 1)
            embeddings, pooled = (x.repeat_interleave(images, dim=0) for x in (embeddings, pooled))
        return embeddings, pooled, ids


class PiFluxPipeline(PiFluxMixin, FluxPipeline):
    """FluxPipeline with a `GMFluxTransformer2DModel`, a DX student, or the base model as transformer.

    `guidance_scale` (3.5) is FLUX's embedded guidance.
    """


class PiFluxImg2ImgPipeline(PiFluxMixin, ImageStartMixin, FluxImg2ImgPipeline):
    """FluxImg2ImgPipeline with a student: of the nfe steps, the last `strength` nfe are taken."""


class PiFluxInpaintPipeline(PiFluxMixin, ImageStartMixin, FluxInpaintPipeline):
    """FluxInpaintPipeline with a student: of the nfe steps, the last `strength` nfe are taken."""

    def _latents_shape(self, batch: int, rows: int, columns: int, channels: int) -> tuple[int, ...]:
        return batch, channels // 4, 2 * rows, 2 * columns
