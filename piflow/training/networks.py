"""Teachers, students and how to call them: class-conditional ones on images, text-to-image ones on packed tokens.

With LoRA a text-to-image student is its teacher's network once more, with an output layer of its own: there is one set
of base weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from piflow.models.dit import (
    DXDiTTransformer2DModel,
    GMDiTTransformer2DModelV2,
    check_class_labels,
    check_is_dit,
    load_dit_teacher,
)
from piflow.models.generic import student_class
from piflow.models.heads import head_modules
from piflow.training.config import DataConfig, TeacherConfig, TrainConfig
from piflow.training.data import DataFormat, describe_data
from piflow.training.errors import ConfigError
from piflow.training.lora import HEAD, add_lora, fill_lora, lora_disabled

Batch = dict[str, Tensor]
Condition = dict[str, Tensor]
"""What a network is told beside state and noise level: class_labels (B,), or prompt_embeds (B, L, D), prompt_mask
(B, L) bool and pooled (B, P)."""

TEACHER_CLASSES = {
    "digits": "DiTTransformer2DModel",
    "dit": "DiTTransformer2DModel",
    "qwen_image": "QwenImageTransformer2DModel",
    "flux": "FluxTransformer2DModel",
    "flux2": "Flux2Transformer2DModel",
}
"""The diffusers class of each kind of teacher."""


SUB_PIXELS = 4
"""Latent pixels in a token of the text-to-image teachers; each has its own component weights."""


class Calls(Protocol):
    """How teacher and student of one kind take states and conditions. States are (B, C, H, W) or packed (B, T, C p)."""

    @property
    def layout(self) -> Literal["spatial", "packed"]:
        """Of states and policies."""

    def state(self, latents: Tensor) -> Tensor:
        """The state that the networks see of latents (B, C, H, W)."""

    def inputs(self, x_t: Tensor, sigma: Tensor, condition: Condition, size: tuple[int, int]) -> dict[str, Any]:
        """Keyword arguments of teacher and student at a state of latents of `size` (H, W)."""

    def conditions(self, batch: Batch) -> tuple[Condition, Condition]:
        """The condition of a batch, and that of the other branch of guidance, B each. ValueError for a wrong batch."""

    def seq_len(self, x_t: Tensor) -> int | None:
        """The number of image tokens that a dynamic shift depends on."""


@dataclass(frozen=True)
class ClassCalls:
    """DiT: images, class labels, and the null class after the last."""

    num_classes: int
    layout: Literal["spatial", "packed"] = "spatial"

    def state(self, latents: Tensor) -> Tensor:
        """The latents themselves."""
        return latents

    def inputs(self, x_t: Tensor, sigma: Tensor, condition: Condition, size: tuple[int, int]) -> dict[str, Any]:
        """Time in thousandths."""
        return {"hidden_states": x_t, "timestep": 1000 * sigma, "class_labels": condition["class_labels"]}

    def conditions(self, batch: Batch) -> tuple[Condition, Condition]:
        """The labels, and the null class."""
        labels = batch["class_labels"]
        check_class_labels(labels, self.num_classes, null_class=False)
        return {"class_labels": labels}, {"class_labels": torch.full_like(labels, self.num_classes)}

    def seq_len(self, x_t: Tensor) -> None:
        """None: DiT has one image size."""


@dataclass(frozen=True, eq=False)
class TextCalls:
    """Qwen-Image, FLUX.1 and FLUX.2: tokens of `in_channels`, prompts.

    negative: prompt_embeds (L, D), and pooled (P,) for FLUX.1, of the negative prompt of classifier-free guidance; None
    where the teacher has embedded guidance, or none at all.
    """

    kind: str
    in_channels: int
    embedded_guidance: float | None = None
    negative: Condition | None = None
    layout: Literal["spatial", "packed"] = "packed"

    def state(self, latents: Tensor) -> Tensor:
        """(B, T, C p): tokens of 2 x 2 latent pixels with channel index c p + sub-pixel; of one where C is all."""
        side = self._side(latents.shape[1])
        b, c, h, w = latents.shape
        pixels = latents.reshape(b, c, h // side, side, w // side, side)
        return pixels.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // side) * (w // side), c * side * side)

    def _side(self, channels: int) -> int:
        return 1 if channels == self.in_channels else 2

    def inputs(self, x_t: Tensor, sigma: Tensor, condition: Condition, size: tuple[int, int]) -> dict[str, Any]:
        """Noise level as time, positions of the tokens, prompts and embedded guidance."""
        embeds = condition["prompt_embeds"].to(x_t.dtype)
        arguments: dict[str, Any] = {"hidden_states": x_t, "timestep": sigma, "encoder_hidden_states": embeds}
        if self.embedded_guidance is not None:
            arguments["guidance"] = torch.full_like(sigma, self.embedded_guidance)
        rows, columns = self._grid(x_t, size)
        if self.kind == "qwen_image":
            arguments["encoder_hidden_states_mask"] = condition["prompt_mask"]
            return arguments | {"img_shapes": [[(1, rows, columns)]] * len(x_t)}
        if self.kind == "flux":
            arguments["pooled_projections"] = condition["pooled"].to(x_t.dtype)
        axes = 3 if self.kind == "flux" else 4
        image = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
        text = torch.zeros(embeds.shape[1], axes)
        if self.kind == "flux2":
            text[:, -1] = torch.arange(len(text))
        ids = {"img_ids": F.pad(image, (1, axes - 3)), "txt_ids": text}
        return arguments | {name: value.to(x_t.device) for name, value in ids.items()}

    def _grid(self, x_t: Tensor, size: tuple[int, int]) -> tuple[int, int]:
        side = round((size[0] * size[1] / x_t.shape[1]) ** 0.5)
        return size[0] // side, size[1] // side

    def conditions(self, batch: Batch) -> tuple[Condition, Condition]:
        """The prompts, and the negative prompt for each; without one the prompts again."""
        names = ("prompt_embeds", "prompt_mask", "pooled")
        positive = {name: batch[name] for name in names if name in batch}
        embeds = positive["prompt_embeds"]
        positive.setdefault("prompt_mask", embeds.new_ones(embeds.shape[:2], dtype=torch.bool))
        if self.negative is None:
            return positive, positive
        negative = {name: value.expand(len(embeds), *value.shape).to(embeds) for name, value in self.negative.items()}
        negative["prompt_mask"] = embeds.new_ones(negative["prompt_embeds"].shape[:2], dtype=torch.bool)
        return positive, negative

    def seq_len(self, x_t: Tensor) -> int:
        """T."""
        return x_t.shape[1]


def as_batch(loaded: Any) -> Batch:
    """A batch by name, of a loader that yields (images, labels) too."""
    return loaded if isinstance(loaded, dict) else dict(zip(("latents", "class_labels"), loaded))


def joined(first: Condition, second: Condition) -> Condition:
    """Both conditions in one, 2 B samples; the shorter prompts are padded with zeros, which the mask tells."""
    whole = {}
    for name, a in first.items():
        b = second[name]
        if name != "class_labels" and a.dim() > 1 and name != "pooled" and a.shape[1] != b.shape[1]:
            length = max(a.shape[1], b.shape[1])
            a, b = (F.pad(x, [0, 0] * (x.dim() - 2) + [0, length - x.shape[1]]) for x in (a, b))
        whole[name] = torch.cat([a, b])
    return whole


def select(condition: Condition, index: Tensor) -> Condition:
    """The samples of a condition at `index` (N,)."""
    return {name: value[index] for name, value in condition.items()}


class SharedTeacher(nn.Module):
    """The teacher in the student's own layers: their low-rank updates off, its own output layers on.

    Registered are those output layers alone. The rest belongs to the student, under whose names it is partitioned,
    trained or frozen, and saved: ZeRO-3 would otherwise hook, and gather, every shared block twice.
    """

    def __init__(self, network: Any, student: nn.Module) -> None:
        super().__init__()
        self.norm_out, self.proj_out = network.norm_out, network.proj_out
        self._shared = (network, student)  # a tuple keeps modules out of the tree
        self.config = network.config

    def forward(self, **inputs: Any) -> tuple[Tensor]:
        """The velocity, for the arguments of the teacher's class."""
        network, student = self._shared
        with lora_disabled(student):
            return network(**inputs)


