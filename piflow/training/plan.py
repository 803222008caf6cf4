"""Whether a run fits, before it is started: bytes of each GPU by item, traffic and compute of an iteration.

    plan = memory_plan(load_config("configs/qwen_image/gm_4nfe.yaml"), num_gpus=8, gpu_memory=80e9)

Parameters are counted on networks that are built without values; activations and FLOPs are those of the same networks
run without allocating anything (`piflow.training.workload`).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from piflow.training.advice import changes
from piflow.training.config import DataConfig, RandomDataConfig, TrainConfig
from piflow.training.engine import deepspeed_config, micro_steps
from piflow.training.errors import ConfigError
from piflow.training.loading import local_folder
from piflow.training.module import PiIDModule, build_module
from piflow.training.teachers import TEACHER_CLASSES, build_teacher
from piflow.training.workload import Workload, workload

BANDWIDTH = 300e9  # bytes a second that a GPU receives of others: NVLink, of which collectives reach about two thirds
COMPUTE = 400e12  # bfloat16 FLOP/s that such networks reach on an H100 or H200
RESERVE = (2e9, 0.05)  # of a GPU's memory: context and NCCL in bytes, holes between blocks as a share of the tensors


@dataclass(frozen=True)
class Item:
    """Bytes on each GPU, and what they are."""

    name: str
    bytes: int
    what: str


@dataclass(frozen=True)
class Counts:
    """Parameters of a run, and bytes of them. `largest` is the largest set that ZeRO-3 gathers at once."""

    base: int
    trainable: int
    base_share: int
    trainable_share: int
    itemsize: int
    student: int
    teacher: int
    largest: int
    persistent: int
    partitioned: int

    @classmethod
    def of(cls, module: PiIDModule, world_size: int, itemsize: int, persistence_threshold: int = 0) -> Counts:
        """Of a module on any device; each parameter is padded to a multiple of `world_size`."""
        parameters = list(module.parameters())
        frozen, trained = ([p for p in parameters if p.requires_grad is trains] for trains in (False, True))
        persistent = sum(p.numel() for p in parameters if p.numel() <= persistence_threshold)
        student, own = set(module.student.parameters()), _size(module.teacher.parameters())
        shared = sum(p.numel() for p in student if not p.requires_grad)
        return cls(
            base=_size(frozen),
            trainable=_size(trained),
            base_share=sum(-(-p.numel() // world_size) for p in frozen),
            trainable_share=sum(-(-p.numel() // world_size) for p in trained),
            itemsize=itemsize,
            student=_size(student),
            teacher=own + shared,
            largest=max(_size(unit) for unit in _gathered_at_once(module)),
            persistent=persistent,
            partitioned=_size(parameters) - persistent,
        )


@dataclass(frozen=True)
class Plan:
    """The answer. `items` add up to `peak`; `note` is what was assumed; `changes` are what helps where it does not fit,
    the best first.
    """

    num_gpus: int
    gpu_memory: float
    counts: Counts
    work: Workload
    items: tuple[Item, ...]
    flops: float
    traffic: float
    compute_seconds: float
    traffic_seconds: float
    note: str = ""
    changes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes of tensors on each GPU."""
        return sum(item.bytes for item in self.items)

    @property
    def needed(self) -> float:
        """`peak`, and what the GPU keeps for itself."""
        fixed, share = RESERVE
        return self.peak * (1 + share) + fixed

    @property
    def fits(self) -> bool:
        """Whether a GPU holds it."""
        return self.needed <= self.gpu_memory

    def to_dict(self) -> dict[str, Any]:
        """For JSON; bytes, FLOPs and seconds."""
        return {
            "num_gpus": self.num_gpus,
            "gpu_memory": self.gpu_memory,
            "parameters": {"base": self.counts.base, "trainable": self.counts.trainable},
            "bytes": {item.name: item.bytes for item in self.items},
            "peak": self.peak,
            "needed": self.needed,
            "fits": self.fits,
            "iteration": {
                "flops_per_gpu": self.flops,
                "traffic_per_gpu": self.traffic,
                "compute_seconds": self.compute_seconds,
                "traffic_seconds": self.traffic_seconds,
            },
            "note": self.note,
            "changes": list(self.changes),
        }


