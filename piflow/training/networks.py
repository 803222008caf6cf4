"""Student and teacher of a run, built from its configuration.

With LoRA a text-to-image student is its teacher's network once more, with an output layer of its own: there is one set
of base weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from piflow.models.dit import DXDiTTransformer2DModel, GMDiTTransformer2DModelV2
from piflow.models.generic import student_class
from piflow.models.heads import head_modules
from piflow.training.calls import (
    Batch,
    Calls,
    ClassCalls,
    Condition,
    TextCalls,
    as_batch,
    joined,
    select,
)
from piflow.training.config import DataConfig, TrainConfig
from piflow.training.data import DataFormat, describe_data
from piflow.training.errors import ConfigError
from piflow.training.lora import HEAD, add_lora, fill_lora, lora_disabled
from piflow.training.teachers import (
    build_teacher,
    check_fits,
    diffusers_class,
    load_class_teacher,
    read_teacher_config,
    teacher_source,
)

__all__ = [
    "Batch",
    "Calls",
    "ClassCalls",
    "Condition",
    "SharedTeacher",
    "TextCalls",
    "as_batch",
    "blocks_of",
    "build_calls",
    "build_networks",
    "build_teacher",
    "check_fits",
    "count_parameters",
    "diffusers_class",
    "joined",
    "load_class_teacher",
    "negative_prompt",
    "read_teacher_config",
    "select",
    "teacher_source",
]

SUB_PIXELS = 4
"""Latent pixels in a token of the text-to-image teachers; each has its own component weights."""


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


def _student_class(config: TrainConfig) -> Any:
    policy = config.student.policy
    if config.teacher.is_text_to_image:
        return student_class(diffusers_class(config.teacher), "GM" if policy == "gm" else "DX")
    return GMDiTTransformer2DModelV2 if policy == "gm" else DXDiTTransformer2DModel
