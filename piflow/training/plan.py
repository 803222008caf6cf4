"""Whether a run fits, before it is started: bytes of each GPU by item, traffic and compute of an iteration.

    plan = memory_plan(load_config("configs/qwen_image/gm_4nfe.yaml"), num_gpus=8, gpu_memory=80e9)

Parameters are counted on networks that are built without values. Activations and FLOPs are those of the same networks
run on fake tensors (torch's FakeTensorMode): every operation computes shapes, and nothing is allocated.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from piflow.training.config import DataConfig, RandomDataConfig, TrainConfig
from piflow.training.engine import deepspeed_config, micro_steps
from piflow.training.errors import ConfigError
from piflow.training.module import PiIDModule, build_module
from piflow.training.networks import blocks_of, build_teacher

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
class Workload:
    """What the networks do in one micro-step: FLOPs, and bytes beside the parameters.

    held: between the student's forward and backward pass; block: one block run forward and backward; block_held: what
    it holds in between; teacher: a call of the teacher. student_flops: forward pass, recomputation and backward pass.
    """

    student_flops: float
    teacher_flops: float
    held: float
    block: float
    block_held: float
    teacher: float

    def times(self, factor: float) -> Workload:
        """Of a batch `factor` times as large."""
        return Workload(*(factor * getattr(self, field.name) for field in fields(self)))

    def activations(self, checkpointing: bool) -> float:
        """The most that lives at once; without checkpointing what blocks hold is in `held` already."""
        return self.held + max(self.block - (0 if checkpointing else self.block_held), self.teacher)


@dataclass(frozen=True)
class Plan:
    """The answer. `items` add up to `peak`; `changes` are what helps where that does not fit, the best first."""

    num_gpus: int
    gpu_memory: float
    counts: Counts
    work: Workload
    items: tuple[Item, ...]
    flops: float
    traffic: float
    compute_seconds: float
    traffic_seconds: float
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
            1024. Cached data are not looked at, so that a run can be planned before they are there.
        prompt_tokens: length of its prompts.
        bandwidth: bytes a second that a GPU receives from the others.
        compute: FLOP/s of a GPU.
        advise: work out what to change where it does not fit.

    Raises:
        ConfigError: the networks cannot be built, or the batch does not divide over the GPUs.
    """
    base = build(config, pixels)
    shape = latent_shape(base.teacher.config, config, pixels)
    runs: dict[bool, Workload] = {}  # what another batch or rank needs is worked out from one run

    def plan(changed: TrainConfig, gpus: int) -> Plan:
        module = base if changed.student == config.student else build(changed, pixels)
        checkpointing = changed.student.gradient_checkpointing
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
        return Plan(gpus, gpu_memory, counts, work, tuple(items), flops, traffic, flops / compute, traffic / bandwidth)

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


