"""Drop-in for diffusers' PiflowScheduler (Kandinsky 6): the substep loop as one weighted sum (docs/collapses.md)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PiflowScheduler
from diffusers.schedulers.scheduling_piflow import shift_timesteps
from torch import Tensor

from piflow_kernels.dx.coefficients import Coefficients, dx_coefficients
from piflow_kernels.dx.launch import dx_weighted_sum
from piflow_kernels.dx.torch_path import token_sums
from piflow_kernels.launch import on_device_of


class FusedPiflowScheduler(PiflowScheduler):
    """PiflowScheduler whose `step` is one pass over the network output, whatever the number of substeps.

    Made by `FusedPiflowScheduler.from_config(pipe.scheduler.config)`; configuration, schedule, step index rules and
    errors are those of the class that it replaces, results agree to 1e-5. Noise levels and substep counts come from
    float32 by the same operations in the same order (half-to-even rounding, repeated subtraction), coefficients from
    those in float64. All is prepared in `set_timesteps` on the CPU, so that `step` does not synchronise a GPU; what is
    changed afterwards by hand has no effect. Where gradients are asked for, `step` is PiflowScheduler's own.
    """

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """As PiflowScheduler's; also prepares each step's coefficients."""
        super().set_timesteps(*args, **kwargs)
        raw = self._piflow_raw_timesteps.cpu()
        ends = torch.cat([raw[1:], raw.new_full((1,), self.eps)])
        self._coefficients = [self._coefficients_of(*times) for times in zip(raw, ends, self.sigmas.cpu())]
        self._on_device: dict[tuple[int, torch.device], Tensor] = {}
        for step_index in range(len(self._coefficients)):
            self._weights_on(self.sigmas.device, step_index)

    def _coefficients_of(self, raw_src: Tensor, raw_dst: Tensor, sigma_src: Tensor) -> Coefficients:
        """Of one step, (1,) and (1, n_grid) float64, from 0-d float32 times."""
        shift = float(self.config.shift)
        length = raw_src - raw_dst
        n_substeps = int((length * self.num_policy_substeps).round().clamp(min=1))
        levels, raw_t = [sigma_src], raw_src
        for _ in range(n_substeps):
            raw_t = (raw_t - length / n_substeps).clamp(min=0)
            levels.append(shift_timesteps(raw_t, shift))
        sigmas = torch.stack(levels)[None].double()
        scalars = (sigma_src.double()[None], length.double()[None], torch.tensor([shift], dtype=torch.float64))
        return dx_coefficients(sigmas[:, :-1], sigmas.diff(dim=1), None, *scalars, self.n_grid, "grid", self.eps)

    def _step_index_for(self, timestep: Tensor | float) -> int:
        """As PiflowScheduler's. An element of `timesteps` says its index by where it lies; its value is not read."""
        if self.step_index is None and self.begin_index is None and isinstance(timestep, Tensor):
            own = self.timesteps
            if timestep.numel() == 1 and timestep.untyped_storage().data_ptr() == own.untyped_storage().data_ptr():
                self._step_index = timestep.storage_offset() - own.storage_offset()
        return super()._step_index_for(timestep)

    def _policy_step(self, model_output: Tensor, sample: Tensor, step_index: int) -> Tensor:
        if torch.is_grad_enabled() and (model_output.requires_grad or sample.requires_grad):
            return super()._policy_step(model_output, sample, step_index)  # differentiable, as one expects of it
        self._to_grid(model_output, sample)  # its checks
        n_channels = sample.shape[-1]
        state, output = sample.reshape(-1, n_channels), model_output.reshape(-1, self.n_grid * n_channels)
        if sample.device.type == "cpu":
            scalars = self._coefficients[step_index]
            kept, weights = float(scalars.start + scalars.src), scalars.grid[0].to(state.dtype)
            tokens = output.unflatten(-1, (self.n_grid, n_channels)).contiguous()
            return token_sums(tokens, weights, [(kept, state)], torch.empty_like(state)).reshape(sample.shape)
        grid = output.unflatten(-1, (self.n_grid, n_channels))[None].movedim((2, 3), (1, 2))
        x = state[None].movedim(-1, 1)
        with on_device_of(sample):
            result = dx_weighted_sum(x, x, grid, self._weights_on(sample.device, step_index), target=None)
        return result.movedim(1, -1).reshape(sample.shape)

    def _weights_on(self, device: torch.device, step_index: int) -> Tensor:
        """Of one step for the kernel: (1, n_grid + 2) float32, of x_start, x_src and the grid points."""
        key = step_index, device
        if key not in self._on_device:
            start, src, grid = self._coefficients[step_index]
            weights = torch.cat([start[:, None], src[:, None], grid], dim=1)
            self._on_device[key] = weights.to(device, torch.float32)
        return self._on_device[key]
