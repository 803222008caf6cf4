"""Schedulers for students and for base models, and what a call is checked for."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Generator

from piflow.noise_schedule import segments
from piflow.schedulers import FlowMapSDEScheduler

from .stand_ins import policy_config_of

PUBLISHED_SCHEDULE: dict[str, Any] = {"shift": 3.2, "final_step_size_scale": 0.5}
"""FlowMapSDEScheduler's settings for the published pi-Qwen-Image, pi-FLUX.1 and pi-FLUX.2 adapters."""


def student_scheduler(scheduler: Any, settings: dict[str, Any]) -> FlowMapSDEScheduler:
    """The same FlowMapSDEScheduler once more, or one with these `settings` in place of a base model's scheduler.

    A copy, since a scheduler knows the step it is at: so pipelines of the same parts can run side by side.
    """
    if isinstance(scheduler, FlowMapSDEScheduler):
        return copy.deepcopy(scheduler)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return FlowMapSDEScheduler(**settings)
    call = ", ".join(f"{key}={value}" for key, value in settings.items())
    raise ValueError(
        f"scheduler: a student takes its steps with a FlowMapSDEScheduler, got a {type(scheduler).__name__}; "
        f"set pipe.scheduler = FlowMapSDEScheduler({call})"
    )


def base_scheduler(scheduler: Any) -> Any:
    """The scheduler itself, or Euler steps with the same shift in place of a FlowMapSDEScheduler."""
    if not isinstance(scheduler, FlowMapSDEScheduler):
        return scheduler
    config = scheduler.config
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=config.num_train_timesteps,
        shift=config.shift,
        use_dynamic_shifting=config.use_dynamic_shifting,
        base_shift=config.base_logshift,
        max_shift=config.max_logshift,
        base_image_seq_len=config.base_seq_len,
        max_image_seq_len=config.max_seq_len,
    )


def check_has_temperature(student: Any, temperature: object) -> None:
    """Raise a ValueError for a temperature below 1 where a policy has no mixture to sharpen."""
    if "n_grid" in student.config and isinstance(temperature, int | float) and 0 <= temperature < 1:
        raise ValueError(
            f"temperature: a DX policy has no mixture components to sharpen, got {temperature}; "
            "leave it out, or give 'auto' or None"
        )


def check_generators(generator: Generator | list[Generator] | None, batch: int) -> None:
    """Raise a ValueError unless there is one generator, none, or a list of one per image."""
    generators = generator if isinstance(generator, list) else [generator]
    for each in generators:
        if not isinstance(each, Generator) and generator is not None:
            raise ValueError(f"generator: expected a torch.Generator or a list of them, got {each!r}")
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(f"generator: expected one, or a list of one per image, {batch} in all, got {len(generator)}")


def warn_if_below_trained(student: Any, nfe: int, scheduler: FlowMapSDEScheduler) -> None:
    """Warn if the student was trained for shorter segments than `nfe` network evaluations make."""
    config, final = policy_config_of(student), scheduler.config.final_step_size_scale
    trained, segment_size = config.get("nfe"), config.get("segment_size")
    if trained is None and segment_size and max(s for _, s in segments(nfe, final)) > segment_size * (1 + 1e-3):
        trained = round(1 / segment_size + 1 - final)
    if trained is not None and nfe < trained:
        warnings.warn(
            f"num_inference_steps: {nfe} is below the {trained} network evaluations that this student was trained for; "
            "its policies are followed further than they were trained to reach",
            stacklevel=6,
        )
