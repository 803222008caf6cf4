"""Schedulers. Those that are diffusers classes import diffusers when they are first touched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .flow_map import FlowMap, flow_map, flow_map_step

if TYPE_CHECKING:
    from .flow_map_sde import FlowMapSDEScheduler

__all__ = ["FlowMap", "FlowMapSDEScheduler", "flow_map", "flow_map_step"]


def __getattr__(name: str) -> Any:
    if name != "FlowMapSDEScheduler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .flow_map_sde import FlowMapSDEScheduler
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "diffusers":
            raise
        raise ImportError("FlowMapSDEScheduler needs diffusers: pip install 'piflow[diffusers]'") from error
    return FlowMapSDEScheduler
