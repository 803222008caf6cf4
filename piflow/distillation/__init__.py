"""Imitation distillation (pi-ID) as pure functions of tensors: no networks, no engine, no device of their own."""

from .flow_matching import FlowMatchingResult, flow_matching_loss
from .guidance import VelocityFn, guidance_bias, guided_teacher, guided_velocity, velocity_from_x_0
from .imitation import (
    ImitationConfig,
    ImitationResult,
    SegmentDraws,
    imitation_segment,
    imitation_trajectory,
    teacher_ratio_at,
)
from .times import SourceTimes, sample_raw_times, sample_source_times
from .trajectory import MixedTrajectory, mix_trajectory

__all__ = [
    "FlowMatchingResult",
    "ImitationConfig",
    "ImitationResult",
    "MixedTrajectory",
    "SegmentDraws",
    "SourceTimes",
    "VelocityFn",
    "flow_matching_loss",
    "guidance_bias",
    "guided_teacher",
    "guided_velocity",
    "imitation_segment",
    "imitation_trajectory",
    "mix_trajectory",
    "sample_raw_times",
    "sample_source_times",
    "teacher_ratio_at",
    "velocity_from_x_0",
]
