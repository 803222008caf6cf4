"""Module trees that share their tensors: a student beside its base, at the price of the student's own layers only."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from accelerate.hooks import add_hook_to_module
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

Module = TypeVar("Module", bound=nn.Module)

PLACED_BY_OTHERS = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook", "_compiled_call_impl")
"""Attributes with which accelerate, diffusers and torch.compile wrap one module object; they name that object."""


def twin(module: Module, seen: dict[int, Any] | None = None) -> Module:
    """The module tree anew, on the same parameters and buffers.

    A twin has the very dictionaries that hold a module's parameters and buffers: whatever moves, offloads or loads one
    of the two moves, offloads or loads both. Its children are its own: what replaces or wraps a layer of one tree, as
    LoRA does, does not show in the other. `seen` keeps a module that occurs twice in the tree one module.
    """
    seen = {} if seen is None else seen
    if id(module) in seen:
        return seen[id(module)]
    new = seen[id(module)] = module.__class__.__new__(module.__class__)
    shared = ("_parameters", "_buffers")
    for name, value in vars(module).items():
        if name not in PLACED_BY_OTHERS:
            own = name not in shared and isinstance(value, (dict, list, set))
            new.__dict__[name] = copy.copy(value) if own else value
    for name, child in module._modules.items():
        new._modules[name] = None if child is None else twin(child, seen)
    if (hook := getattr(module, "_hf_hook", None)) is not None:  # of a device map
        add_hook_to_module(new, copy.copy(hook))
    return new


def graft(tree: nn.Module, base: nn.Module, own: set[str], prefix: str = "") -> None:
    """Fill `tree`, which may be without tensors, from `base` but for its `own` parameters, given by their full names.

    Modules of the base come in as twins. A module stays the tree's where it holds own parameters or a hook, as output
    layers do, or has no parameters where the base's has; what lies below or beside these comes from the base.
    """
    base = without_lora(base)
    for name in tree._parameters:
        if prefix + name not in own:
            tree._parameters[name] = base._parameters.get(name)
    tree._buffers.update({name: value for name, value in base._buffers.items() if name in tree._buffers})
    for name, child in list(tree.named_children()):
        path, source = prefix + name, base._modules.get(name)
        if source is None:
            continue
        holds_own = any(parameter.startswith(f"{path}.") for parameter in own)
        emptied = next(child.parameters(), None) is None and next(source.parameters(), None) is not None
        if holds_own or emptied or any(is_hooked(module) for module in child.modules()):
            graft(child, source, own, f"{path}.")
        else:
            tree._modules[name] = twin(source)


def is_hooked(module: nn.Module) -> bool:
    """Whether a student's class has put a hook on this module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def without_lora(module: nn.Module) -> nn.Module:
    """The layer itself, below what peft wrapped around it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def layers_of(tree: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its dotted path, seen through LoRA layers."""
    pending = [("", tree)]
    while pending:
        path, module = pending.pop()
        module = without_lora(module)
        yield path, module
        below = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
        pending += reversed(below)


def layer_at(tree: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, seen through LoRA layers; None where there is none."""
    module: nn.Module | None = tree
    for name in filter(None, path.split(".")):
        module = None if module is None else without_lora(module)._modules.get(name)
    return None if module is None else without_lora(module)


def shape_of(module: nn.Module, parameter: str) -> tuple[int, ...] | None:
    """The shape of a layer's parameter, as it would be if the layer were not quantised; None where it has none."""
    value = module._parameters.get(parameter)
    if value is not None and parameter == "weight" and isinstance(module, nn.Linear):
        return module.out_features, module.in_features  # packed weights have another shape
    return None if value is None else tuple(value.shape)


def copy_attributes(new: Any, old: Any, names: tuple[str, ...]) -> None:
    """Set those attributes on `new` which `old` has on itself."""
    for name in names:
        if name in vars(old):
            setattr(new, name, copy.copy(vars(old)[name]))


def uncompiled(transformer: Any) -> Any:
    return getattr(transformer, "_orig_mod", transformer)
