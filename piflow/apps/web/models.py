"""The models of the web demo: a pipeline each, with a student and its base, lent to one picture at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline

from piflow import pipelines
from piflow.apps.latents import QWEN_IMAGE_GUIDANCE
from piflow.apps.places import named, split_repository
from piflow.digits.folders import load_network
from piflow.digits.teacher import SHIPPED_WEIGHTS, load_teacher
from piflow.models import GMDiTTransformer2DModelV2
from piflow.schedulers import FlowMapSDEScheduler

Network = Literal["student", "base"]

SHIPPED_STUDENT = SHIPPED_WEIGHTS.with_name("student-nfe4")


@dataclass(eq=False)
class Model:
    """A pipeline whose transformer is the student's or the base's while somebody draws with it.

    title: for people. base, adapter: what they are called in a picture's settings. nfe: the student was trained for.
    """

    title: str
    pipe: Any
    base: str
    adapter: str
    nfe: int = 4
    has_temperature: bool = True
    lock: Lock = field(default_factory=Lock, repr=False)

    total_substeps: ClassVar[int] = 128
    automatic_temperature: ClassVar[bool] = True
    base_arguments: ClassVar[dict[str, Any]] = {}
    """Of the base model's calls: the guidance that it is commonly used with."""
    evaluations_per_base_step: ClassVar[int] = 1

    @contextmanager
    def using(self, network: Network) -> Iterator[Any]:
        """The pipeline with the student or the base as transformer, for the caller alone; others wait."""
        with self.lock:
            self.switch(network)
            yield self.pipe

    def facts(self) -> dict[str, Any]:
        """What is shown here, for JSON."""
        return {"title": self.title, "base": self.base, "adapter": self.adapter, "nfe": self.nfe}

    def switch(self, network: Network) -> None:
        """Make the student or the base the pipeline's transformer."""
        if network == "student":
            self.pipe.enable_piflow_adapter()
        else:
            self.pipe.disable_piflow_adapter()

    def evaluations(self, network: Network, nfe: int) -> int:
        """How often the network is evaluated in `nfe` steps: twice a step under classifier-free guidance."""
        return nfe * (self.evaluations_per_base_step if network == "base" else 1)


@dataclass(eq=False)
class DigitsModel(Model):
    """Handwritten digits of 8 x 8 pixels: a class-conditional DiT and its student, which share no weights."""

    networks: dict[Network, Any] = field(default_factory=dict, repr=False)

    total_substeps: ClassVar[int] = 64
    automatic_temperature: ClassVar[bool] = False  # this student comes nearer to its teacher without
    base_arguments: ClassVar[dict[str, Any]] = {"guidance_scale": 2.0}  # which the student was distilled with
    evaluations_per_base_step: ClassVar[int] = 2

    def switch(self, network: Network) -> None:
        self.pipe.transformer = self.networks[network]


class TextModel(Model):
    """Text to image with a published adapter on its base model."""

    edits: ClassVar[bool] = False
    """Whether it takes pictures to change."""

    @property
    def multiple(self) -> int:
        """Width and height are multiples of this, in pixels."""
        return 2 * self.pipe.vae_scale_factor


class QwenImageModel(TextModel):
    base_arguments: ClassVar[dict[str, Any]] = QWEN_IMAGE_GUIDANCE
    evaluations_per_base_step: ClassVar[int] = 2


class Flux2Model(TextModel):
    edits: ClassVar[bool] = True


@dataclass(frozen=True)
class Family:
    """How a text-to-image model is loaded: by its pipeline's class."""

    title: str
    model: type[TextModel]
    pipeline: Any


FAMILIES = {
    "qwen_image": Family("Qwen-Image", QwenImageModel, pipelines.PiQwenImagePipeline),
    "flux": Family("FLUX.1", TextModel, pipelines.PiFluxPipeline),
    "flux2": Family("FLUX.2", Flux2Model, pipelines.PiFlux2Pipeline),
}


def load_digits(student: Path | None = None) -> DigitsModel:
    """The digits teacher that is shipped, and its shipped four-step student or the one in a folder.

    Raises FileNotFoundError or ValueError for a folder without a whole student.
    """
    folder = SHIPPED_STUDENT if student is None else student
    remedy = "`make demo` trains students: outputs/digits/nfe4/student is one."
    networks: dict[Network, Any] = {
        "student": load_network(GMDiTTransformer2DModelV2, folder, "digits student", remedy),
        "base": load_teacher(),
    }
    pipe = pipelines.PiDiTPipeline(networks["student"], vae=None, scheduler=FlowMapSDEScheduler())
    pipe.set_progress_bar_config(disable=True)
    return DigitsModel("Digits", pipe, "digits-teacher", folder.name, networks=networks)


def load_text_model(
    family: str, base: str, adapter: str, *, device: str, dtype: torch.dtype, offload: bool = False
) -> TextModel:
    """A base model, in a folder or a Hugging Face repository, with a published adapter on it.

    Args:
        family: a key of FAMILIES.
        adapter: a folder, or the name of a repository, with a subfolder behind it where there is one.
        offload: keep on the GPU only what is computing.

    Raises ValueError or OSError for what cannot be loaded.
    """
    kind = FAMILIES[family]
    name = str(DiffusionPipeline.load_config(base).get("_class_name"))
    if name.removeprefix("Pi") != kind.pipeline.__name__.removeprefix("Pi"):
        raise ValueError(
            f"{base} is a {name}, not a {kind.pipeline.__name__.removeprefix('Pi')} as {kind.title} needs."
        )
    pipe = kind.pipeline.from_pretrained(base, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    place, subfolder = split_repository(adapter)
    pipe.load_piflow_adapter(place, subfolder=subfolder)
    if offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    student = pipe.transformer
    return kind.model(
        kind.title,
        pipe,
        base=named(base),
        adapter=named(adapter),
        nfe=int(student.policy_config.get("nfe", 4)),
        has_temperature="n_grid" not in student.config,
    )
