"""Where training looks: random raw times for flow matching, random segments for pi-ID (arXiv 2510.14974, section 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from piflow.noise_schedule import NoiseSchedule, segment_sizes


class SegmentConfig(Protocol):
    """What `sample_source_times` reads of a configuration, such as `ImitationConfig`."""

    @property
    def nfe(self) -> int:
        """Number of segments."""

    @property
    def final_step_size_scale(self) -> float:
        """Length of the last segment in units of the others."""


class SourceTimes(NamedTuple):
    """Where each sample's segment starts and how long it is, (B,) each: raw time, noise level, length in raw time."""

    raw_t: Tensor
    sigma: Tensor
    segment_size: Tensor


def _draw(
    batch_size: int | None,
    draw: Tensor | None,
    generator: torch.Generator | None,
    random: Callable[..., Tensor],
) -> Tensor:
    if draw is not None:
        return draw
    if batch_size is None or batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1 sample, or a recorded draw, got {batch_size}")
    return random(batch_size, generator=generator, device=None if generator is None else generator.device)


def sample_raw_times(
    batch_size: int | None = None,
    *,
    raw_t_range: tuple[float, float] = (0.0, 1.0),
    logit_normal: tuple[float, float] | None = None,
    draw: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Raw times (B,): uniform within `raw_t_range`, or sigmoid(mean + std z) with `logit_normal` = (mean, std).

    `draw` (B,) replaces the random numbers: uniform in [0, 1), standard normal for `logit_normal`. A draw of 0 is the
    upper end of the range, so that raw time 0, where no velocity is defined, is never drawn.
    """
    if logit_normal is not None:
        if raw_t_range != (0.0, 1.0):
            raise ValueError(f"raw_t_range: a logit-normal time covers (0, 1), expected no range, got {raw_t_range}")
        mean, std = logit_normal
        return torch.sigmoid(mean + std * _draw(batch_size, draw, generator, torch.randn))
    low, high = raw_t_range
    return _draw(batch_size, draw, generator, torch.rand) * (low - high) + high


def sample_source_times(
    batch_size: int | Tensor,
    config: SegmentConfig,
    schedule: NoiseSchedule,
    seq_len: int | None = None,
    generator: torch.Generator | None = None,
) -> SourceTimes:
    """One of the `config.nfe` segments per sample, with a probability proportional to its length.

    `batch_size` is the number of samples, or a recorded uniform draw (B,). A draw picks raw time 1 - draw and with it
    the segment that contains it; a time on a boundary belongs to the segment that starts there.
    """
    draw = batch_size if isinstance(batch_size, Tensor) else _draw(batch_size, None, generator, torch.rand)
    base, final = segment_sizes(config.nfe, config.final_step_size_scale)
    missing = 1 - final / base
    from_end = ((1 - draw) / base + missing).ceil().clamp(1, config.nfe)
    raw_t = ((from_end - missing) * base).clamp(max=1)
    segment_size = torch.where(from_end == 1, final, base).to(raw_t.dtype)
    return SourceTimes(raw_t, schedule.sigma(raw_t, seq_len), segment_size)
