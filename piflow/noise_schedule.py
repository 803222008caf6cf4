"""Raw time, noise level and the substeps between them (pi-Flow, arXiv 2510.14974, section 5 and appendix).

Raw time r runs from 1 (noise) to 0 (data) and is where segments and substeps are uniform; the noise level is

    sigma = shift r / (1 + (shift - 1) r),     r = sigma / (shift + (1 - shift) sigma)

Raw times belong on the CPU: they decide how many substeps there are, hence tensor shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, TypeVar

import torch
from torch import Tensor

Time = TypeVar("Time", float, Tensor)

MIN_FINAL_STEP_SIZE_SCALE = 1e-4
"""A final segment of length 0 would leave its network evaluation nothing to do: shorter scales are raised to this."""


@dataclass(frozen=True)
class NoiseSchedule:
    """Timestep shift, fixed or (with `use_dynamic_shifting`) grown with the sequence length.

    Dynamic shifting interpolates between `base_logshift` at `base_seq_len` tokens and `max_logshift` at `max_seq_len`,
    and extrapolates beyond: "exp" is linear in the log-shift (FLUX), "sqrt" makes the shift itself linear in the square
    root of the length. Without a `seq_len` the fixed `shift` holds.
    """

    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_seq_len: int = 256
    max_seq_len: int = 4096
    base_logshift: float = 0.5
    max_logshift: float = 1.15
    dynamic_shifting_type: Literal["exp", "sqrt"] = "exp"

    def __post_init__(self) -> None:
        check_number("shift", self.shift, positive=True)
        if self.dynamic_shifting_type not in ("exp", "sqrt"):
            raise ValueError(f"dynamic_shifting_type: expected 'exp' or 'sqrt', got {self.dynamic_shifting_type!r}")
        if self.use_dynamic_shifting and not 0 < self.base_seq_len < self.max_seq_len:
            raise ValueError(
                f"base_seq_len, max_seq_len: expected 0 < base < max, got {self.base_seq_len} and {self.max_seq_len}"
            )
        if self.use_dynamic_shifting and not (math.isfinite(self.base_logshift) and math.isfinite(self.max_logshift)):
            raise ValueError(
                "base_logshift, max_logshift: expected finite numbers, "
                f"got {self.base_logshift} and {self.max_logshift}"
            )

    def shift_for(self, seq_len: int | None = None) -> float:
        """The shift at `seq_len` tokens. Raises a ValueError where extrapolation leaves the positive finite numbers."""
        if not self.use_dynamic_shifting or seq_len is None:
            return self.shift
        if seq_len < 1:
            raise ValueError(f"seq_len: expected a positive number of tokens, got {seq_len}")
        try:
            shift = self._dynamic_shift(seq_len)
        except OverflowError:  # of math.exp
            shift = math.inf
        if not (math.isfinite(shift) and shift > 0):
            raise ValueError(
                "seq_len: expected a length whose shift is positive and finite, but base_logshift "
                f"{self.base_logshift} and max_logshift {self.max_logshift} make it {shift} at {seq_len} tokens"
            )
        return shift

    def _dynamic_shift(self, seq_len: int) -> float:
        if self.dynamic_shifting_type == "exp":
            slope = (self.max_logshift - self.base_logshift) / (self.max_seq_len - self.base_seq_len)
            return math.exp((seq_len - self.base_seq_len) * slope + self.base_logshift)
        low, high = math.exp(self.base_logshift), math.exp(self.max_logshift)
        root, base, top = math.sqrt(seq_len), math.sqrt(self.base_seq_len), math.sqrt(self.max_seq_len)
        return (root - base) / (top - base) * (high - low) + low

    def sigma(self, raw_t: Time, seq_len: int | None = None) -> Time:
        """Noise level at raw time `raw_t`, in its dtype and shape."""
        shift = self.shift_for(seq_len)
        return shift * raw_t / (1 + (shift - 1) * raw_t)

    def raw_t(self, sigma: Time, seq_len: int | None = None) -> Time:
        """Raw time of the noise level `sigma`, in its dtype and shape; the inverse of `sigma()`."""
        shift = self.shift_for(seq_len)
        return sigma / (shift + (1 - shift) * sigma)

    def substep_sigmas(
        self,
        raw_t_start: Tensor,
        raw_t_end: Tensor,
        total_substeps: int,
        seq_len: int | None = None,
        max_substeps: int | None = None,
    ) -> Tensor:
        """Noise levels that an Euler solver visits between two raw times: (B,), (B,) -> (B, N + 1).

        Sample i takes n_i = max(ceil((start_i - end_i) total_substeps), 1) steps, uniform in raw time, raw time clamped
        at 0; N = max n_i, and a sample with fewer steps repeats its last level. Raw times are reached by repeated
        subtraction in the dtype of `raw_t_start`, as the paper's code does, so that float32 levels agree bit by bit.

        `max_substeps` fixes N beforehand, an upper bound of all n_i: raw times on a GPU need no synchronisation then.
        """
        check_whole("total_substeps", total_substeps, least=1)
        if raw_t_start.dim() != 1 or raw_t_end.shape != raw_t_start.shape:
            raise ValueError(
                "raw_t_start, raw_t_end: expected one value per sample, shape (B,) each, "
                f"got {tuple(raw_t_start.shape)} and {tuple(raw_t_end.shape)}"
            )
        length = raw_t_start - raw_t_end
        counts = (length * total_substeps).ceil().clamp(min=1)
        substep = length / counts
        levels = [raw_t_start]
        if max_substeps is None:
            max_substeps = int(counts.max()) if len(counts) else 1
        for _ in range(max_substeps):
            levels.append(levels[-1] - substep)
        visited = torch.arange(len(levels), device=counts.device).minimum(counts.long()[:, None])
        raw_t = torch.stack(levels, dim=1).gather(1, visited).clamp(min=0)
        return self.sigma(raw_t, seq_len)


def segments(nfe: int, final_step_size_scale: float = 1.0) -> list[tuple[float, float]]:
    """(raw_t_src, segment_size) of each of the `nfe` network evaluations, first raw_t_src = 1, sizes summing to 1.

    All segments are base = 1 / (nfe - 1 + f) long except the last, f base, with f = `final_step_size_scale`.
    """
    base, final = segment_sizes(nfe, final_step_size_scale)
    return [(1 - step * base, final if step == nfe - 1 else base) for step in range(nfe)]


def segment_sizes(nfe: int, final_step_size_scale: float = 1.0) -> tuple[float, float]:
    """Length of all segments but the last, and of the last."""
    check_whole("nfe", nfe, least=1)
    check_number("final_step_size_scale", final_step_size_scale)
    scale = max(final_step_size_scale, MIN_FINAL_STEP_SIZE_SCALE)
    base = 1 / (nfe - 1 + scale)
    return base, base * scale


def check_whole(name: str, value: object, least: int) -> None:
    """Raise a ValueError that names the argument unless `value` is a whole number, at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise ValueError(f"{name}: expected a whole number, at least {least}, got {value!r}")


def check_number(name: str, value: object, positive: bool = False) -> None:
    """Raise a ValueError that names the argument unless `value` is finite and at least 0, or above 0 if `positive`."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        expected = "a positive finite number" if positive else "a finite number, at least 0"
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
