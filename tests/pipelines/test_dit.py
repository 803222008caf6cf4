"""PiDiTPipeline: what it does itself, since diffusers' DiTPipeline has neither callbacks nor latents."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from piflow.digits.teacher import load_teacher, network_velocity
from piflow.models import GMDiTTransformer2DModelV2
from piflow.noise_schedule import NoiseSchedule
from piflow.pipelines import PiDiTPipeline
from piflow.schedulers import FlowMapSDEScheduler
from tests.pipelines.tiny import FAMILIES, seeded, vae

DIT = FAMILIES["dit"]


@pytest.fixture(scope="module")
def digits() -> PiDiTPipeline:
    student = GMDiTTransformer2DModelV2.from_teacher(load_teacher(), 2, generator=torch.Generator().manual_seed(0))
    pipe = PiDiTPipeline(student, None, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(batch: int = 2) -> Tensor:
    return torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("labels", [[3, 7], torch.tensor([3, 7]), (3, 7)])
def test_labels(digits: PiDiTPipeline, labels: Any) -> None:
    images = digits(labels, latents=noise(), output_type="pt").images
    assert images.shape == (2, 1, 8, 8)
    assert 0 <= images.min() <= images.max() <= 1
    alone = digits(7, latents=noise()[1:], output_type="pt").images
    torch.testing.assert_close(images[1:], alone, atol=1e-4, rtol=0)


def test_images_in_pixel_space(digits: PiDiTPipeline) -> None:
    images = digits([0, 1], latents=noise()).images
    assert [(image.mode, image.size) for image in images] == [("L", (8, 8))] * 2
    latents = digits([0, 1], latents=noise(), output_type="latent").images
    array = digits([0, 1], latents=noise(), output_type="np").images
    torch.testing.assert_close(torch.from_numpy(array)[..., 0], (latents[:, 0] / 2 + 0.5).clamp(0, 1))


def test_guidance_combines_mean_velocities(digits: PiDiTPipeline) -> None:
    options = {"latents": noise(), "num_inference_steps": 1, "output_type": "latent"}
    conditional = digits([3, 7], **options).images
    unconditional = digits([10, 10], **options).images
    assert torch.equal(digits([3, 7], guidance_scale=1.0, **options).images, conditional)
    guided = digits([3, 7], guidance_scale=2.5, **options).images
    torch.testing.assert_close(guided, unconditional + 2.5 * (conditional - unconditional), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(shift=2.0), FlowMapSDEScheduler(shift=2.0)])
def test_a_flow_matching_teacher_takes_euler_steps(scheduler: Any) -> None:
    """Uniform in raw time down to 0; with diffusers' guidance scale of 4 where none is given."""
    teacher = load_teacher()
    pipe = PiDiTPipeline(teacher, None, scheduler)
    pipe.set_progress_bar_config(disable=True)
    images = pipe([3, 7], latents=noise(), num_inference_steps=5, output_type="latent").images
    sigmas = NoiseSchedule(shift=2.0).sigma(torch.linspace(1, 0, 6))
    x, velocities = noise(), [network_velocity(teacher, torch.tensor(y)) for y in ([3, 7], [10, 10])]
    with torch.no_grad():
        for sigma, following in pairwise(sigmas):
            u, u_null = (velocity(x, sigma.expand(2)) for velocity in velocities)
            x = x + (following - sigma) * (u_null + 4 * (u - u_null))
    torch.testing.assert_close(images, x, atol=1e-4, rtol=0)


def test_a_diffusion_model_runs_as_in_diffusers() -> None:
    model = seeded(
        lambda: DiTTransformer2DModel(
            num_layers=1, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, sample_size=8
        )
    )
    results = []
    for cls in (PiDiTPipeline, DiTPipeline):
        pipe = cls(model, vae(), DDIMScheduler(), id2label={7: "a cock, rooster"})
        pipe.set_progress_bar_config(disable=True)
        labels = pipe.get_label_ids(["rooster"])
        generator = torch.Generator().manual_seed(0)
        results.append(pipe(labels, generator=generator, num_inference_steps=3, output_type="pt").images)
    assert torch.equal(*results)


def test_callbacks_may_change_the_labels(digits: PiDiTPipeline) -> None:
    def relabel(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        assert list(tensors) == ["class_labels"]
        return {"class_labels": torch.tensor([7, 7])} if step == 0 else None

    options = {"latents": noise(), "output_type": "latent"}
    plain = digits([3, 3], **options).images
    inputs = ["class_labels"]
    changed = digits([3, 3], **options, callback_on_step_end=relabel, callback_on_step_end_tensor_inputs=inputs).images
    assert not torch.equal(changed, plain)


def test_the_default_schedule_is_unshifted(digits: PiDiTPipeline) -> None:
    plain = digits([3, 7], latents=noise(), output_type="latent").images
    explicit = PiDiTPipeline(digits.transformer, None, FlowMapSDEScheduler())
    explicit.set_progress_bar_config(disable=True)
    assert torch.equal(explicit([3, 7], latents=noise(), output_type="latent").images, plain)
    shifted = PiDiTPipeline(digits.transformer, None, FlowMapSDEScheduler(shift=3.0))
    shifted.set_progress_bar_config(disable=True)
    assert not torch.equal(shifted([3, 7], latents=noise(), output_type="latent").images, plain)


@pytest.mark.parametrize("h", [0.0, 1.0])
def test_a_generator_for_each_image(h: float) -> None:
    pipe = DIT.pipe(scheduler=FlowMapSDEScheduler(h=h))
    both = pipe([1, 2], generator=[torch.Generator().manual_seed(s) for s in (4, 5)], output_type="latent").images
    for index, (label, seed) in enumerate([(1, 4), (2, 5)]):
        alone = pipe([label], generator=torch.Generator().manual_seed(seed), output_type="latent").images
        torch.testing.assert_close(both[index : index + 1], alone, atol=1e-4, rtol=0)
