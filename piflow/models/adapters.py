"""Published pi-Flow adapters on diffusers transformers: load, switch off and on, swap, unload.

    student = load_piflow_adapter(transformer, "Lakonik/pi-Qwen-Image", subfolder="gmqwen_k8_piid_4step")
    name = pipe.load_piflow_adapter("Lakonik/pi-Qwen-Image", subfolder="gmqwen_k8_piid_4step")

A student is a transformer of its own over the base's tensors (see `piflow.models.sharing`), with its own output layers
and LoRA. The base is never changed, and both can be called at any time; they move between devices together. Every
function here takes either transformer of such a pair, and returns the one that is now to be used, or it takes a
pipeline, and exchanges its transformer.

Style LoRAs belong to the transformer into which they are loaded: those that the base has when an adapter is loaded are
on both; those that are loaded on top of an adapter leave and return with it. Weigh them with
`set_adapters([name, "style"], [1.0, 0.7])`; an adapter that is not named there is off, its output layers are not.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import HookRegistry, group_offloading
from diffusers.hooks.layerwise_casting import _LAYERWISE_CASTING_HOOK, apply_layerwise_casting_hook
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from piflow import models
from piflow.models.adapter_files import CONFIG, Adapter, read_adapter
from piflow.models.heads import base_of, cast_input
from piflow.models.sharing import copy_attributes, graft, is_hooked, layer_at, layers_of, shape_of, twin, without_lora

log = logging.getLogger(__name__)

OF_THE_BASE = (
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "_hf_hook",
    "hf_device_map",
    "hf_quantizer",
    "is_quantized",
    "quantization_method",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "peft_config",
    "_hf_peft_config_loaded",
)
"""Attributes of a transformer as a whole that a student over the same tensors must have too."""

GROUP_HOOKS = (
    group_offloading._GROUP_OFFLOADING,
    group_offloading._LAYER_EXECUTION_TRACKER,
    group_offloading._LAZY_PREFETCH_GROUP_OFFLOADING,
)

BY_THE_ADAPTER = ("out_channels", "out_visual_dim", "out_audio_dim", "_name_or_path", "_use_default_values")
"""Keys of a configuration in which a student may differ from its base."""


@dataclass(eq=False)
class Family:
    """A base and the students over its tensors, known to each of them as `piflow_family`."""

    base: Any
    students: dict[str, Any] = field(default_factory=dict)
    chosen: str | None = None
    dtype: torch.dtype | None = None
    """Of the tensors that all have, when an adapter was loaded or switched last."""

    def student(self, name: str | None) -> Any:
        name = name or self.chosen
        if name not in self.students:
            raise ValueError(f"adapter_name: expected one of {list(self.students)}, which are loaded, got {name!r}")
        self.chosen = name
        return self.students[name]


def load_piflow_adapter(
    owner: Any,
    path_or_repo: str | Path,
    *,
    subfolder: str | None = None,
    adapter_name: str | None = None,
    target_module_name: str = "transformer",
    lora_dtype: torch.dtype | None = None,
    **files: Any,
) -> Any:
    """A student over the tensors of `owner`, which is a transformer or a pipeline that has one.

    The adapter's output layers and LoRA keep the dtype of their file, whatever the base is in, quantised bases too.
    `student.policy_config` is what the adapter asks for, or {"type": "GMFlow"} or {"type": "DX"} by its class.

    Args:
        path_or_repo: a folder, or the name of a Hugging Face repository, in the published format.
        adapter_name: of the LoRA and for switching; "<target_module_name>_piflow" where it is not given.
        target_module_name: the pipeline's attribute that holds the transformer.
        lora_dtype: another dtype for the LoRA.
        files: `allow_pickle`, `revision`, `token`, `cache_dir`, `local_files_only`; see `read_adapter`.

    Returns:
        The student; a pipeline now uses it.

    Raises:
        FileNotFoundError: no such folder, repository or file.
        ValueError: damaged files, an unknown class, or an adapter of another base, naming the first tensor that does
            not fit. Base and pipeline are then as they were.
    """
    current = _transformer(owner, target_module_name)
    family: Family = getattr(current, "piflow_family", None) or Family(current)
    name = adapter_name or f"{target_module_name}_piflow"
    if not name.replace("_", "a").replace("-", "a").isalnum():
        raise ValueError(f"adapter_name: expected letters, digits, - and _, got {name!r}")
    if name in family.students or name in getattr(family.base, "peft_config", {}):
        raise ValueError(f"adapter_name: {name!r} is already loaded. Unload it, or give another name.")
    _check_not_fused(current)
    adapter = read_adapter(path_or_repo, subfolder=subfolder, **files)
    with _offloading_paused(owner, target_module_name):
        _follow(family, family.base, current)
        student = build_student(family.base, adapter, name, lora_dtype)
        _follow(family, student, family.base)
        _use(owner, target_module_name, student)
    family.students[name], family.chosen = student, name
    family.base.piflow_family = family
    student.piflow_family = family
    return student


def set_piflow_adapter(owner: Any, adapter_name: str, *, target_module_name: str = "transformer") -> Any:
    """The student of that name, which a pipeline now uses. Raises ValueError for a name that is not loaded."""
    return _switch(owner, target_module_name, _family(owner, target_module_name).student(adapter_name))


def enable_piflow_adapter(owner: Any, *, target_module_name: str = "transformer") -> Any:
    """The student that was loaded or set last, which a pipeline now uses."""
    return _switch(owner, target_module_name, _family(owner, target_module_name).student(None))


def disable_piflow_adapter(owner: Any, *, target_module_name: str = "transformer") -> Any:
    """The base as it was before any adapter, which a pipeline now uses; the students stay loaded."""
    return _switch(owner, target_module_name, _family(owner, target_module_name).base)


def unload_piflow_adapter(
    owner: Any, adapter_name: str | None = None, *, target_module_name: str = "transformer"
) -> Any:
    """Forget one student, or all of them. A pipeline goes back to the base, unless it uses another student."""
    family = _family(owner, target_module_name)
    leaving = dict(family.students) if adapter_name is None else {adapter_name: family.student(adapter_name)}
    used = _transformer(owner, target_module_name)
    if any(_uncompiled(used) is _uncompiled(student) for student in leaving.values()):
        used = _switch(owner, target_module_name, family.base)
    for name in leaving:
        del _uncompiled(family.students.pop(name)).piflow_family
    family.chosen = next(reversed(family.students), None)
    if not family.students:
        del _uncompiled(family.base).piflow_family
    return used


class PiFlowLoaderMixin:
    """Published pi-Flow adapters on a diffusers pipeline; the functions of this module as methods.

    To be put before the diffusers pipeline in the bases.
    """

    def load_piflow_adapter(
        self,
        path_or_repo: str | Path,
        *,
        subfolder: str | None = None,
        adapter_name: str | None = None,
        target_module_name: str = "transformer",
        **options: Any,
    ) -> str:
        """Load an adapter and use it; returns its name. See the function of that name for arguments and errors."""
        student = load_piflow_adapter(
            self,
            path_or_repo,
            subfolder=subfolder,
            adapter_name=adapter_name,
            target_module_name=target_module_name,
            **options,
        )
        return student.piflow_family.chosen

    def set_piflow_adapter(self, adapter_name: str, *, target_module_name: str = "transformer") -> None:
        """Use the loaded adapter of that name."""
        set_piflow_adapter(self, adapter_name, target_module_name=target_module_name)

    def enable_piflow_adapter(self, *, target_module_name: str = "transformer") -> None:
        """Use the adapter that was loaded or set last."""
        enable_piflow_adapter(self, target_module_name=target_module_name)

    def disable_piflow_adapter(self, *, target_module_name: str = "transformer") -> None:
        """Use the base model as it was before any adapter; the adapters stay loaded."""
        disable_piflow_adapter(self, target_module_name=target_module_name)

    def unload_piflow_adapter(
        self, adapter_name: str | None = None, *, target_module_name: str = "transformer"
    ) -> None:
        """Forget one adapter, or all of them, and use the base model if the one in use is among them."""
        unload_piflow_adapter(self, adapter_name, target_module_name=target_module_name)

    def unload_lora_weights(self, **options: Any) -> None:
        """As diffusers has it, for every LoRA but those of pi-Flow adapters."""
        students: dict[str, Any] = {}
        for name in ("transformer", "transformer_2"):
            student: Any = getattr(self, name, None)
            family = getattr(student, "piflow_family", None)
            if family is not None and student is not family.base:
                students[name] = student
                setattr(self, name, family.base)
        try:
            super().unload_lora_weights(**options)  # type: ignore[misc]
        finally:
            for name, student in students.items():
                setattr(self, name, student)
        for student in students.values():
            own = name_of(student)
            student.delete_adapters([name for name in getattr(student, "peft_config", {}) if name != own])


def build_student(base: nn.Module, adapter: Adapter, adapter_name: str, lora_dtype: torch.dtype | None = None) -> Any:
    """The adapter's student over the base's tensors. Changes nothing of the base; errors as `load_piflow_adapter`."""
    base = _uncompiled(base)
    cls = student_class(adapter)
    if not isinstance(base, base_of(cls)) or hasattr(base, "install_head"):
        raise ValueError(
            f"{adapter.source} is a {cls.__name__}, to be put on a {base_of(cls).__name__}, "
            f"not on this {type(base).__name__}."
        )
    if any(parameter.is_meta for parameter in base.parameters()):
        raise ValueError(f"The weights of the {type(base).__name__} are offloaded: load the adapter before that.")
    policy_config = policy_config_for(cls, adapter.policy_config, adapter.source)
    config = {**_policy_keys(cls, policy_config), **adapter.config}
    try:
        student = _empty(cls, config)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{adapter.source}/{CONFIG} makes no {cls.__name__}: {error}") from error
    check_fits(student, base, adapter)
    if flags := _differing_flags(student, base):
        student = _empty(cls, {**config, **flags})

    graft(student, base, set(adapter.weights))
    copy_attributes(student, base, OF_THE_BASE)
    *_, last = base.parameters()
    for path, tensor in adapter.weights.items():
        layer, _, name = path.rpartition(".")
        student.get_submodule(layer)._parameters[name] = nn.Parameter(tensor.to(last.device), requires_grad=False)
    for layer in {path.rpartition(".")[0] for path in adapter.weights}:
        student.get_submodule(layer).register_forward_pre_hook(cast_input)
    for module in student.modules():
        module.training = base.training
    _keep_lora(student, base)
    if adapter.lora:
        _add_lora(student, base, adapter, adapter_name, lora_dtype)
    student.policy_config = policy_config
    return student


def student_class(adapter: Adapter) -> Any:
    """The class in `piflow.models` that an adapter's `_class_name` means.

    Leading underscores are dropped. Where an export names the diffusers class whose output it widens (no loader knew
    the students of DX), the DX student of that class is meant. Raises ValueError for any other name.
    """
    name = adapter.config["_class_name"].lstrip("_")
    for candidate in (name, f"DX{name}"):
        cls = getattr(models, candidate, None)
        if isinstance(cls, type) and hasattr(cls, "from_teacher"):
            return cls
    close = difflib.get_close_matches(name, models.__all__, n=1)
    raise ValueError(
        f"{adapter.source}/{CONFIG}: there is no class {name!r} in piflow.models"
        + (f"; did you mean {close[0]!r}?" if close else ".")
    )


def name_of(student: Any) -> str | None:
    """The name that a transformer was loaded under; None for one that is no student, or was not loaded."""
    family: Family | None = getattr(student, "piflow_family", None)
    students = {} if family is None else family.students
    return next((name for name, other in students.items() if _uncompiled(other) is _uncompiled(student)), None)


def head_of(student: nn.Module) -> Callable[[str], bool]:
    """Whether a parameter of that name is one of the student's output layers.

    They are those that its class names as replaced, those that it has a hook on, and `proj_out*`.
    """
    hooked = [f"{path}." for path, module in student.named_modules() if is_hooked(module)]
    start = ("proj_out", *(f"{name}." for name in getattr(type(student), "replaced", ())), *hooked)
    return lambda name: name.startswith(start)


def check_fits(student: nn.Module, base: nn.Module, adapter: Adapter) -> None:
    """ValueError unless the adapter's tensors and the base's together make up the student (on the meta device)."""
    ours, theirs = type(student).__name__, type(base).__name__
    of_the_head = head_of(student)

    def mismatch(name: str, own: Any, other: Any) -> ValueError:
        own, other = (f"{shape} in" if shape else "missing in" for shape in (own, other))
        return ValueError(
            f"{adapter.source} was not made for this base: {name} is {own} the adapter's {ours}, "
            f"{other} the base {theirs}."
        )

    missing = []
    expected = {name: tuple(parameter.shape) for name, parameter in student.named_parameters()}
    for name, shape in expected.items():
        layer = layer_at(base, name.rpartition(".")[0])
        other = None if layer is None else shape_of(layer, name.rpartition(".")[2])
        if name in adapter.weights:
            if not adapter.weights[name].is_floating_point():
                raise ValueError(f"{adapter.source}: {name} is {adapter.weights[name].dtype}, not floating point.")
            if (given := tuple(adapter.weights[name].shape)) != shape:
                raise ValueError(f"{adapter.source}: {name} is {given} in the weights, {CONFIG} makes it {shape}.")
        elif other != shape and of_the_head(name):
            missing.append(name)
        elif other != shape:
            raise mismatch(name, shape, other)
    for path, layer in layers_of(base):
        for name in layer._parameters:
            full = f"{path}.{name}" if path else name
            if full not in expected and not of_the_head(full) and (surplus := shape_of(layer, name)):
                raise mismatch(full, None, surplus)
    if missing:
        raise ValueError(
            f"{adapter.source} lacks {len(missing)} tensors of the output layers that a {ours} needs: "
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}."
        )
    if unknown := next((name for name in adapter.weights if name not in expected), None):
        raise ValueError(f"{adapter.source} has {unknown}, which a {ours} has not.")
    for key, tensor in adapter.lora.items():
        path, _, kind = key.partition(".lora_")
        if f"{path}.weight" not in expected:
            raise mismatch(key, tuple(tensor.shape), None)
        shape = expected[f"{path}.weight"]
        pair = [adapter.lora.get(f"{path}.lora_{side}.weight") for side in "AB"]
        if pair[0] is None or pair[1] is None:
            raise ValueError(f"{adapter.source} has {key}, but not both of lora_A and lora_B of that layer.")
        if kind not in ("A.weight", "B.weight", "B.bias"):
            raise ValueError(f"{adapter.source} has {key}: of LoRA, lora_A and lora_B are known.")
        wanted = {"A.weight": (len(pair[0]), *shape[1:]), "B.weight": (shape[0], len(pair[0]))}.get(kind)
        if len(shape) == 2 and wanted and tuple(tensor.shape) != wanted:
            raise mismatch(key, tuple(tensor.shape), wanted)


def _empty(cls: Any, config: dict[str, Any]) -> Any:
    """A student without tensors; keys that its class does not know are left out."""
    known = cls._get_init_keys(cls)
    with torch.device("meta"):
        return cls(**{key: value for key, value in config.items() if key in known})


def _differing_flags(student: Any, base: Any) -> dict[str, Any]:
    """What tensors do not show, such as which tokens are modulated how, follows the base."""
    own = {key: value for key, value in student.config.items() if key in base.config and key not in BY_THE_ADAPTER}
    return {key: base.config[key] for key, value in own.items() if _plain(base.config[key]) != _plain(value)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def is_dx(cls: type) -> bool:
    """Whether a student class predicts a DX policy, and not a GMFlow one; by its name, as published ones are told."""
    return cls.__name__.startswith("DX")


def policy_config_for(cls: type, asked: dict[str, Any] | None, source: str | Path) -> dict[str, Any]:
    """`asked`, with the policy of the student class where it does not say. ValueError for what cannot be."""
    kind = "DX" if is_dx(cls) else "GMFlow"
    config = {"type": kind, **(asked or {})}
    if str(config["type"]).lower().removesuffix("policy") != kind.lower():
        raise ValueError(f"{source} asks for the policy {config['type']!r}, but is a {cls.__name__}.")
    for key in ("segment_size", "shift", "eps", "nfe"):
        value = config.get(key)
        if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise ValueError(f"{source}: {key} in policy_config: expected a number above 0, got {value!r}.")
    return config


def _policy_keys(cls: type, policy_config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a DX student's configuration that published ones hold in `policy_config`, by its names."""
    names = {"policy": "mode", "shift": "shift"} if is_dx(cls) else {}
    return {key: policy_config[name] for key, name in names.items() if name in policy_config}


