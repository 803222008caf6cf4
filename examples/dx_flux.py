"""DX-FLUX: FLUX.1 with the DX policy, four network evaluations."""

from typing import Any

import torch
from PIL import Image

from piflow.pipelines import PiFluxPipeline

PROMPT = "A paper boat on a puddle that mirrors a row of neon signs, seen from close above the water, night, photograph"


def load(
    base: str = "black-forest-labs/FLUX.1-dev",
    adapter: str = "Lakonik/pi-FLUX.1",
    subfolder: str | None = "dxflux_n10_piid_4step",
    device: str = "cuda",
) -> PiFluxPipeline:
    """The base model with the adapter, whose grids span the segments of four steps whatever the number of steps."""
    pipe = PiFluxPipeline.from_pretrained(base, dtype=torch.bfloat16)
    pipe.load_piflow_adapter(adapter, subfolder=subfolder)
    pipe.transformer.policy_config |= {"segment_size": 1 / 3.5, "shift": 3.2}
    return pipe.to(device)


def generate(pipe: PiFluxPipeline, prompt: str | None = PROMPT, **arguments: Any) -> Image.Image:
    """An image; there is no mixture for a temperature to sharpen."""
    arguments = {"width": 1360, "height": 768, "num_inference_steps": 4, **arguments}
    return pipe(prompt, generator=torch.Generator().manual_seed(42), **arguments).images[0]


if __name__ == "__main__":
    generate(load()).save("dx_flux.png")