def changes(config: TrainConfig, plan: Plan, again: Callable[[TrainConfig, int], Plan]) -> Iterator[str]:
    """What makes a plan smaller, what saves most first; `again` plans a changed configuration on a number of GPUs."""

    def changed(**sections: Any) -> TrainConfig:
        raw = config.model_dump()
        for name, value in sections.items():
            raw[name] = {**raw[name], **value} if isinstance(value, dict) else value
        return TrainConfig.model_validate(raw)

    zero, lora = config.zero, config.student.lora
    options: dict[str, dict[str, Any]] = {}
    if not config.student.gradient_checkpointing:
        options["student.gradient_checkpointing=true"] = {"student": {"gradient_checkpointing": True}}
    if config.batch_size_per_rank > 1:
        half = config.batch_size_per_rank // 2
        options[f"batch_size_per_rank={half}"] = {"batch_size_per_rank": half}
    if plan.num_gpus > 1 and zero.param_persistence_threshold > 100_000:
        options["zero.param_persistence_threshold=0"] = {"zero": {"param_persistence_threshold": 0}}
    if zero.max_reuse_distance:
        options["zero.max_reuse_distance=0"] = {"zero": {"max_reuse_distance": 0}}
    if zero.max_live_parameters > 2 * plan.counts.largest:
        lower = {
            "max_live_parameters": 2 * plan.counts.largest,
            "prefetch_bucket_size": min(zero.prefetch_bucket_size, plan.counts.largest),
        }
        options[" ".join(f"zero.{name}={number}" for name, number in lower.items())] = {"zero": lower}
    if zero.reduce_bucket_size > plan.counts.largest:
        options[f"zero.reduce_bucket_size={plan.counts.largest}"] = {
            "zero": {"reduce_bucket_size": plan.counts.largest}
        }
    if config.optimizer.kind == "adamw":
        options["optimizer.kind=adamw_8bit"] = {"optimizer": {"kind": "adamw_8bit"}}
    if lora and lora.rank > 1:
        options[f"student.lora.rank={lora.rank // 2}"] = {
            "student": {"lora": {**lora.model_dump(), "rank": lora.rank // 2}}
        }

    saved = []
    for text, sections in options.items():
        with suppress(ConfigError, ValueError):  # a change that the rest of the configuration does not allow
            other = again(changed(**sections), plan.num_gpus)
            saved.append((other.fits, plan.peak - other.peak, text))
    for factor in (2, 4, 8, 16, 32):
        try:
            other = again(config, plan.num_gpus * factor)
        except ConfigError:  # the batch does not divide
            continue
        if other.fits or factor == 32:
            saved.append((other.fits, plan.peak - other.peak, f"{plan.num_gpus * factor} GPUs"))
            break
    for fits, less, text in sorted(saved, reverse=True):
        if less > 0:
            yield f"{text}: {less / 1e9:.2f} GB less, {'fits' if fits else 'not enough alone'}"


def workload(
    module: PiIDModule, config: TrainConfig, latent_shape: tuple[int, int, int], prompt_tokens: int
) -> Workload:
    """Run student, one block and teacher on fake tensors. Turns the module's parameters into fake ones."""
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    batch = config.batch_size_per_rank
    branches = 1 if config.distillation.guidance_scale == 1 else 2
    blocks = blocks_of(module.student)
    with FakeTensorMode(allow_non_fake_inputs=True):
        known = _fake_parameters(module, dtype)
        seen: dict[type, tuple[nn.Module, Any, Any]] = {}

        def note(block: nn.Module, args: Any, kwargs: Any) -> None:
            seen.setdefault(type(block), (block, args, kwargs))

        hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
        inputs = _inputs(module, latent_shape, batch, prompt_tokens, dtype)
        module.train()
        with LiveBytes(known) as live, _flop_counter() as forward:
            output = module.student(**inputs)
        for hook in hooks:
            hook.remove()
        held = live.now

        in_blocks, recomputed, backward, largest, largest_held = 0, 0, 0, 0, 0
        for kind, (block, args, kwargs) in seen.items():
            count = sum(type(other) is kind for other in blocks)
            cost = _run_block(block, args, kwargs)
            in_blocks += count * cost[0]
            backward += count * cost[1]
            if cost[2] > largest:
                largest, largest_held = cost[2], cost[3]
        if config.student.gradient_checkpointing:
            recomputed = in_blocks
        total = forward.get_total_flops()
        outside = 2 * (total - in_blocks)
        del output

        inputs = _inputs(module, latent_shape, branches * batch, prompt_tokens, dtype)
        with LiveBytes((inputs, known)) as live, _flop_counter() as call, torch.no_grad():
            module.teacher(**inputs, return_dict=False)
    student_flops = total + recomputed + backward + outside
    return Workload(student_flops, call.get_total_flops(), held, largest, largest_held, live.peak)


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
    side = 16 if config.teacher.kind == "flux2" else 8  # pixels of a latent one; FLUX.2's are put in 2 x 2 already
    channels = network.in_channels // (1 if config.teacher.kind == "flux2" else 4)
    return channels, (pixels or 1024) // side, (pixels or 1024) // side


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made within it: `now`, those still alive, and `peak`. Views of `known` do not count.

    Works on fake tensors and on real ones, of any device.
    """

    def __init__(self, known: Any = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.storages: set[int] = set()
        for storage in {x.untyped_storage() for x in tree_leaves(known) if isinstance(x, Tensor)}:
            self._register(storage, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, result)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.storages:
            self._register(storage, storage.nbytes())

    def _register(self, storage: Any, size: int) -> None:
        self.storages.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, size)  # another one may come to lie at its address

    def _gone(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.now -= size


def _run_block(block: nn.Module, args: Any, kwargs: Any) -> tuple[int, int, int, int]:
    """(FLOPs forward, FLOPs backward, peak bytes, bytes held in between) of one block, run without checkpointing."""
    args, kwargs = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.is_floating_point()), (args, kwargs))
    with LiveBytes((args, kwargs, list(block.parameters()))) as live, _flop_counter() as flops:
        outputs = [x for x in tree_leaves(block(*args, **kwargs)) if isinstance(x, Tensor) and x.requires_grad]
        forward, held = flops.get_total_flops(), live.now
        torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
    for parameter in block.parameters():
        parameter.grad = None
    return forward, flops.get_total_flops() - forward, live.peak, held


def _inputs(module: PiIDModule, shape: tuple[int, int, int], batch: int, tokens: int, dtype: torch.dtype) -> Any:
    """Keyword arguments of a network for `batch` latents of `shape`, in a FakeTensorMode."""
    state = module.calls.state(torch.empty(batch, *shape, dtype=dtype)).requires_grad_()
    network = module.teacher.config
    condition: dict[str, Any] = {"class_labels": torch.zeros(batch, dtype=torch.long)}
    if module.calls.layout == "packed":
        condition = {
            "prompt_embeds": torch.empty(batch, tokens, network.joint_attention_dim, dtype=dtype),
            "prompt_mask": None,
            "pooled": torch.empty(batch, getattr(network, "pooled_projection_dim", 1), dtype=dtype),
        }
    return module.calls.inputs(state, torch.empty(batch), condition, (shape[1], shape[2]))


def _fake_parameters(module: nn.Module, dtype: torch.dtype) -> list[nn.Parameter]:
    """Put parameters without memory in place of the module's, and return them."""
    for name, parameter in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        fake = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), parameter.requires_grad)
        module.get_submodule(owner).register_parameter(leaf, fake)
    return list(module.parameters())


def _gathered_at_once(module: PiIDModule) -> list[list[nn.Parameter]]:
    """Parameters of each module that ZeRO-3 gathers as one: leaf modules whole, others by themselves."""
    leaves = module.leaf_modules()
    inside = {id(below) for leaf in leaves for below in leaf.modules()}
    alone = [list(m.parameters(recurse=False)) for m in module.modules() if id(m) not in inside]
    return [list(leaf.parameters()) for leaf in leaves] + alone


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


@contextmanager
def _flop_counter() -> Iterator[FlopCounterMode]:
    """torch's counter, which does not know the attention kernels of the CPU by itself."""

    def forward(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    aten = torch.ops.aten
    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        yield counter
