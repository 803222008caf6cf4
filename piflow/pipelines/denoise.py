"""Mixins that run students in diffusers' own pipelines, with the stand-ins of `piflow.pipelines.stand_ins`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Generator, Tensor

from piflow.models.adapters import PiFlowLoaderMixin
from piflow.noise_schedule import check_whole
from piflow.policies import resolve_temperature

from .schedules import (
    PUBLISHED_SCHEDULE,
    base_scheduler,
    check_generators,
    check_has_temperature,
    student_scheduler,
    warn_if_below_trained,
)
from .stand_ins import SAVED_POLICY, PolicyScheduler, PolicyTransformer, is_student, policy_config_of

DEFAULT_NFE = 4


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
