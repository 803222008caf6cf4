"""pi-FLUX.2: few-step students in diffusers' FLUX.2 pipeline."""

from __future__ import annotations

from typing import Any

from diffusers import Flux2Pipeline
from torch import Tensor

from .denoise import PiFlowPipelineMixin


class PiFlux2Pipeline(PiFlowPipelineMixin, Flux2Pipeline):
    """Flux2Pipeline with a `GMFlux2Transformer2DModel`, a DX student, or the base model as transformer.

    With `image`, one reference image or a list of them, it edits. `guidance_scale` (4) is FLUX.2's embedded guidance.
    """

    def _latents_shape(self, batch: int, rows: int, columns: int, channels: int) -> tuple[int, ...]:
        return batch, channels, rows, columns

    def _unpatchify_latents(self, latents: Any) -> Tensor:
        """diffusers' last step before the VAE, in the dtype that the VAE decodes in."""
        return Flux2Pipeline._unpatchify_latents(latents).to(self.vae.dtype)
