"""Fused operators of pi-Flow policies: import them into a sampler, server or trainer. Needs torch alone to import."""

from .compilation import warmup
from .dx.op import dx_mean_velocity, dx_mean_velocity_loss, dx_rollout, dx_velocity
from .gm.op import gm_mean_velocity, gm_mean_velocity_loss, gm_rollout, gm_velocity

__all__ = [
    "dx_mean_velocity",
    "dx_mean_velocity_loss",
    "dx_rollout",
    "dx_velocity",
    "gm_mean_velocity",
    "gm_mean_velocity_loss",
    "gm_rollout",
    "gm_velocity",
    "warmup",
]