def _keep_lora(student: Any, base: nn.Module) -> None:
    """The base's LoRAs on those layers that the student has of its own; a warning where they do not fit."""
    left_out = []
    for path, layer in base.named_modules():
        parent, _, name = path.rpartition(".")
        holder = layer_at(student, parent)
        own = None if holder is None else holder._modules.get(name)
        if not isinstance(layer, BaseTunerLayer) or isinstance(own, BaseTunerLayer):
            continue
        if holder is None or own is None or shape_of(own, "weight") != shape_of(without_lora(layer), "weight"):
            left_out.append(path)
            continue
        holder._modules[name] = with_lora = twin(layer)
        with_lora._modules["base_layer"] = own
    if left_out:
        log.warning("LoRAs of the base on %s are left out: the student has other output layers.", left_out)


def _add_lora(student: Any, base: nn.Module, adapter: Adapter, name: str, dtype: torch.dtype | None) -> None:
    """The adapter's LoRA on the student, active beside those that the base has active."""
    active = {path: m.active_adapters for path, m in student.named_modules() if isinstance(m, BaseTunerLayer)}
    trainable = {weight: weight.requires_grad for weight in base.parameters()}
    try:
        inject_adapter_in_model(lora_config(adapter), student, name, low_cpu_mem_usage=True, state_dict=adapter.lora)
        for key, tensor in adapter.lora.items():
            path, _, kind = key.partition(".lora_")
            layer = student.get_submodule(path)
            half, parameter = getattr(layer, f"lora_{kind[0]}")[name], kind[2:]
            if (given := tuple(tensor.shape)) != (shape := tuple(half.get_parameter(parameter).shape)):
                raise ValueError(f"{key} is {given}, but by the rank in the metadata {shape}")
            tensor = tensor.to(layer.get_base_layer().weight.device, dtype or tensor.dtype, copy=True)
            half._parameters[parameter] = nn.Parameter(tensor, requires_grad=False)
        for path, layer in student.named_modules():
            if isinstance(layer, BaseTunerLayer):
                own = [name] if name in layer.r else []
                layer.set_adapter([*active.get(path, []), *own], inference_mode=True)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{adapter.source}: its LoRA cannot be put on: {error}") from error
    finally:
        for weight, flag in trainable.items():  # peft freezes what is not its own
            weight.requires_grad_(flag)
    student._hf_peft_config_loaded = True


