"""Bad arguments are ValueErrors that name the argument, and the pipeline works as before afterwards."""

from __future__ import annotations

import math
import warnings
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from piflow.schedulers import FlowMapSDEScheduler
from tests.pipelines.tiny import FAMILIES, SCHEDULE, text

PROMPTED = [name for name in FAMILIES if name != "dit"]
FIRST, SECOND = (torch.Generator().manual_seed(seed) for seed in (0, 1))

ANYWHERE: list[tuple[str, dict[str, Any]]] = [
    ("num_inference_steps", {"num_inference_steps": 0}),
    ("num_inference_steps", {"num_inference_steps": 2.5}),
    ("total_substeps", {"total_substeps": 0}),
    ("total_substeps", {"total_substeps": True}),
    ("temperature", {"temperature": -0.1}),
    ("temperature", {"temperature": math.nan}),
    ("temperature", {"temperature": math.inf}),
    ("temperature", {"temperature": "warm"}),
    ("generator", {"generator": [FIRST, SECOND]}),
    ("generator", {"generator": 0}),
    ("generator", {"generator": [None]}),
    ("callback_on_step_end_tensor_inputs", {"callback_on_step_end_tensor_inputs": ["means"]}),
]
TO_PROMPTED: list[tuple[str, dict[str, Any]]] = [
    ("height", {"height": 18}),
    ("width", {"width": 13}),
    ("height", {"height": 3}),
    ("width", {"width": 12.5}),
    ("num_images_per_prompt", {"num_images_per_prompt": 0}),
    ("prompt", {"prompt": [], "prompt_embeds": None, "pooled_prompt_embeds": None}),
    ("prompt_embeds", {"prompt": "a cat"}),
    ("prompt_embeds", {"prompt_embeds": None, "pooled_prompt_embeds": None}),
    ("latents", {"latents": torch.randn(1, 12, 15)}),
    ("latents", {"latents": torch.randn(2, 12, 16)}),
    ("latents", {"latents": torch.randn(1, 4, 9, 6)}),
    ("sigmas", {"sigmas": [1.0, 0.0]}),
    ("sigmas", {"sigmas": [0.3, 0.8]}),
    ("sigmas", {"sigmas": [1.5, 0.5]}),
    ("sigmas", {"sigmas": [1.0, math.nan]}),
    ("sigmas", {"sigmas": []}),
]
CASES = [(name, *case) for name in FAMILIES for case in ANYWHERE]
CASES += [(name, *case) for name in PROMPTED for case in TO_PROMPTED]
CASES += [
    ("qwen-inpaint", "latents", {"latents": torch.randn(1, 12, 16)}),
    ("flux-img2img", "strength", {"strength": 1.5}),
    ("qwen-inpaint", "strength", {"strength": 0.0}),
    ("flux2-edit", "[Ii]mage", {"image": torch.zeros(3, 64, 64)}),
    ("flux", "pooled_prompt_embeds", {"pooled_prompt_embeds": None}),
    ("dit", "class_labels", {"class_labels": []}),
    ("dit", "class label 11", {"class_labels": [11]}),
    ("dit", "class_labels", {"class_labels": [0.5]}),
    ("dit", "output_type", {"output_type": "jpg"}),
    ("dit", "latents", {"latents": torch.randn(1, 4, 8, 9)}),
]


@cache
def pipe_and_latents(name: str) -> tuple[Any, Tensor]:
    pipe = FAMILIES[name].pipe()
    return pipe, pipe(**FAMILIES[name].arguments()).images


@pytest.mark.parametrize(("name", "argument", "wrong"), CASES)
def test_the_error_names_the_argument(name: str, argument: str, wrong: dict[str, Any]) -> None:
    family = FAMILIES[name]
    pipe, expected = pipe_and_latents(name)
    arguments = family.arguments(**wrong)
    if "pooled_prompt_embeds" not in family.prompt() and name != "dit":
        arguments.pop("pooled_prompt_embeds", None)
    with pytest.raises(ValueError, match=argument):
        pipe(**arguments)
    assert torch.equal(pipe(**family.arguments()).images, expected)


def test_unknown_arguments_are_type_errors() -> None:
    family = FAMILIES["qwen"]
    with pytest.raises(TypeError, match="temprature"):
        family.pipe()(**family.arguments(temprature=0.3))


@pytest.mark.parametrize("name", ["qwen", "dit"])
def test_a_temperature_conflicts_with_dx(name: str) -> None:
    """Below 1 it would sharpen a mixture, which a DX policy is not; values that ask for nothing are harmless."""
    family = FAMILIES[name]
    pipe = family.pipe("DX")
    plain = pipe(**family.arguments()).images
    with pytest.raises(ValueError, match=r"temperature: a DX policy has no mixture components to sharpen, got 0\.2"):
        pipe(**family.arguments(temperature=0.2))
    with pytest.raises(ValueError, match="temperature: expected a finite number, at least 0"):
        pipe(**family.arguments(temperature=-1.0))
    for harmless in ("auto", None, 1, 1.5):
        assert torch.equal(pipe(**family.arguments(temperature=harmless)).images, plain)


def test_the_error_says_which_sizes_would_do() -> None:
    family = FAMILIES["qwen"]
    with pytest.raises(ValueError, match=r"width: expected a multiple of 4, .* got 13; next to it are 12 and 16"):
        family.pipe()(**family.arguments(width=13))


def test_another_scheduler_says_what_to_do() -> None:
    family = FAMILIES["qwen"]
    pipe = family.pipe(scheduler=DPMSolverMultistepScheduler())
    with pytest.raises(
        ValueError, match=r"scheduler: .* got a DPMSolverMultistepScheduler; set pipe\.scheduler = Flow"
    ):
        pipe(**family.arguments())
    pipe.scheduler = FlowMapSDEScheduler(**SCHEDULE)
    assert torch.equal(pipe(**family.arguments()).images, family.pipe()(**family.arguments()).images)


@pytest.mark.parametrize("config", [{"nfe": 4}, {"type": "DX", "segment_size": 1 / 3.5}])
def test_fewer_evaluations_than_trained_for_warn(config: dict[str, Any]) -> None:
    family = FAMILIES["qwen"]
    pipe = family.pipe("DX")
    pipe.transformer.policy_config = config
    for nfe in (1, 2, 3):
        with pytest.warns(UserWarning, match=rf"num_inference_steps: {nfe} is below the 4"):
            pipe(**family.arguments(num_inference_steps=nfe))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for nfe in (4, 5, 8):
            pipe(**family.arguments(num_inference_steps=nfe))


def test_prompts_of_different_numbers() -> None:
    """Embeddings and masks of other lengths fail in diffusers or the network; the pipeline is as before."""
    family = FAMILIES["flux"]
    pipe = family.pipe()
    expected = pipe(**family.arguments()).images
    with pytest.raises((ValueError, RuntimeError)):
        pipe(**family.arguments(prompt_embeds=text(3)[:, :, :20]))
    assert torch.equal(pipe(**family.arguments()).images, expected)
