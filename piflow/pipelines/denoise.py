"""The pi-Flow loop inside diffusers' own pipelines (arXiv 2510.14974, algorithm 2).

A diffusers pipeline asks its transformer for a velocity and its scheduler for the next state. For the length of a call
both have stand-ins. The transformer's answers with the mean velocity of its policy over the step,

    u = (x_src - x_dst) / (sigma_src - sigma_dst),      x_dst: the policy rolled out from x_src to sigma_dst,

and the scheduler's goes back to x_dst and leaves the rest to `FlowMapSDEScheduler`, with the caller's generator. All
else, from the prompt to the image, is diffusers' own code.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import FrozenDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Generator, Tensor, nn

from piflow.models.adapters import PiFlowLoaderMixin
from piflow.models.heads import DXOutput
from piflow.noise_schedule import check_whole, segments
from piflow.policies import DXPolicy, GMFlowPolicy, Policy, resolve_temperature
from piflow.schedulers import FlowMapSDEScheduler

PUBLISHED_SCHEDULE: dict[str, Any] = {"shift": 3.2, "final_step_size_scale": 0.5}
"""FlowMapSDEScheduler's settings for the published pi-Qwen-Image, pi-FLUX.1 and pi-FLUX.2 adapters."""

DEFAULT_NFE = 4

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