def lora_config(adapter: Adapter) -> LoraConfig:
    """What the file says of its LoRA; otherwise the rank of each layer as it is, and alpha = rank."""
    if adapter.lora_config:
        return LoraConfig(**adapter.lora_config)
    ranks = {k.removesuffix(".lora_A.weight"): len(v) for k, v in adapter.lora.items() if k.endswith("lora_A.weight")}
    alphas = {path: adapter.alphas.get(path, rank) for path, rank in ranks.items()}
    rank, alpha = (Counter(numbers.values()).most_common(1)[0][0] for numbers in (ranks, alphas))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(ranks),
        rank_pattern={f"^{path}": r for path, r in ranks.items() if r != rank},
        alpha_pattern={f"^{path}": a for path, a in alphas.items() if a != alpha},
        lora_bias=any(key.endswith("lora_B.bias") for key in adapter.lora),
    )


def _transformer(owner: Any, name: str) -> Any:
    """The transformer itself, or that of a pipeline."""
    if isinstance(owner, nn.Module):
        return owner
    module = getattr(owner, name, None)
    if not isinstance(module, nn.Module):
        raise ValueError(f"target_module_name: {type(owner).__name__} has no transformer of the name {name!r}.")
    return module


def _family(owner: Any, name: str) -> Family:
    family = getattr(_transformer(owner, name), "piflow_family", None)
    if family is None:
        raise ValueError(f"No pi-Flow adapter is loaded on this {type(owner).__name__}.")
    return family


