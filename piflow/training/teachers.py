"""Teachers: which class each kind is, where its weights come from, and what does not fit recipe or data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from piflow.models.dit import check_is_dit, load_dit_teacher
from piflow.training.config import TeacherConfig, TrainConfig
from piflow.training.data import DataFormat, describe_data
from piflow.training.errors import ConfigError

TEACHER_CLASSES = {
    "digits": "DiTTransformer2DModel",
    "dit": "DiTTransformer2DModel",
    "qwen_image": "QwenImageTransformer2DModel",
    "flux": "FluxTransformer2DModel",
    "flux2": "Flux2Transformer2DModel",
}
"""The diffusers class of each kind of teacher."""


def build_teacher(config: TrainConfig, *, meta: bool = False) -> Any:
    """The teacher that a configuration names, whole, in the run's precision.

    With `meta`, a text-to-image teacher without values. Raises ConfigError where its files are missing, damaged, or of
    another class.
    """
    settings = config.teacher
    if not settings.is_text_to_image and settings.random is None:
        return load_class_teacher(settings)
    cls = diffusers_class(settings)
    if settings.random is not None:
        return _random_teacher(cls, settings.random, config.seed, meta)
    from piflow.training.loading import local_folder, on_meta

    folder = local_folder(teacher_source(settings), weights=not meta)
    described = read_teacher_config(folder, cls.__name__)
    if meta:
        return on_meta(cls, described)
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    try:
        return cls.from_pretrained(folder, torch_dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"The teacher in {folder} cannot be loaded: {_one_line(error)}. Download it again."
        ) from error


def teacher_source(config: TeacherConfig) -> Path | str:
    """Where a teacher's files are. Raises ConfigError if the configuration does not say."""
    if config.path is None:
        raise ConfigError(
            f"teacher.kind={config.kind} needs teacher.path, the folder with config.json and the weights."
        )
    return config.path if config.path.is_dir() else str(config.path)


def load_class_teacher(config: TeacherConfig) -> Any:
    """A class-conditional teacher. Raises ConfigError where its files are missing or damaged."""
    from piflow.digits.teacher import load_teacher as load_digits_teacher

    if config.kind == "dit":
        teacher_source(config)
    try:
        if config.path is not None:
            check_is_dit(config.path)
        return load_digits_teacher(config.path) if config.kind == "digits" else load_dit_teacher(config.path or "")
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(
            f"The teacher cannot be loaded: {error} Set teacher.path to a folder that holds it."
        ) from error


def read_teacher_config(folder: Path, class_name: str) -> dict[str, Any]:
    """The config.json of a teacher. Raises ConfigError where it is missing or that of another class."""
    file = folder / "config.json"
    if not file.is_file() and (folder / "transformer" / "config.json").is_file():
        raise ConfigError(f"teacher.path {folder} holds a whole pipeline. Give {folder / 'transformer'}.")
    try:
        described = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"teacher.path {folder} has no readable config.json: {_one_line(error)}.") from error
    found = described.get("_class_name")
    if found != class_name:
        kinds = [kind for kind, name in TEACHER_CLASSES.items() if name == found and kind != "digits"]
        hint = f"Set teacher.kind={kinds[0]}, with a recipe for it" if kinds else f"Give the folder of a {class_name}"
        raise ConfigError(f"teacher.path {folder} holds a {found}, this recipe needs a {class_name}. {hint}.")
    return described


