"""Policies: the output of one network evaluation seen as a velocity field over the rest of the segment."""

from .base import Policy, auto_temperature, resolve_temperature
from .dx import DXPolicy
from .gmflow import GMFlowPolicy

__all__ = ["DXPolicy", "GMFlowPolicy", "Policy", "auto_temperature", "resolve_temperature"]