def build_networks(
    config: TrainConfig, teacher: Any = None, base: Any = None, *, fill: bool = True, meta: bool = False
) -> tuple[nn.Module, nn.Module]:
    """(student, teacher) of a run; the same weights on every rank, the teacher frozen.

    Args:
        teacher: the network to use; None loads the one that the configuration names.
        base: a second one, of whose modules a student that is trained whole is made; None copies the teacher's.
        fill: give the LoRA weights their initial values, rather than leave them on the meta device for a loader.
        meta: build a text-to-image teacher without values, so that nothing large is allocated.

    Raises:
        ConfigError: the teacher cannot be loaded, is of another class, or does not fit the data or the recipe.
    """
    teacher = build_teacher(config, meta=meta) if teacher is None else teacher
    check_fits(teacher, config)
    teacher.requires_grad_(False).eval()
    settings, lora = config.student, config.student.lora
    cls = _student_class(config)
    share = lora is not None or base is not None
    options: dict[str, Any] = {"share": share} if config.teacher.is_text_to_image else {}
    if settings.policy == "gm":
        generator = None if meta else Generator().manual_seed(config.seed)
        names = ("num_gaussians", "constant_logstd", "logstd", "spread")
        options |= {name: getattr(settings, name) for name in names} | {"generator": generator}
        if config.teacher.is_text_to_image:
            options["logweights_channels"] = SUB_PIXELS
    else:
        options |= {"n_grid": settings.n_grid, "policy": settings.dx_mode}
        if config.distillation.dynamic_shift is None:
            options["shift"] = config.distillation.shift
    student = cls.from_teacher(teacher if base is None else base, **options)
    if lora is None:
        student.requires_grad_(True)
    else:
        add_lora(student, lora)
        if fill and not meta:
            fill_lora(student, config.seed)
        for module in (student.norm_out, *head_modules(student)):
            module.requires_grad_(True)
        teacher = SharedTeacher(teacher, student)
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    return student, teacher