def memory_plan(
    config: TrainConfig,
    num_gpus: int,
    gpu_memory: float,
    *,
    pixels: int | None = None,
    prompt_tokens: int = 256,
    bandwidth: float = BANDWIDTH,
    compute: float = COMPUTE,
    advise: bool = True,
) -> Plan:
    """The plan of a run on `num_gpus` GPUs of `gpu_memory` bytes each.

    Args:
        pixels: height and width of the images of a text-to-image model; None takes the configuration's latents, or
            1024. Cached data are not looked at, and a teacher's files need not be there: see `with_published_size`.
        prompt_tokens: length of its prompts.
        bandwidth: bytes a second that a GPU receives from the others.
        compute: FLOP/s of a GPU.
        advise: work out what to change where it does not fit.

    Raises:
        ConfigError: the networks cannot be built, the batch does not divide over the GPUs, or there is no GPU.
    """
    if num_gpus < 1 or not gpu_memory > 0:
        raise ConfigError(f"A plan is for at least one GPU with some memory, got {num_gpus} of {gpu_memory:g} bytes.")
    config, note = with_published_size(config)
    modules: dict[str, PiIDModule] = {}
    runs: dict[bool, Workload] = {}  # what another batch or rank needs is worked out from one run

    def plan(changed: TrainConfig, gpus: int) -> Plan:
        student = changed.student.model_dump_json()
        if student not in modules:
            modules[student] = build(changed, pixels)
        module, checkpointing = modules[student], changed.student.gradient_checkpointing
        shape = latent_shape(module.teacher.config, changed, pixels)
        if checkpointing not in runs:
            runs[checkpointing] = workload(module, changed, shape, prompt_tokens)
            runs[checkpointing] = runs[checkpointing].times(1 / changed.batch_size_per_rank)
        work = runs[checkpointing].times(changed.batch_size_per_rank)
        zero = deepspeed_config(changed, gpus)["zero_optimization"]
        itemsize = 2 if changed.precision == "bfloat16" else 4
        counts = Counts.of(module, gpus, itemsize, zero["stage3_param_persistence_threshold"])
        items = memory_items(counts, work, zero, gpus, changed)
        steps, calls = micro_steps(changed, gpus), config.distillation.num_intermediate_states
        flops = steps * (work.student_flops + calls * work.teacher_flops)
        traffic = steps * traffic_of(counts, zero, gpus, calls)
        seconds = (flops / compute, traffic / bandwidth)
        return Plan(gpus, gpu_memory, counts, work, tuple(items), flops, traffic, *seconds, note=note)

    planned = plan(config, num_gpus)
    if planned.fits or not advise:
        return planned
    return replace(planned, changes=tuple(changes(config, planned, plan)))


def memory_items(
    counts: Counts, work: Workload, zero: dict[str, Any], world_size: int, config: TrainConfig
) -> list[Item]:
    """Bytes on each of `world_size` GPUs at the peak, for DeepSpeed's settings `zero`."""
    share, size = counts.trainable_share, counts.itemsize
    moments = 2 * (1 + 4 / 256) if config.optimizer.kind == "adamw_8bit" else 8  # 8 bits and a float32 for each 256
    bucket = zero["reduce_bucket_size"]
    activations = round(work.activations(config.student.gradient_checkpointing))
    live = gathered(counts, zero) if world_size > 1 else 0  # alone, a gathered parameter is its own partition
    in_flight = size * min(max(counts.largest, zero["stage3_prefetch_bucket_size"]), counts.partitioned)
    reduced, step = 4 * min(bucket, counts.trainable), 4 * share  # DeepSpeed copies gradients to reduce and to step
    if world_size == 1:
        in_flight = 0
    elif stays(counts, zero):  # fetched at the beginning, before there are activations
        in_flight = max(in_flight - activations - reduced, 0)
    buffers = 4 * bucket + max(reduced + in_flight, step - activations - live)
    return [
        Item("base", size * counts.base_share, "frozen parameters, partitioned"),
        Item("trainable", size * share, "trained parameters, partitioned"),
        Item("optimiser", round((4 + moments) * share), "float32 master weights and two moments"),
        Item("gradients", 4 * share, "float32, partitioned"),
        Item("ema", 4 * share, "float32 average, partitioned"),
        Item("activations", activations, "held for the backward pass, and one block or one call of the teacher"),
        Item("gathered", live, "whole parameters of the layers at work and of those fetched ahead"),
        Item("buffers", buffers, "gradients being reduced, parameters in flight"),
    ]


def gathered(counts: Counts, zero: dict[str, Any]) -> int:
    """Bytes of whole parameters that live at once: persistent ones, and up to what the settings let be fetched."""
    ahead = zero["stage3_max_live_parameters"] if zero["stage3_prefetch_bucket_size"] else 0
    live = max(counts.largest, ahead, zero["stage3_max_reuse_distance"])
    return counts.itemsize * (counts.persistent + min(live, counts.partitioned))


