"""What the apps need of a pipeline beyond its call: the noise that it starts from, and latents as pictures."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Flux2Pipeline, QwenImagePipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from piflow.pipelines import PiDiTPipeline

QWEN_IMAGE_GUIDANCE: dict[str, Any] = {"negative_prompt": " ", "true_cfg_scale": 4.0}
"""How Qwen-Image's base model is commonly called; the other bases have their guidance embedded."""


def start_noise(pipe: Any, width: int, height: int, generator: Generator | list[Generator], batch: int = 1) -> Tensor:
    """The noise (float32) that the student's call draws from `generator`, as its argument `latents` takes it.

    Given to base model and student, both start from the same noise; a base model alone would draw in its own dtype.
    """
    config = pipe.transformer.config
    channels = config.in_channels
    if isinstance(pipe, PiDiTPipeline):
        shape = (batch, channels, config.sample_size, config.sample_size)
    else:
        rows, columns = (size // (2 * pipe.vae_scale_factor) for size in (height, width))
        shape = (batch, channels, rows, columns)
        if not isinstance(pipe, Flux2Pipeline):
            shape = (batch, channels // 4, 2 * rows, 2 * columns)
    noise = randn_tensor(shape, generator, pipe._execution_device, torch.float32)
    return noise if isinstance(pipe, PiDiTPipeline | Flux2Pipeline) else pipe._pack_latents(noise, *shape)


def spatial(pipe: Any, latents: Tensor, width: int, height: int) -> Tensor:
    """Packed tokens (B, T, C) of FLUX.2 as (B, C, H, W), a pixel for each token."""
    rows, columns = (size // (2 * pipe.vae_scale_factor) for size in (height, width))
    return latents.transpose(1, 2).unflatten(2, (rows, columns))


def vae_latents(pipe: Any, latents: Tensor, width: int, height: int) -> Tensor:
    """Packed tokens (B, T, C) of a text-to-image pipeline as its VAE takes them, (B, C, H, W) or (B, C, 1, H, W).

    The steps are those at the end of diffusers' pipelines, which have no method for them.
    """
    vae = pipe.vae
    if isinstance(pipe, Flux2Pipeline):
        latents = spatial(pipe, latents, width, height)
        mean, variance = (x.view(1, -1, 1, 1).to(latents) for x in (vae.bn.running_mean, vae.bn.running_var))
        return pipe._unpatchify_latents(latents * (variance + vae.config.batch_norm_eps).sqrt() + mean).to(vae.dtype)
    latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor).to(vae.dtype)
    if isinstance(pipe, QwenImagePipeline):
        mean, std = (
            torch.tensor(numbers).view(1, -1, 1, 1, 1).to(latents)
            for numbers in (vae.config.latents_mean, vae.config.latents_std)
        )
        return latents * std + mean
    return latents / vae.config.scaling_factor + vae.config.shift_factor


@torch.no_grad()
def decode(pipe: Any, latents: Tensor, width: int, height: int, output_type: str = "pil") -> Any:
    """The pictures of latents as callbacks see them: packed tokens (B, T, C), or (B, C, H, W) of a DiT.

    output_type: "pil", or "pt" for (B, 3, H, W) within [0, 1].
    """
    if isinstance(pipe, PiDiTPipeline):
        return pipe._decode(latents, output_type)
    pixels = pipe.vae.decode(vae_latents(pipe, latents, width, height), return_dict=False)[0]
    pixels = pixels[:, :, 0] if isinstance(pipe, QwenImagePipeline) else pixels
    return pipe.image_processor.postprocess(pixels, output_type=output_type)


class Trajectory:
    """A `callback_on_step_end` that keeps, of each step, the noise level reached and the picture it was heading for.

        x_0 = x_dst - sigma_dst (x_src - x_dst) / (sigma_src - sigma_dst)

    which follows the step's mean velocity down to noise level 0; of Euler steps it is the denoised prediction, of the
    last step the end itself. For deterministic steps (h = 0).
    """

    def __init__(self, noise: Tensor) -> None:
        self.x_src = noise
        self.predictions: list[tuple[float, Tensor]] = []

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        x_dst = tensors["latents"].float()
        sigma_src, sigma_dst = (float(sigma) for sigma in pipe.scheduler.sigmas[step : step + 2])
        x_src = self.x_src.to(x_dst)
        if x_src.dim() > x_dst.dim():  # FLUX.2 takes its noise in the spatial layout
            x_src = x_src.flatten(2).transpose(1, 2)
        self.predictions.append((sigma_dst, x_dst - sigma_dst * (x_src - x_dst) / (sigma_src - sigma_dst)))
        self.x_src = x_dst
        return {}