def build_calls(teacher: Any, config: TrainConfig) -> Calls:
    """How the networks of this run are called."""
    if not config.teacher.is_text_to_image:
        return ClassCalls(teacher.config.num_embeds_ada_norm)
    distillation = config.distillation
    negative = negative_prompt(config.data, describe_data(config.data)) if distillation.guidance_scale != 1 else None
    return TextCalls(config.teacher.kind, teacher.config.in_channels, distillation.embedded_guidance, negative)


def negative_prompt(config: DataConfig, data: DataFormat) -> Condition:
    """The negative prompt that the cached prompts came with; of made-up data one token of zeros."""
    if config.kind == "random":
        assert data.prompt_width is not None
        zeros = {"prompt_embeds": torch.zeros(1, data.prompt_width)}
        return zeros | ({"pooled": torch.zeros(data.pooled_width)} if data.pooled_width else {})
    from piflow.data.prompts import read_negative

    folder = config.path if config.kind == "prompts" else config.prompts
    assert folder is not None
    try:
        return read_negative(folder)
    except ValueError as error:
        raise ConfigError(f"distillation.guidance_scale needs a negative prompt: {error}") from error


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


def count_parameters(config: TrainConfig) -> dict[str, int]:
    """Numbers of parameters by what becomes of them, without allocating a text-to-image teacher.

    Of those trained, `LoRA` and `head` (output layers and `norm_out`) are listed by themselves.
    """
    student, teacher = build_networks(config, meta=True)
    named = {f"student.{name}": p for name, p in student.named_parameters()}
    everything = named | {f"teacher.{name}": p for name, p in teacher.named_parameters()}
    trained = {name.removeprefix("student."): p.numel() for name, p in named.items() if p.requires_grad}
    lora = sum(size for name, size in trained.items() if ".lora_" in name)
    head = sum(size for name, size in trained.items() if name.startswith(HEAD) and ".lora_" not in name)
    total = sum(p.numel() for p in everything.values())
    counts = {"trainable": sum(trained.values()), "frozen": total - sum(trained.values())}
    return counts | {"LoRA": lora, "head": head, "rest of the trainable": counts["trainable"] - lora - head}


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The transformer blocks, which ZeRO-3 gathers as wholes."""
    lists = ("transformer_blocks", "single_transformer_blocks")
    return [block for name in lists for block in getattr(network, name, ())]


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


def _student_class(config: TrainConfig) -> Any:
    policy = config.student.policy
    if config.teacher.is_text_to_image:
        return student_class(diffusers_class(config.teacher), "GM" if policy == "gm" else "DX")
    return GMDiTTransformer2DModelV2 if policy == "gm" else DXDiTTransformer2DModel


def diffusers_class(config: TeacherConfig) -> Any:
    """The class of a teacher."""
    import diffusers

    return getattr(diffusers, TEACHER_CLASSES[config.kind])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")
