"""GM-Qwen: Qwen-Image at 1920 x 1080 with four network evaluations. Needs a GPU with 64 GB (or offloading)."""

from typing import Any

import torch
from PIL import Image

from piflow.pipelines import PiQwenImagePipeline

PROMPT = (
    'A bookshop window at dusk, warm light inside. On the glass, in golden letters, "Open until π o\'clock", and on '
    'a chalkboard before the door "e ≈ 2.71828 18284 59045". Rain on the pavement, photograph, 35 mm'
)


def load(
    base: str = "Qwen/Qwen-Image",
    adapter: str = "Lakonik/pi-Qwen-Image",
    subfolder: str | None = "gmqwen_k8_piid_4step",
    device: str = "cuda",
) -> PiQwenImagePipeline:
    """The base model with the adapter on it; the scheduler that published adapters want is the default."""
    pipe = PiQwenImagePipeline.from_pretrained(base, dtype=torch.bfloat16)
    pipe.load_piflow_adapter(adapter, subfolder=subfolder)
    return pipe.to(device)


def generate(
    pipe: PiQwenImagePipeline, prompt: str | None = PROMPT, width: int = 1920, height: int = 1080, **arguments: Any
) -> Image.Image:
    """An image of any size: Qwen-Image makes multiples of 16 pixels, what is too much is cut off."""
    image = pipe(
        prompt,
        width=-(-width // 16) * 16,
        height=-(-height // 16) * 16,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(42),
        **arguments,
    ).images[0]
    return image.crop((0, 0, width, height))


if __name__ == "__main__":
    generate(load()).save("gm_qwen.png")
