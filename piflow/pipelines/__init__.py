"""diffusers' pipelines with few-step students: every argument, component and method is theirs, and a few more."""

from __future__ import annotations

from typing import Any

from diffusers import ModelMixin as ModelMixin  # see PolicyLoopMixin.register_to_config

from piflow import models

from .dit import PiDiTPipeline
from .flux import PiFluxImg2ImgPipeline, PiFluxInpaintPipeline, PiFluxPipeline
from .flux2 import PiFlux2Pipeline
from .qwen_image import PiQwenImageImg2ImgPipeline, PiQwenImageInpaintPipeline, PiQwenImagePipeline

__all__ = [
    "PiDiTPipeline",
    "PiFlux2Pipeline",
    "PiFluxImg2ImgPipeline",
    "PiFluxInpaintPipeline",
    "PiFluxPipeline",
    "PiQwenImageImg2ImgPipeline",
    "PiQwenImageInpaintPipeline",
    "PiQwenImagePipeline",
]


def __getattr__(name: str) -> Any:
    """Students by their names, for the folders of pipelines (see `PolicyLoopMixin.register_to_config`)."""
    try:
        return getattr(models, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
