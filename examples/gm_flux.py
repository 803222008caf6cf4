"""GM-FLUX: FLUX.1 with four and with eight network evaluations, both adapters on one base model in memory."""

from typing import Any

import torch
from PIL import Image

from piflow.pipelines import PiFluxPipeline

PROMPT = (
    "A heron in a tweed jacket reads the newspaper on a park bench by a pond, beside it a thermos and a sign that "
    'says "No fishing before noon". Photograph, morning mist'
)


def load(
    base: str = "black-forest-labs/FLUX.1-dev", adapter: str = "Lakonik/pi-FLUX.1", device: str = "cuda"
) -> PiFluxPipeline:
    """The base model with two adapters, "4" and "8", over the same tensors."""
    pipe = PiFluxPipeline.from_pretrained(base, dtype=torch.bfloat16)
    for nfe in (4, 8):
        pipe.load_piflow_adapter(adapter, subfolder=f"gmflux_k8_piid_{nfe}step", adapter_name=f"nfe{nfe}")
    return pipe.to(device)


def generate(pipe: PiFluxPipeline, prompt: str | None = PROMPT, nfe: int = 4, **arguments: Any) -> Image.Image:
    """An image with `nfe` network evaluations by whichever adapter is set."""
    arguments = {"width": 1360, "height": 768, **arguments}
    return pipe(prompt, num_inference_steps=nfe, generator=torch.Generator().manual_seed(42), **arguments).images[0]


if __name__ == "__main__":
    pipe = load()
    for nfe in (4, 8):
        pipe.set_piflow_adapter(f"nfe{nfe}")
        generate(pipe, nfe=nfe).save(f"gm_flux_{nfe}nfe.png")
