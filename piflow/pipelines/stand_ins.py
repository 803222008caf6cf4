"""The pi-Flow loop inside diffusers' own pipelines (arXiv 2510.14974, algorithm 2).

A diffusers pipeline asks its transformer for a velocity and its scheduler for the next state. For the length of a call
both have stand-ins. The transformer's answers with the mean velocity of its policy over the step,

    u = (x_src - x_dst) / (sigma_src - sigma_dst),      x_dst: the policy rolled out from x_src to sigma_dst,

and the scheduler's goes back to x_dst and leaves the rest to `FlowMapSDEScheduler`, with the caller's generator. All
else, from the prompt to the image, is diffusers' own code.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Generator, Tensor, nn

from piflow.models.heads import DXOutput
from piflow.policies import DXPolicy, GMFlowPolicy, Policy
from piflow.schedulers import FlowMapSDEScheduler

SAVED_POLICY = "_policy_config"
"""Where a saved pipeline keeps it in the student's config.json: diffusers passes private keys on without a warning."""


def is_student(transformer: nn.Module) -> bool:
    """Whether a transformer, compiled or not, predicts policies: all students can be made `from_teacher`."""
    return hasattr(getattr(transformer, "_orig_mod", transformer), "from_teacher")


def policy_config_of(student: Any) -> dict[str, Any]:
    """What the student's adapter, or the pipeline's folder, says of its policy; empty for a student without either."""
    return getattr(student, "policy_config", None) or student.config.get(SAVED_POLICY) or {}


class PolicyScheduler:
    """A FlowMapSDEScheduler as diffusers' flow pipelines call theirs, fed with mean velocities.

    seq_len: number of image tokens, which a dynamic shift depends on; the pipeline sets it before `set_timesteps`.
    sigmas: the caller's own levels before the shift. generator: makes the noise of h > 0.
    """

    order = 1

    def __init__(
        self,
        scheduler: FlowMapSDEScheduler,
        generator: Generator | list[Generator] | None = None,
        sigmas: list[float] | None = None,
    ) -> None:
        self.scheduler, self.generator, self.own_sigmas = scheduler, generator, sigmas
        self.seq_len: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "scheduler"), name)  # a copy under way has none, and must say so

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """One step for each of diffusers' `sigmas`, at the scheduler's own levels: its shift stands in for `mu`."""
        nfe = num_inference_steps if sigmas is None else len(sigmas)
        if self.own_sigmas is None:
            self.scheduler.set_timesteps(nfe, device=device, seq_len=self.seq_len)
        else:
            self.scheduler.set_timesteps(sigmas=self.own_sigmas, device=device, seq_len=self.seq_len)
        # On the CPU once and for all, since they decide how many substeps there are.
        src, dst = self.scheduler.timesteps.cpu(), self.scheduler.timesteps_dst.cpu()
        self.raw_t_src, self.raw_t_dst = self.scheduler.raw_t(src), self.scheduler.raw_t(dst)
        self.sigmas_src = self.scheduler.sigmas[:-1].cpu()
        self.sigmas_dst = dst / self.scheduler.config.num_train_timesteps

    @property
    def index(self) -> int:
        """Index of the step that is under way."""
        step = self.scheduler.step_index
        return (self.scheduler.begin_index or 0) if step is None else step

    @property
    def is_last(self) -> bool:
        """Whether no step follows the one under way."""
        return self.index == len(self.raw_t_src) - 1

    @property
    def span(self) -> float:
        """sigma_src - sigma_dst of the step under way."""
        return float(self.sigmas_src[self.index] - self.sigmas_dst[self.index])

    @property
    def segment_size(self) -> float:
        """Raw time from this step to the next; with h > 0, less than the way to the destination."""
        following = 0.0 if self.is_last else self.raw_t_src[self.index + 1]
        return float(self.raw_t_src[self.index] - following)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """(1 - sigma) sample + sigma noise in float32, at `timestep` (B,) or (1,)."""
        sigma = (timestep.float() / self.scheduler.config.num_train_timesteps).to(sample.device)
        sigma = sigma.view(-1, *[1] * (sample.dim() - 1))
        return (1 - sigma) * sample + sigma * noise.to(sample.device)

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """The next state in float32, from the mean velocity over the step and the state that it starts at."""
        x_dst = sample.float() - self.span * model_output
        return self.scheduler.step(x_dst, timestep, x_dst, generator=self.generator, return_dict=return_dict)


class PolicyTransformer:
    """A student as diffusers' pipelines call a transformer: it answers with the mean velocity of its policy.

    The network computes in the dtype of its text embeddings (without any: in its own), states stay in float32.
    """

    dtype = torch.float32

    def __init__(self, student: Any, steps: PolicyScheduler, total_substeps: int, temperature: float | None) -> None:
        self.student, self.steps = student, steps
        self.total_substeps, self.temperature = total_substeps, temperature
        self.config = FrozenDict({"guidance_embeds": False, **student.config})

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "student"), name)

    def __call__(self, hidden_states: Tensor, return_dict: bool = False, **kwargs: Any) -> tuple[Tensor]:
        """(mean velocity,) of the step under way. Packed reference tokens behind the image's are left out of it."""
        text = kwargs.get("encoder_hidden_states")
        dtype = self.student.dtype if text is None else text.dtype
        output = self.student(hidden_states=hidden_states.to(dtype), **kwargs)
        packed = hidden_states.dim() == 3
        x_src = (hidden_states[:, : self.steps.seq_len] if packed else hidden_states).float()
        x_dst = self._destination(self._policy(output, x_src, packed), x_src)
        return ((x_src - x_dst) / self.steps.span,)

    def _policy(self, output: Any, x_src: Tensor, packed: bool) -> Policy:
        steps, asked = self.steps, policy_config_of(self.student)
        sigma_src = steps.sigmas_src[steps.index].to(x_src).expand(len(x_src))
        tokens = slice(x_src.shape[1]) if packed else slice(None)
        options: dict[str, Any] = {"layout": "packed" if packed else "spatial"}
        if "eps" in asked:
            options["eps"] = asked["eps"]
        if isinstance(output, DXOutput):
            segment_size = asked.get("segment_size") or steps.segment_size
            shift = asked.get("shift") or self.config.get("shift") or steps.noise_schedule.shift_for(steps.seq_len)
            mode = asked.get("mode") or self.config.get("policy", "grid")
            return DXPolicy(output.grid[:, tokens], x_src, sigma_src, segment_size, shift, mode=mode, **options)
        means, logstds, logweights = output
        policy = GMFlowPolicy(means[:, tokens], logstds, logweights[:, tokens], x_src, sigma_src, **options)
        return policy if steps.is_last else policy.with_temperature(self.temperature)

    def _destination(self, policy: Policy, x_src: Tensor) -> Tensor:
        steps = self.steps
        start, end = (raw_t[steps.index].expand(len(x_src)) for raw_t in (steps.raw_t_src, steps.raw_t_dst))
        return policy.integrate(x_src, start, end, steps.noise_schedule, self.total_substeps, steps.seq_len)