class PolicyLoopMixin(PiFlowLoaderMixin):
    """Mixin before a diffusers pipeline in the bases: its denoising loop can run students."""

    student_schedule: ClassVar[dict[str, Any]] = PUBLISHED_SCHEDULE
    """Settings of the FlowMapSDEScheduler that takes the place of a base model's scheduler."""

    transformer: Any
    scheduler: Any
    vae: Any
    _set_aside: dict[str, Any] = {}  # noqa: RUF012 (never changed in place)

    @contextmanager
    def _policy_loop(
        self,
        nfe: int,
        total_substeps: int,
        temperature: float | Literal["auto"] | None,
        generator: Generator | list[Generator] | None,
        sigmas: list[float] | None = None,
    ) -> Iterator[None]:
        """Within: `transformer` answers with mean velocities, and a copy of `scheduler` takes them."""
        self._check_idle()
        check_whole("num_inference_steps" if sigmas is None else "len(sigmas)", nfe, least=1)
        check_whole("total_substeps", total_substeps, least=1)
        check_has_temperature(self.transformer, temperature)
        temperature = resolve_temperature(temperature, nfe)
        scheduler = student_scheduler(self.scheduler, self.student_schedule)
        warn_if_below_trained(self.transformer, nfe, scheduler)
        steps = PolicyScheduler(scheduler, generator, sigmas)
        with self._stand_ins(
            transformer=PolicyTransformer(self.transformer, steps, total_substeps, temperature), scheduler=steps
        ):
            yield

    @contextmanager
    def _stand_ins(self, **parts: Any) -> Iterator[None]:
        """Within: these attributes, without a trace in the pipeline's configuration or `components`."""
        self._check_idle()
        self._set_aside = {name: getattr(self, name) for name in parts}
        vars(self).update(parts)
        try:
            yield
        finally:
            vars(self).update(self._set_aside)
            self._set_aside = {}

    def _check_idle(self) -> None:
        if self._set_aside:
            raise RuntimeError("this pipeline is in a call already: make a second one, type(pipe)(**pipe.components)")

    @property
    def _in_policy_loop(self) -> bool:
        return "transformer" in self._set_aside

    @property
    def components(self) -> dict[str, Any]:
        """The pipeline's own parts, during a call too: offloading works on them."""
        return super().components | self._set_aside  # type: ignore[misc]

    def register_to_config(self, **kwargs: Any) -> None:
        """diffusers' record of the parts, from which `from_pretrained` finds them again.

        diffusers loads a class of another library only from an imported module that also names `ModelMixin`: for
        students that is `piflow.pipelines`.
        """
        for name, part in kwargs.items():
            if isinstance(part, tuple) and str(part[0]).startswith("piflow.models"):
                kwargs[name] = ("piflow.pipelines", part[1])
        super().register_to_config(**kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """diffusers' folder, with what the student's adapter said of its policy.

        Raises a ValueError for a student with LoRA layers, whose weights diffusers would write but not find again.
        """
        student = self.transformer
        if is_student(student):
            if any(isinstance(module, BaseTunerLayer) for module in student.modules()):
                raise ValueError(
                    "save_pretrained: the transformer is a base model with LoRA adapters on it, which a folder of "
                    "weights cannot hold; save after unload_piflow_adapter(), and load it again from where it is"
                )
            student.register_to_config(**{SAVED_POLICY: dict(policy_config_of(student))})
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """diffusers' way from one pipeline class to another, which drops transformers of a subclass: not students."""
        return super().from_pipe(pipeline, **{"transformer": pipeline.transformer, **kwargs})  # type: ignore[misc]


class PiFlowPipelineMixin(PolicyLoopMixin):
    """Mixin before a diffusers pipeline of packed tokens in the bases: it runs students, and base models as before.

    With a student as `transformer`, the scheduler's settings are those of `scheduler` if it is a FlowMapSDEScheduler,
    and `student_schedule`, the published ones, under the FlowMatchEulerDiscreteScheduler of a base model's folder.
    With the base model as `transformer`, the pipeline is diffusers' own.
    """

    student_defaults: ClassVar[dict[str, Any]] = {"num_inference_steps": DEFAULT_NFE}
    """Arguments of a call with a student that differ from diffusers' defaults."""

    vae_scale_factor: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        calls = [vars(base)["__call__"] for base in cls.__mro__ if "__call__" in vars(base)]
        if len(calls) > 1 and calls[0] is PiFlowPipelineMixin.__call__:
            cls.__call__ = showing_arguments_of(calls[1], calls[0])  # type: ignore[method-assign]

    @torch.no_grad()
    def __call__(
        self,
        *args: Any,
        total_substeps: int = 128,
        temperature: float | Literal["auto"] | None = "auto",
        **kwargs: Any,
    ) -> Any:
        """Images of diffusers' pipeline for its arguments, `num_inference_steps` network evaluations each (4).

        Args:
            total_substeps: policy substeps over the whole of raw time.
            temperature: of the mixture in all steps but the last: a number, None, or "auto" for 0.1 (nfe - 1) within
                [0, 1]. A DX policy has no components: "auto" and None are all that it takes below 1.
            true_cfg_scale: a student holds its teacher's guidance, so that it is off (1) by default. Above 1, with a
                negative prompt, the mean velocities of both policies are combined.
            generator: also makes the noise of a scheduler with h > 0.

        Raises a ValueError that names the argument for what is outside its domain, sizes that do not divide into the
        base model's patches included. Warns for fewer network evaluations than the student was trained for.
        """
        call = super().__call__  # type: ignore[misc]
        arguments = inspect.signature(call).bind(*args, **kwargs).arguments
        if not is_student(self.transformer):
            with self._stand_ins(scheduler=base_scheduler(self.scheduler)):
                return call(**arguments)

        arguments = {**self.student_defaults, **arguments}
        check_whole("num_images_per_prompt", arguments.get("num_images_per_prompt", 1), least=1)
        sigmas = arguments.get("sigmas")
        nfe = arguments["num_inference_steps"] if sigmas is None else len(sigmas)
        with self._policy_loop(nfe, total_substeps, temperature, arguments.get("generator"), sigmas):
            return call(**arguments)

    def check_inputs(self, *args: Any, **kwargs: Any) -> None:
        """diffusers' checks, and errors where it would round a size or take an empty list."""
        check = super().check_inputs  # type: ignore[misc]
        if self._in_policy_loop:
            given = inspect.signature(check).bind(*args, **kwargs).arguments
            self._check_size(given["height"], given["width"])
            if given.get("prompt") == []:
                raise ValueError("prompt: expected a string or a list of strings, got an empty list")
        check(*args, **kwargs)

    def _check_size(self, height: int | None, width: int | None) -> None:
        multiple = 2 * self.vae_scale_factor
        for name, size in {"height": height, "width": width}.items():
            if size is not None:
                check_whole(name, size, least=multiple)
            if size is not None and size % multiple:
                below = size // multiple * multiple
                raise ValueError(
                    f"{name}: expected a multiple of {multiple}, the size of one token in pixels, got {size}; "
                    f"next to it are {below} and {below + multiple}"
                )
        if height is not None and width is not None:
            self.scheduler.seq_len = (height // multiple) * (width // multiple)

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        """diffusers' start, in float32 whatever the dtype of the networks; latents and generators are checked."""
        prepare = super().prepare_latents  # type: ignore[misc]
        if not self._in_policy_loop:
            return prepare(*args, **kwargs)
        call = inspect.signature(prepare).bind(*args, **kwargs)
        given = call.arguments
        batch, height, width = given["batch_size"], given["height"], given["width"]
        self._check_size(height, width)
        multiple = 2 * self.vae_scale_factor
        self._check_latents(given.get("latents"), (batch, height // multiple, width // multiple))
        check_generators(given["generator"], batch)
        given["dtype"] = torch.float32
        return prepare(*call.args, **call.kwargs)

    def _check_latents(self, latents: Tensor | None, grid: tuple[int, int, int]) -> None:
        expected = self._latents_shape(*grid, self.transformer.config.in_channels)
        if latents is not None and tuple(latents.shape) != expected:
            raise ValueError(f"latents: expected shape {expected}, got {tuple(latents.shape)}")

    def _latents_shape(self, batch: int, rows: int, columns: int, channels: int) -> tuple[int, ...]:
        """Shape of the `latents` that the pipeline takes, for a grid of rows x columns tokens."""
        return batch, rows * columns, channels

    def _unpack_latents(self, *args: Any) -> Tensor:
        """diffusers' unpacking, in the dtype that the VAE decodes in."""
        return super()._unpack_latents(*args).to(self.vae.dtype)  # type: ignore[misc]


def showing_arguments_of(theirs: Callable[..., Any], call: Any) -> Any:
    """`call` once more, with the arguments of `theirs` before its own in what `help` and `inspect.signature` show."""
    shown = FunctionType(call.__code__, call.__globals__, closure=call.__closure__)
    update_wrapper(shown, call)
    own = [p for p in inspect.signature(call).parameters.values() if p.kind is p.KEYWORD_ONLY]
    parameters = [*inspect.signature(theirs).parameters.values(), *own]
    vars(shown)["__signature__"] = inspect.Signature(parameters)
    shown.__doc__ = f"{inspect.cleandoc(call.__doc__)}\n\ndiffusers:\n\n{inspect.cleandoc(theirs.__doc__ or '')}"
    return shown


class ImageStartMixin(PiFlowPipelineMixin):
    """Mixin before a diffusers pipeline in the bases that starts from an image."""

    def _encode_vae_image(self, image: Tensor, generator: Generator | list[Generator]) -> Tensor:
        """diffusers' encoding in the VAE's own dtype, in float32 from there on.

        With a generator for each result, the encoding is drawn for each; diffusers draws it once, from the first.
        """
        encode = super()._encode_vae_image  # type: ignore[misc]
        if not self._in_policy_loop:
            return encode(image, generator)
        if isinstance(generator, list) and len(generator) % len(image) == 0:
            image = image.repeat(len(generator) // len(image), *[1] * (image.dim() - 1))
        return encode(image.to(self.vae.dtype), generator).float()


def student_scheduler(scheduler: Any, settings: dict[str, Any]) -> FlowMapSDEScheduler:
    """The same FlowMapSDEScheduler once more, or one with these `settings` in place of a base model's scheduler.

    A copy, since a scheduler knows the step it is at: so pipelines of the same parts can run side by side.
    """
    if isinstance(scheduler, FlowMapSDEScheduler):
        return copy.deepcopy(scheduler)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return FlowMapSDEScheduler(**settings)
    call = ", ".join(f"{key}={value}" for key, value in settings.items())
    raise ValueError(
        f"scheduler: a student takes its steps with a FlowMapSDEScheduler, got a {type(scheduler).__name__}; "
        f"set pipe.scheduler = FlowMapSDEScheduler({call})"
    )


def base_scheduler(scheduler: Any) -> Any:
    """The scheduler itself, or Euler steps with the same shift in place of a FlowMapSDEScheduler."""
    if not isinstance(scheduler, FlowMapSDEScheduler):
        return scheduler
    config = scheduler.config
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=config.num_train_timesteps,
        shift=config.shift,
        use_dynamic_shifting=config.use_dynamic_shifting,
        base_shift=config.base_logshift,
        max_shift=config.max_logshift,
        base_image_seq_len=config.base_seq_len,
        max_image_seq_len=config.max_seq_len,
    )


def check_has_temperature(student: Any, temperature: object) -> None:
    """Raise a ValueError for a temperature below 1 where a policy has no mixture to sharpen."""
    if "n_grid" in student.config and isinstance(temperature, int | float) and 0 <= temperature < 1:
        raise ValueError(
            f"temperature: a DX policy has no mixture components to sharpen, got {temperature}; "
            "leave it out, or give 'auto' or None"
        )


def check_generators(generator: Generator | list[Generator] | None, batch: int) -> None:
    """Raise a ValueError unless there is one generator, none, or a list of one per image."""
    generators = generator if isinstance(generator, list) else [generator]
    for each in generators:
        if not isinstance(each, Generator) and generator is not None:
            raise ValueError(f"generator: expected a torch.Generator or a list of them, got {each!r}")
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(f"generator: expected one, or a list of one per image, {batch} in all, got {len(generator)}")


def warn_if_below_trained(student: Any, nfe: int, scheduler: FlowMapSDEScheduler) -> None:
    """Warn if the student was trained for shorter segments than `nfe` network evaluations make."""
    config, final = policy_config_of(student), scheduler.config.final_step_size_scale
    trained, segment_size = config.get("nfe"), config.get("segment_size")
    if trained is None and segment_size and max(s for _, s in segments(nfe, final)) > segment_size * (1 + 1e-3):
        trained = round(1 / segment_size + 1 - final)
    if trained is not None and nfe < trained:
        warnings.warn(
            f"num_inference_steps: {nfe} is below the {trained} network evaluations that this student was trained for; "
            "its policies are followed further than they were trained to reach",
            stacklevel=6,
        )
