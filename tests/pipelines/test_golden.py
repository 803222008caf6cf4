"""The whole Qwen-Image pipeline against the paper's code: per-step latents and images (g09)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from piflow.models import GMQwenImageTransformer2DModel
from piflow.pipelines import PiQwenImagePipeline
from piflow.schedulers import FlowMapSDEScheduler, flow_map_sde
from tests.golden_vectors import GOLDEN, Case, load_group
from tests.pipelines.tiny import qwen_vae

CASES = load_group("g09_piqwen_gm").cases
HEIGHT, WIDTH = 16, 12


@pytest.fixture(scope="module")
def student() -> GMQwenImageTransformer2DModel:
    return GMQwenImageTransformer2DModel.from_pretrained(GOLDEN / "g09_piqwen_gm_transformer")


def packed(noise: Tensor) -> Tensor:
    """Recorded noise (1, C, H, W), which the paper's scheduler draws for unpacked states."""
    _, channels, height, width = noise.shape
    return PiQwenImagePipeline._pack_latents(noise, 1, channels, height, width)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_latents_and_images(case: Case, student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scalars = case.scalars
    scheduler = FlowMapSDEScheduler(**scalars["scheduler"])
    pipe = PiQwenImagePipeline(scheduler, qwen_vae(), None, None, student)
    pipe.set_progress_bar_config(disable=True)
    recorded = [packed(case.inputs[name]) for name in sorted(case.inputs) if name.startswith("noise")]
    remaining: list[Tensor] = []
    if recorded:  # no seed repeats the draws of another program: only the values can be given
        monkeypatch.setattr(flow_map_sde, "randn_tensor", lambda *args, **kwargs: remaining.pop(0))
    steps: list[Tensor] = []

    def run(output_type: str, **kwargs: Any) -> Any:
        remaining[:] = recorded
        inputs = {name: case.inputs[name] for name in ("latents", "prompt_embeds", "prompt_embeds_mask")}
        settings = {"temperature": scalars.get("temperature", "auto"), "total_substeps": scalars["total_substeps"]}
        settings |= {"num_inference_steps": scalars["num_inference_steps"], "output_type": output_type}
        return pipe(height=HEIGHT, width=WIDTH, **inputs, **settings, **kwargs).images

    def record(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(tensors["latents"])
        return {}

    latent = run("latent", callback_on_step_end=record)
    torch.testing.assert_close(latent, case.outputs["latent"], atol=1e-4, rtol=0)
    assert len(steps) == scalars["num_inference_steps"]
    for step, expected in enumerate(case.outputs.get(f"latents_after_step_{i}") for i in range(len(steps))):
        if expected is not None:
            torch.testing.assert_close(steps[step], expected, atol=1e-4, rtol=0)
    if "np" in case.outputs:
        images = torch.from_numpy(run("np"))
        assert (images - case.outputs["np"]).abs().max() <= 2 / 255
