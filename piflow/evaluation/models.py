"""Images that a model makes: students, teachers and whole pipelines as sources.

Image i of seed s starts from noise of a generator of its own, seeded by (s, i), and is of class or prompt i modulo
their number. So two models with the same seed are paired, whatever the batches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from piflow.evaluation.sources import Batch, stamp
from piflow.json_files import read_json_object

DIGITS_TEACHER = "digits:teacher"
TEACHER_STEPS, TEACHER_GUIDANCE = 64, 2.0

Make = Callable[[list[Any], list[Generator], dict[str, Any]], tuple[Tensor, "Tensor | None"]]
"""(conditions, generators, arguments of the call) -> images in [-1, 1], latents or None."""


@dataclass(frozen=True)
class Model:
    """`make` makes images of `conditions`: class labels, or prompts where `texts`. `settings` identify it."""

    name: str
    make: Make
    settings: dict[str, Any]
    classes: int = 0

    @property
    def texts(self) -> bool:
        """Whether it takes prompts."""
        return self.classes == 0


@dataclass(frozen=True)
class ModelSource:
    """`count` images of a model for one seed. `conditions`: labels or prompts, taken in turn."""

    model: Model
    conditions: Sequence[Any]
    seed: int
    count: int
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.model.name}, seed {self.seed}"

    @property
    def texts(self) -> bool:
        """Whether images have prompts."""
        return self.model.texts

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the images."""
        return {
            "kind": "model",
            "model": self.model.settings,
            "arguments": self.arguments,
            "conditions": list(self.conditions),
            "seed": self.seed,
        }

    @torch.no_grad()
    def batch(self, start: int, stop: int) -> Batch:
        """Images start..stop - 1. Raises ValueError for arguments that the model does not take."""
        places = [place % len(self.conditions) for place in range(start, stop)]
        conditions = [self.conditions[place] for place in places]
        generators = [Generator().manual_seed(noise_seed(self.seed, place)) for place in range(start, stop)]
        try:
            images, latents = self.model.make(conditions, generators, self.arguments)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.model.name} cannot be called with {json.dumps(self.arguments)}: {error}"
            ) from error
        images, latents = images.float().cpu(), None if latents is None else latents.float().cpu()
        groups = torch.tensor(places if self.model.texts else conditions)
        return Batch(images, groups, conditions if self.model.texts else None, latents)


def noise_seed(seed: int, place: int) -> int:
    """The seed of image `place`'s noise."""
    import numpy as np

    return int(np.random.SeedSequence([seed, place]).generate_state(1, np.uint64)[0])


def is_model(path: str) -> bool:
    """Whether a source's name is that of a model: a folder with model_index.json or config.json, or digits:teacher."""
    return path == DIGITS_TEACHER or any((Path(path) / name).is_file() for name in ("model_index.json", "config.json"))


def open_model(
    path: str,
    *,
    base: str | None = None,
    vae: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Model:
    """The model in a folder.

    Args:
        path: a pipeline's folder; a DiT student's or teacher's; with `base` a student adapter; or "digits:teacher".
        base: folder of the pipeline that an adapter extends.
        vae: folder of the VAE behind a DiT; without, it works in pixel space.
        dtype: of a pipeline's weights.

    Raises FileNotFoundError or ValueError that names what cannot be used.
    """
    if path == DIGITS_TEACHER:
        from piflow.digits.teacher import SHIPPED_WEIGHTS

        return _named(path, _dit(SHIPPED_WEIGHTS, vae, device))
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        return _pipeline(folder, dtype, device)
    if base is not None and (folder / "config.json").is_file():
        return _adapter(folder, base, dtype, device)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"There is no model in {path}: neither model_index.json nor config.json is there.")
    return _dit(folder, vae, device)


