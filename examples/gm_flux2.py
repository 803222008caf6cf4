"""GM-FLUX.2: generation, and editing with reference images, on a base quantised to 4 bits (needs bitsandbytes)."""

from typing import Any

import torch
from PIL import Image

from piflow.pipelines import PiFlux2Pipeline

PROMPT = "A snail whose shell is a tiny brass diving helmet, on wet moss, macro photograph, shallow depth of field"
EDIT = "Put the snail on a sandy beach in the evening sun, and keep its helmet as it is"


def load(
    base: str = "diffusers/FLUX.2-dev-bnb-4bit",
    adapter: str = "Lakonik/pi-FLUX.2",
    subfolder: str | None = "gmflux2_k8_piid_4step",
    device: str = "cuda",
) -> PiFlux2Pipeline:
    """The quantised base model with the adapter, which stays in its own precision."""
    pipe = PiFlux2Pipeline.from_pretrained(base, dtype=torch.bfloat16)
    pipe.load_piflow_adapter(adapter, subfolder=subfolder)
    return pipe.to(device)


def generate(pipe: PiFlux2Pipeline, prompt: str | None = PROMPT, **arguments: Any) -> Image.Image:
    """An image of the prompt."""
    arguments = {"width": 1360, "height": 768, **arguments}
    return pipe(prompt=prompt, num_inference_steps=4, generator=torch.Generator().manual_seed(42), **arguments).images[
        0
    ]


def edit(pipe: PiFlux2Pipeline, images: list[Image.Image], prompt: str | None = EDIT, **arguments: Any) -> Image.Image:
    """The reference images, changed as the prompt says, in the size of the first of them."""
    generator = torch.Generator().manual_seed(42)
    return pipe(image=images, prompt=prompt, num_inference_steps=4, generator=generator, **arguments).images[0]


if __name__ == "__main__":
    pipe = load()
    image = generate(pipe)
    image.save("gm_flux2.png")
    edit(pipe, [image]).save("gm_flux2_edited.png")
