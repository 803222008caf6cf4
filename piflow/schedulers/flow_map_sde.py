"""FlowMapSDEScheduler: few-step flow-map sampling as a diffusers scheduler. Imports diffusers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from piflow.noise_schedule import NoiseSchedule, segment_sizes

from .flow_map import FlowMap, check_h, flow_map, flow_map_step


@dataclass
class FlowMapSDESchedulerOutput(BaseOutput):
    """prev_sample (B, C, *S): the state at the next noise level."""

    prev_sample: Tensor


class FlowMapSDEScheduler(SchedulerMixin, ConfigMixin):
    """Scheduler of networks that map a state at `timesteps[i]` to one at `timesteps_dst[i]` (see `flow_map`).

    Configuration and results agree with the paper's scheduler of the same name, with three differences: no noise is
    drawn where none is used (h = 0, and the last step, so a generator advances by one draw less); sigmas never exceed
    1, so that no shift turns h < 1 into NaN; `h` may be the string "inf", since JSON has no infinity.

    num_train_timesteps: timestep = sigma num_train_timesteps. shift ... dynamic_shifting_type: `NoiseSchedule`.
    max_raw_t, min_raw_t: the raw times that the segments span (the last step ends at sigma 0 nevertheless).
    final_step_size_scale: length of the last segment in units of the others. h: stochasticity, 0 is deterministic.
    use_fp64: draw noise and take steps in float64 (results keep the dtype of the model output).
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_seq_len: int = 256,
        max_seq_len: int = 4096,
        base_logshift: float = 0.5,
        max_logshift: float = 1.15,
        dynamic_shifting_type: str = "exp",
        max_raw_t: float = 1.0,
        min_raw_t: float = 0.0,
        final_step_size_scale: float = 1.0,
        h: float | str = 0.0,
        use_fp64: bool = False,
    ) -> None:
        if not 0 <= min_raw_t < max_raw_t <= 1:
            raise ValueError(f"min_raw_t, max_raw_t: expected 0 <= min < max <= 1, got {min_raw_t} and {max_raw_t}")
        self.h = check_h(h)
        if self.h == math.inf:
            self.register_to_config(h="inf")
        self.noise_schedule = NoiseSchedule(
            shift,
            use_dynamic_shifting,
            base_seq_len,
            max_seq_len,
            base_logshift,
            max_logshift,
            dynamic_shifting_type,  # type: ignore[arg-type]
        )
        segment_sizes(1, final_step_size_scale)
        # Before set_timesteps a scheduler stands for its training levels, as in diffusers' own.
        raw_t = torch.linspace(1, 1 / num_train_timesteps, num_train_timesteps)
        self.sigmas = self.noise_schedule.sigma(raw_t).clamp(max=1)
        self.timesteps = self.sigmas * num_train_timesteps
        self.num_inference_steps: int | None = None
        self.seq_len: int | None = None
        self._map: FlowMap | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    @property
    def step_index(self) -> int | None:
        """Index of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, as set by `set_begin_index`."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Index of the first step, for pipelines that start part of the way down."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | Tensor | None = None,
        seq_len: int | None = None,
    ) -> None:
        """Prepare `num_inference_steps` segments at `seq_len` tokens, or those that start at `sigmas` before the shift.

        Sets `timesteps`, `timesteps_dst` (nfe,) on `device`, `sigmas` (nfe + 1,) and `m_vals` (nfe,) on the CPU.
        """
        config = self.config
        if sigmas is not None:
            raw_t = torch.as_tensor(sigmas, dtype=torch.float32)
            if raw_t.dim() != 1 or len(raw_t) != (num_inference_steps or len(raw_t)) or len(raw_t) == 0:
                raise ValueError(
                    f"sigmas: expected one level per step, {num_inference_steps}, got shape {tuple(raw_t.shape)}"
                )
            if not ((raw_t > 0) & (raw_t <= 1)).all() or not (raw_t.diff() < 0).all():
                raise ValueError(f"sigmas: expected falling levels above 0 and at most 1, got {raw_t.tolist()}")
        elif num_inference_steps is None:
            raise ValueError("set_timesteps: give num_inference_steps, the number of network evaluations, or sigmas")
        else:
            base, _ = segment_sizes(num_inference_steps, config.final_step_size_scale)
            base *= config.max_raw_t - config.min_raw_t
            raw_t = torch.tensor([config.max_raw_t - i * base for i in range(num_inference_steps)], dtype=torch.float32)
        self.seq_len = seq_len
        self.num_inference_steps = len(raw_t)
        self._map = flow_map(self.noise_schedule.sigma(raw_t, seq_len), self.h)
        self.sigmas, self.m_vals = self._map.sigmas, self._map.kept
        self.timesteps = (self.sigmas[:-1] * config.num_train_timesteps).to(device)
        self.timesteps_dst = (self._map.sigmas_dst * config.num_train_timesteps).to(device)
        self._step_index = None
        self._begin_index = None

    def raw_t(self, timestep: Tensor) -> Tensor:
        """Raw time of timesteps: policies start at `raw_t(timesteps)` and end at `raw_t(timesteps_dst)`."""
        return self.noise_schedule.raw_t(timestep / self.config.num_train_timesteps, self.seq_len)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The sample itself: flow models take it as it is."""
        return sample

    def index_for_timestep(self, timestep: Tensor | float) -> int:
        """Index of the first step at `timestep`. Reads its value."""
        found = (self.timesteps == timestep).nonzero()
        if len(found) == 0:
            raise ValueError(
                f"timestep: {float(timestep)} is none of the scheduler's timesteps {self.timesteps.tolist()}"
            )
        return int(found[0])

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FlowMapSDESchedulerOutput | tuple[Tensor]:
        """From the state at `timesteps_dst[i]`, `model_output` (B, C, *S), to the state at the next noise level.

        sample: the state at `timestep` that the model output came from, by diffusers' convention; only its shape is
        checked. generator: one, or one per sample, for h > 0.
        """
        if self._map is None:
            raise ValueError("step: call set_timesteps first")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output: expected the state at timesteps_dst, of shape {tuple(sample.shape)} as sample, "
                f"got {tuple(model_output.shape)}"
            )
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        index = self._step_index
        if index >= len(self.timesteps):
            raise ValueError(f"step: all {len(self.timesteps)} steps are taken, call set_timesteps to start again")
        prev_sample = model_output
        if self.h > 0 and index < len(self.timesteps) - 1:
            dtype = torch.float64 if self.config.use_fp64 else torch.float32
            noise = randn_tensor(model_output.shape, generator=generator, device=model_output.device, dtype=dtype)
            sigma_next, kept = self.sigmas[index + 1].to(dtype), self.m_vals[index].to(dtype)
            prev_sample = flow_map_step(model_output.to(dtype), sigma_next, kept, noise).to(model_output.dtype)
        self._step_index = index + 1
        return FlowMapSDESchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)
