"""A style LoRA on top of a pi-Flow adapter, at three weights; then the base model without either."""

from typing import Any

import torch
from PIL import Image

from piflow.pipelines import PiQwenImagePipeline

PROMPT = "Portrait of an old fisherman mending a net, window light, photograph"


def load(
    base: str = "Qwen/Qwen-Image",
    adapter: str = "Lakonik/pi-Qwen-Image",
    subfolder: str | None = "gmqwen_k8_piid_4step",
    style: str = "flymy-ai/qwen-image-realism-lora",
    device: str = "cuda",
) -> tuple[PiQwenImagePipeline, str]:
    """The pipeline, and the name of its pi-Flow adapter; the style's is "style"."""
    pipe = PiQwenImagePipeline.from_pretrained(base, dtype=torch.bfloat16)
    name = pipe.load_piflow_adapter(adapter, subfolder=subfolder)
    pipe.load_lora_weights(style, adapter_name="style")
    return pipe.to(device), name


def generate(pipe: PiQwenImagePipeline, prompt: str | None = PROMPT, **arguments: Any) -> Image.Image:
    """An image from the same noise each time."""
    arguments = {"width": 1328, "height": 1328, **arguments}
    return pipe(prompt, generator=torch.Generator().manual_seed(42), **arguments).images[0]


def compare(pipe: PiQwenImagePipeline, name: str, **arguments: Any) -> dict[str, Image.Image]:
    """The style at weights 0, 0.5 and 1 with four evaluations, and the base model with fifty."""
    images = {}
    for weight in (0.0, 0.5, 1.0):
        pipe.set_adapters([name, "style"], [1.0, weight])
        images[f"style {weight}"] = generate(pipe, **arguments)
    pipe.disable_piflow_adapter()
    images["base"] = generate(pipe, **{"num_inference_steps": 50, **arguments})
    pipe.enable_piflow_adapter()
    return images


if __name__ == "__main__":
    for title, image in compare(*load()).items():
        image.save(f"style_lora_{title.replace(' ', '_')}.png")