def _check_not_fused(transformer: nn.Module) -> None:
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in transformer.modules()):
        raise ValueError("LoRAs are fused into the weights, which base and students share: call unfuse_lora() first.")


def _uncompiled(transformer: Any) -> Any:
    return getattr(transformer, "_orig_mod", transformer)


def _switch(owner: Any, name: str, incoming: Any) -> Any:
    outgoing = _transformer(owner, name)
    if _uncompiled(outgoing) is _uncompiled(incoming):
        return outgoing
    _check_not_fused(outgoing)
    family: Family = outgoing.piflow_family
    if (own := name_of(outgoing)) is not None:
        family.students[own] = outgoing  # which the person may have compiled
    staying = getattr(outgoing, "peft_config", {}).keys() - getattr(incoming, "peft_config", {}).keys()
    if staying := staying - outgoing.piflow_family.students.keys():
        log.warning("The LoRAs %s stay with the transformer on which they were loaded.", sorted(staying))
    with _offloading_paused(owner, name):
        _follow(family, incoming, outgoing)
        _use(owner, name, incoming)
    return incoming


def _follow(family: Family, incoming: Any, outgoing: Any) -> None:
    """Do to what only `incoming` has what was done, through `outgoing`, to the tensors of both.

    It goes to their device. The base's own goes to their dtype too; a student's keeps its dtype.
    """
    shared = {id(tensor) for tensor in outgoing.parameters()}
    both = [tensor for tensor in incoming.parameters() if id(tensor) in shared]
    dtype = next((t.dtype for t in both if t.dtype.is_floating_point and t.dtype.itemsize > 1), None)
    of_the_base = _uncompiled(incoming) is _uncompiled(family.base)
    recast = {family.dtype: dtype} if of_the_base and None not in (family.dtype, dtype) else {}
    for module in incoming.modules():
        own = [t for t in module._parameters.values() if t is not None and id(t) not in shared]
        if own and not hasattr(module, "_hf_hook") and not any(t.is_meta for t in own):
            module.to(device=both[-1].device, dtype=recast.get(own[0].dtype))
    family.dtype = dtype
    _cast_by_layer(incoming, outgoing)


