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

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import HookRegistry, group_offloading
from diffusers.hooks.layerwise_casting import _LAYERWISE_CASTING_HOOK, apply_layerwise_casting_hook
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from piflow.models.adapter_files import read_adapter
from piflow.models.adapter_student import build_student
from piflow.models.sharing import (
    layers_of,
    uncompiled,
)

log = logging.getLogger(__name__)

GROUP_HOOKS = (
    group_offloading._GROUP_OFFLOADING,
    group_offloading._LAYER_EXECUTION_TRACKER,
    group_offloading._LAZY_PREFETCH_GROUP_OFFLOADING,
)


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
    if any(uncompiled(used) is uncompiled(student) for student in leaving.values()):
        used = _switch(owner, target_module_name, family.base)
    for name in leaving:
        del uncompiled(family.students.pop(name)).piflow_family
    family.chosen = next(reversed(family.students), None)
    if not family.students:
        del uncompiled(family.base).piflow_family
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


def name_of(student: Any) -> str | None:
    """The name that a transformer was loaded under; None for one that is no student, or was not loaded."""
    family: Family | None = getattr(student, "piflow_family", None)
    students = {} if family is None else family.students
    return next((name for name, other in students.items() if uncompiled(other) is uncompiled(student)), None)


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


def _switch(owner: Any, name: str, incoming: Any) -> Any:
    outgoing = _transformer(owner, name)
    if uncompiled(outgoing) is uncompiled(incoming):
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
    of_the_base = uncompiled(incoming) is uncompiled(family.base)
    recast = {family.dtype: dtype} if of_the_base and None not in (family.dtype, dtype) else {}
    for module in incoming.modules():
        own = [t for t in module._parameters.values() if t is not None and id(t) not in shared]
        if own and not hasattr(module, "_hf_hook") and not any(t.is_meta for t in own):
            module.to(device=both[-1].device, dtype=recast.get(own[0].dtype))
    family.dtype = dtype
    _cast_by_layer(incoming, outgoing)


def _cast_by_layer(incoming: Any, outgoing: Any) -> None:
    """diffusers' layerwise casting changes the tensors of both in place, so that both need its hooks."""
    theirs = dict(layers_of(uncompiled(outgoing)))
    for path, layer in layers_of(uncompiled(incoming)):
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
