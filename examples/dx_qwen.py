"""DX-Qwen: Qwen-Image with the DX policy, four network evaluations."""

from typing import Any

import torch
from PIL import Image

from piflow.pipelines import PiQwenImagePipeline

PROMPT = "A lighthouse keeper's kitchen, on the wall a calendar that shows the 29th of February. Gouache, quiet colours"


def load(
    base: str = "Qwen/Qwen-Image",
    adapter: str = "Lakonik/pi-Qwen-Image",
    subfolder: str | None = "dxqwen_n10_piid_4step",
    device: str = "cuda",
) -> PiQwenImagePipeline:
    """The base model with the adapter, whose grids span the segments of four steps whatever the number of steps."""
    pipe = PiQwenImagePipeline.from_pretrained(base, dtype=torch.bfloat16)
    pipe.load_piflow_adapter(adapter, subfolder=subfolder)
    pipe.transformer.policy_config |= {"segment_size": 1 / 3.5, "shift": 3.2}
    return pipe.to(device)


def generate(pipe: PiQwenImagePipeline, prompt: str | None = PROMPT, **arguments: Any) -> Image.Image:
    """An image; there is no mixture for a temperature to sharpen."""
    arguments = {"width": 1664, "height": 928, "num_inference_steps": 4, **arguments}
    return pipe(prompt, generator=torch.Generator().manual_seed(42), **arguments).images[0]


if __name__ == "__main__":
    generate(load()).save("dx_qwen.png")