def stays(counts: Counts, zero: dict[str, Any]) -> bool:
    """Whether what was gathered stays until the end of the step."""
    return bool(zero["stage3_max_reuse_distance"] >= counts.partitioned)


def traffic_of(counts: Counts, zero: dict[str, Any], world_size: int, teacher_calls: int) -> float:
    """Bytes that a GPU receives in a micro-step.

    Partitioned parameters are gathered for the student's forward pass, for its backward pass (recomputation included)
    and for each call of the teacher, or once where they stay until the step ends; gradients are reduced in float32.
    """
    passes = 2 * counts.student + teacher_calls * counts.teacher
    if stays(counts, zero):
        passes = counts.partitioned
    scale = counts.partitioned / max(counts.partitioned + counts.persistent, 1)
    return (world_size - 1) / world_size * (counts.itemsize * passes * scale + 4 * counts.trainable)


def with_published_size(config: TrainConfig) -> tuple[TrainConfig, str]:
    """The configuration, without the files of a teacher that are not there but of the size that its class has by
    default, which is that of the published network; and what was assumed.
    """
    settings = config.teacher
    if settings.random is not None or settings.path is None or settings.path.exists() or settings.kind == "digits":
        return config, ""
    sizes: dict[str, Any] = {}
    if settings.is_text_to_image:
        with suppress(ConfigError):
            local_folder(str(settings.path), weights=False)
            return config, ""
    if settings.kind in ("flux", "flux2"):
        sizes["guidance_embeds"] = config.distillation.embedded_guidance is not None
    teacher = settings.model_copy(update={"path": None, "random": sizes})
    cls = TEACHER_CLASSES[settings.kind]
    note = f"There is no teacher in {settings.path}: planned for a {cls} of the size that it has by default."
    return config.model_copy(update={"teacher": teacher}), note


def build(config: TrainConfig, pixels: int | None = None) -> PiIDModule:
    """The module of a run without the values of a large teacher, and with made-up data in place of cached ones."""
    teacher = build_teacher(config, meta=True)
    if config.data.kind in ("latents", "prompts"):
        network, shape = teacher.config, latent_shape(teacher.config, config, pixels)
        latents = None if config.distillation.data_free else shape
        shapes = RandomDataConfig(latents=latents, num_classes=network.get("num_embeds_ada_norm"))
        if config.teacher.is_text_to_image:
            widths = {"prompt_width": network.joint_attention_dim}
            widths |= {"pooled_width": network.pooled_projection_dim} if config.teacher.kind == "flux" else {}
            shapes = RandomDataConfig(latents=latents, **widths)
        distillation = config.distillation.model_copy(update={"latent_shape": shape})
        data = DataConfig(kind="random", random=shapes)
        config = config.model_copy(update={"data": data, "distillation": distillation})
    return build_module(config, teacher, meta=True)


def latent_shape(network: Any, config: TrainConfig, pixels: int | None = None) -> tuple[int, int, int]:
    """(C, H, W) for a teacher's configuration: of `pixels`^2, or as configured, or the DiT's own, or of 1024^2."""
    if not config.teacher.is_text_to_image:
        if pixels is not None:
            raise ConfigError(f"teacher.kind={config.teacher.kind} has one image size: leave out another.")
        return network.in_channels, network.sample_size, network.sample_size
    made_up = config.data.random.latents if config.data.kind == "random" else None
    given = config.distillation.latent_shape or made_up
    if pixels is None and given is not None:
        channels, height, width = given
        return channels, height, width
    if pixels is not None and pixels % 16:
        raise ConfigError(f"Images of {pixels} x {pixels} pixels do not divide into tokens: take a multiple of 16.")
    side = 16 if config.teacher.kind == "flux2" else 8  # pixels of a latent one; FLUX.2's are put in 2 x 2 already
    channels = network.in_channels // (1 if config.teacher.kind == "flux2" else 4)
    return channels, (pixels or 1024) // side, (pixels or 1024) // side


def _gathered_at_once(module: PiIDModule) -> list[list[nn.Parameter]]:
    """Parameters of each module that ZeRO-3 gathers as one: leaf modules whole, others by themselves."""
    leaves = module.leaf_modules()
    inside = {id(below) for leaf in leaves for below in leaf.modules()}
    alone = [list(m.parameters(recurse=False)) for m in module.modules() if id(m) not in inside]
    return [list(leaf.parameters()) for leaf in leaves] + alone


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