def _dit(folder: Path, vae_path: str | None, device: str) -> Model:
    """A DiT: a student through its pipeline, a teacher by Euler steps that are uniform in raw time."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from piflow import models
    from piflow.data.latents import decode, load_vae
    from piflow.pipelines import PiDiTPipeline

    class_name = read_json_object(folder / "config.json").get("_class_name", "")
    vae = None if vae_path is None else load_vae(vae_path).to(device)
    settings = {"class": class_name, "files": _files(folder)}
    settings |= {} if vae_path is None else {"vae": _files(Path(vae_path))}

    def decoded(latents: Tensor) -> tuple[Tensor, Tensor]:
        return (latents if vae is None else decode(vae, latents)), latents

    if hasattr(models, class_name) and "DiT" in class_name:
        try:
            student = getattr(models, class_name).from_pretrained(folder).eval().requires_grad_(False).to(device)
        except NotImplementedError as error:  # what has no weights stays on the meta device
            raise ValueError(f"{folder}: the file of weights lacks some of this {class_name}'s.") from error
        pipe = PiDiTPipeline(student, vae=None, scheduler=FlowMatchEulerDiscreteScheduler())
        pipe.set_progress_bar_config(disable=True)

        def make(labels: list[Any], generators: list[Generator], arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
            return decoded(pipe(labels, generator=generators, output_type="latent", return_dict=False, **arguments)[0])

        return Model(str(folder), make, settings, student.config.num_embeds_ada_norm)
    if class_name not in ("DiTTransformer2DModel", ""):
        raise ValueError(
            f"{folder} holds a {class_name}, which makes no images alone: give the folder of a pipeline, or, for an "
            "adapter, that of its base with --base."
        )
    return _dit_teacher(folder, decoded, settings, device)


def _dit_teacher(folder: Path, decoded: Callable[[Tensor], tuple[Tensor, Tensor]], settings: Any, device: str) -> Model:
    from piflow.digits.teacher import euler_sample, teacher_velocity
    from piflow.models.dit import load_dit_teacher
    from piflow.noise_schedule import NoiseSchedule

    teacher = load_dit_teacher(folder).requires_grad_(False).to(device)
    config = teacher.config

    def make(labels: list[Any], generators: list[Generator], arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        known = {"num_inference_steps": TEACHER_STEPS, "guidance_scale": TEACHER_GUIDANCE, "shift": 1.0}
        if unknown := arguments.keys() - known.keys():
            raise ValueError(f"it takes the arguments {sorted(known)}, got {min(unknown)!r}.")
        known |= arguments
        shape = (1, config.in_channels, config.sample_size, config.sample_size)
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(device)
        velocity = teacher_velocity(teacher, torch.tensor(labels, device=device), known["guidance_scale"])
        schedule = NoiseSchedule(shift=known["shift"])
        return decoded(euler_sample(velocity, noise, int(known["num_inference_steps"]), schedule))

    return Model(str(folder), make, settings, config.num_embeds_ada_norm)


def _pipeline(folder: Path, dtype: torch.dtype, device: str) -> Model:
    pipe = _load_pipeline(folder, dtype, device)
    return Model(str(folder), _caller(pipe), {"files": _files(folder), "dtype": str(dtype)}, _classes(pipe))


def _adapter(folder: Path, base: str, dtype: torch.dtype, device: str) -> Model:
    pipe = _load_pipeline(Path(base), dtype, "cpu")
    if not hasattr(pipe, "load_piflow_adapter"):
        raise ValueError(f"{base} is a {type(pipe).__name__}, for which piflow has no students.")
    pipe.load_piflow_adapter(folder)
    pipe.to(device)
    settings = {"adapter": _files(folder), "base": _files(Path(base)), "dtype": str(dtype)}
    return Model(str(folder), _caller(pipe), settings, _classes(pipe))


def _load_pipeline(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """The pipeline, of piflow's class where there is one: with its base model it is diffusers' bit for bit."""
    import diffusers

    from piflow import pipelines

    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"There is no pipeline in {folder}: model_index.json is missing.")
    name = str(read_json_object(folder / "model_index.json").get("_class_name", ""))
    kinds = (getattr(pipelines, kind, None) for kind in (name, f"Pi{name}"))
    kind = next(filter(None, kinds), None) or getattr(diffusers, name, None)
    if kind is None:
        raise ValueError(f"{folder}: neither piflow nor diffusers has a pipeline {name!r}.")
    pipe = kind.from_pretrained(folder, dtype=dtype, local_files_only=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _caller(pipe: Any) -> Make:
    condition = "class_labels" if _classes(pipe) else "prompt"

    def make(conditions: list[Any], generators: list[Generator], arguments: dict[str, Any]) -> tuple[Tensor, None]:
        images = pipe(**{condition: conditions}, generator=generators, output_type="pt", **arguments).images
        return 2 * images - 1, None

    return make


def _classes(pipe: Any) -> int:
    """Number of classes of a class-conditional pipeline, 0 of one that takes prompts."""
    return 0 if hasattr(pipe, "encode_prompt") else int(pipe.transformer.config.num_embeds_ada_norm)


def _named(name: str, model: Model) -> Model:
    return Model(name, model.make, model.settings, model.classes)


def _files(folder: Path) -> list[list[Any]]:
    """Names, sizes and times of change of all files below a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [[str(path.relative_to(folder)), *stamp(path)] for path in paths]
