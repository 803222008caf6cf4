"""Few-step sampling with a policy network, whatever the network (pi-Flow, arXiv 2510.14974, algorithm 2).

policy_fn = gm_policy_fn(student)                   # (x_src, sigma_src) -> means, logstds, logweights
images = sample(policy_fn, noise, nfe=4, schedule=NoiseSchedule(shift=3.2), temperature="auto")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from piflow.noise_schedule import NoiseSchedule, check_whole, segments
from piflow.policies import DXPolicy, GMFlowPolicy, Policy, resolve_temperature
from piflow.schedulers.flow_map import check_h, flow_map, flow_map_step


@dataclass(frozen=True)
class SampleStep:
    """One network evaluation: `index` of `nfe`, from raw time `raw_t_src` down to `raw_t_dst`, under `shift`."""

    index: int
    nfe: int
    raw_t_src: float
    raw_t_dst: float
    shift: float

    @property
    def segment_size(self) -> float:
        """Length of the step in raw time."""
        return self.raw_t_src - self.raw_t_dst

    @property
    def is_last(self) -> bool:
        """Whether no step follows."""
        return self.index == self.nfe - 1


PolicyFn = Callable[[Tensor, Tensor, SampleStep], Policy]
"""(x_src (B, C, *S), sigma_src (B,), step) -> policy: one network evaluation."""


def gm_policy_fn(network: Callable[[Tensor, Tensor], Any], **options: Any) -> PolicyFn:
    """Policies of a network (x_src, sigma_src (B,)) -> means, logstds, logweights (as attributes, keys or a 3-tuple).

    options: further arguments of GMFlowPolicy.
    """

    def policy_fn(x_src: Tensor, sigma_src: Tensor, step: SampleStep) -> Policy:
        return GMFlowPolicy(*_gm_output(network(x_src, sigma_src)), x_src, sigma_src, **options)

    return policy_fn


def _gm_output(output: Any) -> tuple[Tensor, Tensor, Tensor]:
    names = ("means", "logstds", "logweights")
    if isinstance(output, tuple):
        found = output
    elif isinstance(output, Mapping):
        found = tuple(output.get(name) for name in names)
    else:
        found = tuple(getattr(output, name, None) for name in names)
    if len(found) != 3 or not all(isinstance(value, Tensor) for value in found):
        types = ", ".join(type(value).__name__ for value in found)
        raise ValueError(
            "network: expected tensors means, logstds and logweights as attributes, keys or a 3-tuple, "
            f"got {type(output).__name__} with ({types})"
        )
    means, logstds, logweights = found
    return means, logstds, logweights


def dx_policy_fn(network: Callable[[Tensor, Tensor], Tensor], **options: Any) -> PolicyFn:
    """Policies of a network (x_src, sigma_src (B,)) -> grid (B, N_g, C, *S). options: further arguments of DXPolicy."""

    def policy_fn(x_src: Tensor, sigma_src: Tensor, step: SampleStep) -> Policy:
        grid = network(x_src, sigma_src)
        if not isinstance(grid, Tensor):
            raise ValueError(f"network: expected a tensor grid (B, N_g, C, *S), got {type(grid).__name__}")
        return DXPolicy(grid, x_src, sigma_src, step.segment_size, step.shift, **options)

    return policy_fn


def sample(
    policy_fn: PolicyFn,
    noise: Tensor,
    nfe: int,
    *,
    schedule: NoiseSchedule | None = None,
    total_substeps: int = 128,
    final_step_size_scale: float = 1.0,
    temperature: float | Literal["auto"] | None = None,
    h: float = 0.0,
    generator: torch.Generator | None = None,
    seq_len: int | None = None,
    callback: Callable[[SampleStep, Tensor], None] | None = None,
) -> Tensor:
    """Sample (B, C, *S) from `noise` (B, C, *S), one to three spatial axes, with `nfe` >= 1 network evaluations.

    policy_fn: calls the network and wraps its output, see `gm_policy_fn` and `dx_policy_fn`.
    total_substeps: policy substeps over the whole of raw time. final_step_size_scale: length of the last segment.
    temperature: of all steps but the last; "auto" is 0.1 (nfe - 1) within [0, 1].
    h: 0 follows the ODE; above, each step but the last goes further down and adds noise from `generator` back
    (`piflow.schedulers.flow_map`). callback(step, x) sees the state after each step.

    Raw times of a deterministic run are those of `segments`, exactly; FlowMapSDEScheduler's, which went through float32
    noise levels and back, may cost a substep more here and there.

    An empty batch comes back as it is: nothing is called. Raises a ValueError for settings outside their domain, noise
    that is not finite, and what is no policy or one of another shape.
    """
    schedule = NoiseSchedule() if schedule is None else schedule
    h = check_h(h)
    check_whole("total_substeps", total_substeps, least=1)
    steps, sigmas, kept = _plan(nfe, final_step_size_scale, schedule, seq_len, h)
    temperature = resolve_temperature(temperature, nfe)
    x = _check_noise(noise)
    if len(x) == 0:
        return x
    for step in steps:
        x = _step(policy_fn, x, sigmas[step.index], step, schedule, total_substeps, temperature, seq_len)
        if h > 0 and not step.is_last:
            device = x.device if generator is None else generator.device
            fresh = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
            x = flow_map_step(x, sigmas[step.index + 1], kept[step.index], fresh)
        if callback is not None:
            callback(step, x)
    return x


@torch.no_grad()
def _step(
    policy_fn: PolicyFn,
    x: Tensor,
    sigma: Tensor,
    step: SampleStep,
    schedule: NoiseSchedule,
    total_substeps: int,
    temperature: float | None,
    seq_len: int | None,
) -> Tensor:
    """The state at the step's destination: one network evaluation and the rollout of its policy."""
    policy = policy_fn(x, sigma.to(x).expand(x.shape[0]), step)
    if not isinstance(policy, Policy):
        raise ValueError(f"policy_fn: expected a Policy, such as GMFlowPolicy or DXPolicy, got {type(policy).__name__}")
    if policy.x_src.shape != x.shape:
        raise ValueError(
            f"policy_fn: expected a policy for states {tuple(x.shape)}, got one for {tuple(policy.x_src.shape)}"
        )
    if not step.is_last:
        policy = policy.with_temperature(temperature)
    raw_t_src, raw_t_dst = (torch.full(x.shape[:1], raw_t) for raw_t in (step.raw_t_src, step.raw_t_dst))
    return policy.integrate(x, raw_t_src, raw_t_dst, schedule, total_substeps, seq_len)


