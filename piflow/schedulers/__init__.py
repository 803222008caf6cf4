"""Schedulers. Those that are diffusers classes import diffusers when they are first touched."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .flow_map import FlowMap, flow_map, flow_map_step

if TYPE_CHECKING:
    from .flow_map_sde import FlowMapSDEScheduler
    from .fused_piflow import FusedPiflowScheduler

__all__ = ["FlowMap", "FlowMapSDEScheduler", "FusedPiflowScheduler", "flow_map", "flow_map_step"]

_NEED_DIFFUSERS = {"FlowMapSDEScheduler": ".flow_map_sde", "FusedPiflowScheduler": ".fused_piflow"}


def __getattr__(name: str) -> Any:
    if name not in _NEED_DIFFUSERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_NEED_DIFFUSERS[name], __name__), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "diffusers":
            raise
        raise ImportError(f"{name} needs diffusers: pip install 'piflow[diffusers]'") from error