def check_fits(teacher: Any, config: TrainConfig) -> None:
    """ConfigError where the teacher does not fit the data or the recipe."""
    data, distillation, kind = describe_data(config.data), config.distillation, config.teacher.kind
    if not distillation.data_free and data.latents is None:
        raise ConfigError(
            f"distillation.data_free=false needs latents, which data.kind={config.data.kind} has not here. "
            "Set data.kind=latents, or distillation.data_free=true."
        )
    shape = data.latents or distillation.latent_shape
    if shape is None:
        raise ConfigError(
            "distillation.data_free=true needs the shape of the noise, which this data does not tell. "
            "Set distillation.latent_shape: [C, H, W], such as [16, 128, 128] for 1024 x 1024 pixels."
        )
    if data.latents and distillation.latent_shape and data.latents != distillation.latent_shape:
        raise ConfigError(
            f"distillation.latent_shape {list(distillation.latent_shape)} is not that of the data, "
            f"{list(data.latents)}. Leave it out."
        )
    expected = teacher.config
    if config.teacher.is_text_to_image:
        _check_text_teacher(expected, config, data, shape)
        return
    channels, size = shape[0], shape[1]
    facts = {
        "classes (num_embeds_ada_norm)": (expected.num_embeds_ada_norm, data.num_classes),
        "input channels (in_channels)": (expected.in_channels, channels),
        "output channels (out_channels)": (teacher.out_channels, channels),
        "pixels a side (sample_size)": (expected.sample_size, size),
    }
    if wrong := [f"{has} {what}, the data {needs}" for what, (has, needs) in facts.items() if has != needs]:
        remedy = "a teacher of this data" if kind == "digits" else "a teacher of this data, or data.path to its data"
        raise ConfigError(
            f"The teacher does not fit data.kind={config.data.kind}: it has {'; '.join(wrong)}. "
            f"Set teacher.path to {remedy}."
        )


def _check_text_teacher(teacher: Any, config: TrainConfig, data: DataFormat, shape: tuple[int, ...]) -> None:
    distillation = config.distillation
    embeds = bool(teacher.get("guidance_embeds", False))
    if embeds != (distillation.embedded_guidance is not None):
        state = "takes guidance as input: set" if embeds else "takes no guidance as input: leave out"
        raise ConfigError(f"The teacher {state} distillation.embedded_guidance.")
    if data.prompt_width is None:
        raise ConfigError(
            f"teacher.kind={config.teacher.kind} needs prompts, which data.kind={config.data.kind} has not here. "
            "Set data.prompts to a folder of `piflow cache-prompts`."
        )
    facts: dict[str, tuple[Any, Any]]
    facts = {"text embeddings (joint_attention_dim)": (teacher.joint_attention_dim, data.prompt_width)}
    if config.teacher.kind == "flux":
        facts["pooled text embeddings (pooled_projection_dim)"] = (teacher.pooled_projection_dim, data.pooled_width)
    if wrong := [f"{what} of width {has}, the data {needs}" for what, (has, needs) in facts.items() if has != needs]:
        raise ConfigError(
            f"The teacher does not fit the prompts: it takes {'; '.join(wrong)}. Cache them with its own text encoder."
        )
    if len(shape) != 3 or teacher.in_channels not in (shape[0], 4 * shape[0]):
        raise ConfigError(
            f"Latents of shape {list(shape)} do not fit the teacher: its tokens have {teacher.in_channels} channels, "
            f"so latents have {teacher.in_channels // 4} (or {teacher.in_channels}, put in 2 x 2 pixels already)."
        )
    if teacher.in_channels == 4 * shape[0] and (shape[1] % 2 or shape[2] % 2):
        raise ConfigError(f"Latents of shape {list(shape)} do not divide into tokens of 2 x 2: take even sizes.")


def diffusers_class(config: TeacherConfig) -> Any:
    """The class of a teacher."""
    import diffusers

    return getattr(diffusers, TEACHER_CLASSES[config.kind])


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _random_teacher(cls: Any, settings: dict[str, Any], seed: int, meta: bool) -> Any:
    from piflow.training.loading import on_meta

    try:
        if meta and not cls.__name__.startswith("DiT"):
            return on_meta(cls, settings)
        with _seeded(seed):
            return cls(**settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"teacher.random is no configuration of a {cls.__name__}: {_one_line(error)}.") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")