def _cast_by_layer(incoming: Any, outgoing: Any) -> None:
    """diffusers' layerwise casting changes the tensors of both in place, so that both need its hooks."""
    theirs = dict(layers_of(_uncompiled(outgoing)))
    for path, layer in layers_of(_uncompiled(incoming)):
        other = theirs.get(path)
        hook = None if other is None or other._parameters is not layer._parameters else _casting(other)
        if hook is not None and _casting(layer) is None:
            apply_layerwise_casting_hook(layer, hook.storage_dtype, hook.compute_dtype, hook.non_blocking)


def _casting(layer: nn.Module) -> Any:
    hooks = getattr(layer, "_diffusers_hook", None)
    return None if hooks is None else hooks.get_hook(_LAYERWISE_CASTING_HOOK)


def _use(owner: Any, name: str, transformer: Any) -> None:
    if not isinstance(owner, nn.Module):
        owner.register_modules(**{name: transformer})


@contextmanager
def _offloading_paused(owner: Any, name: str) -> Iterator[None]:
    """Take a pipeline's offloading off, and put it on again over whatever transformer it then has.

    Offloading by groups is the transformer's own, and goes from one to the other.
    """
    if isinstance(owner, nn.Module):
        yield
        return
    outgoing = _transformer(owner, name)
    by_group = group_offloading._get_top_level_group_offload_hook(outgoing)
    by_model, sequential, _ = _func_optionally_disable_offloading(owner)
    if by_group is not None:
        for hook in GROUP_HOOKS:
            HookRegistry.check_if_exists_or_initialize(outgoing).remove_hook(hook, recurse=True)
    try:
        yield
    finally:
        device = getattr(owner, "_offload_device", None)
        if by_model:
            owner.enable_model_cpu_offload(device=device)
        elif sequential:
            owner.enable_sequential_cpu_offload(device=device)
        if by_group is not None:
            group_offloading._apply_group_offloading(_transformer(owner, name), by_group.config)
