"""A student over a base model's tensors, with the output layers and the LoRA of an adapter's files."""

from __future__ import annotations

import difflib
import logging
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from piflow import models
from piflow.models.adapter_files import CONFIG, Adapter
from piflow.models.heads import base_of, cast_input
from piflow.models.sharing import (
    copy_attributes,
    graft,
    is_hooked,
    layer_at,
    layers_of,
    shape_of,
    twin,
    uncompiled,
    without_lora,
)

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

BY_THE_ADAPTER = ("out_channels", "out_visual_dim", "out_audio_dim", "_name_or_path", "_use_default_values")
"""Keys of a configuration in which a student may differ from its base."""


def build_student(base: nn.Module, adapter: Adapter, adapter_name: str, lora_dtype: torch.dtype | None = None) -> Any:
    """The adapter's student over the base's tensors. Changes nothing of the base; errors as `load_piflow_adapter`."""
    base = uncompiled(base)
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
