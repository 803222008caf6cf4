"""The mixed student-teacher trajectory of a segment, in raw time (pi-Flow, arXiv 2510.14974, section 5)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .guidance import check_shape


class MixedTrajectory(NamedTuple):
    """Raw times of the m intermediate states, all (m, B) but for `window` and `raw_t_dst`, (B,).

    The student's policy is followed down to `raw_t_a`, the teacher's velocity from there to `raw_t_b`. The policy is
    compared with the teacher through its mean velocity from `raw_t_a` to `raw_t_end` = raw_t_b - window.
    """

    raw_t_a: Tensor
    raw_t_b: Tensor
    raw_t_end: Tensor
    window: Tensor
    raw_t_dst: Tensor
    student_intervals: Tensor
    teacher_intervals: Tensor


def mix_trajectory(
    raw_t_src: Tensor,
    segment_size: Tensor,
    student_draw: Tensor,
    teacher_draw: Tensor,
    *,
    teacher_ratio: float,
    window_substeps: int,
    total_substeps: int,
) -> MixedTrajectory:
    """Split each segment into m student intervals (1 - rho of its length) and m teacher intervals (rho of it).

    raw_t_src, segment_size: (B,). student_draw: (B, m) and teacher_draw: (B, m - 1), uniform in [0, 1). The window is
    `window_substeps` substeps of the segment's own substep length, at most the segment, and is kept free at its end.
    """
    if not 0 <= teacher_ratio <= 1:
        raise ValueError(f"teacher_ratio: expected a share within [0, 1], got {teacher_ratio}")
    batch, states = len(raw_t_src), student_draw.shape[-1]
    check_shape("student_draw", student_draw, (batch, states))
    check_shape("teacher_draw", teacher_draw, (batch, states - 1))
    substep = segment_size / (segment_size * total_substeps).round().clamp(min=1)
    window = (window_substeps * substep).minimum(segment_size)
    free = segment_size - window

    zero, one = torch.zeros_like(student_draw[:, :1]), torch.ones_like(student_draw[:, :1])
    stops = student_draw.sort(dim=1).values * ((1 - teacher_ratio) * free)[:, None]
    student_intervals = torch.cat([zero, stops], dim=1).diff(dim=1).T
    cuts = teacher_draw.sort(dim=1).values
    teacher_intervals = (torch.cat([zero, cuts, one], dim=1).diff(dim=1) * (teacher_ratio * free)[:, None]).T

    raw_t_a, raw_t_b = [], []
    raw_t = raw_t_src
    for student, teacher in zip(student_intervals, teacher_intervals):
        raw_t_a.append(raw_t - student)
        raw_t = raw_t_a[-1] - teacher
        raw_t_b.append(raw_t)
    ends = torch.stack(raw_t_b)
    return MixedTrajectory(
        raw_t_a=torch.stack(raw_t_a),
        raw_t_b=ends,
        raw_t_end=ends - window,
        window=window,
        raw_t_dst=(raw_t_src - segment_size).clamp(min=0),
        student_intervals=student_intervals,
        teacher_intervals=teacher_intervals,
    )
