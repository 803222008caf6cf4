"""Kandinsky 6, distilled: diffusers' own pipeline with each substep loop of its scheduler as one weighted sum."""

from typing import Any

import torch
from diffusers import Kandinsky6TI2VAPipeline
from diffusers.utils import encode_video

from piflow.schedulers import FusedPiflowScheduler

PROMPT = "Two otters build a tower of pebbles by a river; it falls over. Sound of water and of stones"


def load(base: str = "kandinskylab/Kandinsky-6.0-Pro-distill-5s-Diffusers") -> Kandinsky6TI2VAPipeline:
    """The distilled model, whose transformer predicts a DX policy."""
    return Kandinsky6TI2VAPipeline.from_pretrained(base, dtype=torch.bfloat16)


def fuse(pipe: Kandinsky6TI2VAPipeline) -> Kandinsky6TI2VAPipeline:
    """The same pipeline and, to 1e-5, the same video: only the scheduler changes."""
    pipe.scheduler = FusedPiflowScheduler.from_config(pipe.scheduler.config)
    return pipe


def generate(pipe: Kandinsky6TI2VAPipeline, prompt: str | None = PROMPT, **arguments: Any) -> Any:
    """Frames and audio; distilled models run without guidance."""
    arguments = {"height": 480, "width": 864, "num_frames": 121, "num_inference_steps": 16, **arguments}
    generator = torch.Generator().manual_seed(42)
    return pipe(prompt, guidance_scale=1.0, generator=generator, **arguments)


if __name__ == "__main__":
    pipe = fuse(load())
    pipe.enable_model_cpu_offload()
    video = generate(pipe)
    encode_video(
        video.frames[0],
        fps=24,
        output_path="kandinsky6.mp4",
        audio=video.audio[0][None],
        audio_sample_rate=pipe.audio_sample_rate,
    )