def _plan(
    nfe: int, final_step_size_scale: float, schedule: NoiseSchedule, seq_len: int | None, h: float
) -> tuple[list[SampleStep], Tensor, Tensor]:
    """The steps, their noise levels (nfe + 1,) and the share of noise that each keeps (nfe,)."""
    raw_t = [start for start, _ in segments(nfe, final_step_size_scale)] + [0.0]
    levels = flow_map(schedule.sigma(torch.tensor(raw_t[:-1]), seq_len), h)
    raw_t_dst = raw_t[1:] if h == 0 else schedule.raw_t(levels.sigmas_dst, seq_len).tolist()
    shift = schedule.shift_for(seq_len)
    steps = [SampleStep(i, nfe, raw_t[i], raw_t_dst[i], shift) for i in range(nfe)]
    return steps, levels.sigmas, levels.kept


def _check_noise(noise: Tensor) -> Tensor:
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        raise ValueError(
            f"noise: expected a floating-point tensor (B, C, *S), got {getattr(noise, 'dtype', type(noise))}"
        )
    if not 3 <= noise.dim() <= 5:
        raise ValueError(f"noise: expected (B, C, *S) with one to three spatial axes, got shape {tuple(noise.shape)}")
    if not bool(noise.isfinite().all()):
        raise ValueError("noise: expected finite numbers, found NaN or infinity")
    return noise if noise.dtype == torch.float64 else noise.float()
