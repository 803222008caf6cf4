"""pi-Flow on class-conditional DiT (ImageNet, digits)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiTPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from piflow.models.dit import check_class_labels
from piflow.schedulers import FlowMapSDEScheduler

from .denoise import DEFAULT_NFE, PolicyLoopMixin
from .schedules import base_scheduler, check_generators
from .stand_ins import is_student

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class PiDiTPipeline(PolicyLoopMixin, DiTPipeline):
    """DiTPipeline with a `GMDiTTransformer2DModelV2`, a DX student, or a flow-matching DiT as transformer.

    vae: None for a network in pixel space. The flow of a student is unshifted by default (`student_schedule`). With any
    scheduler but FlowMapSDEScheduler and FlowMatchEulerDiscreteScheduler, a base model runs as diffusers' DiTPipeline.
    """

    student_schedule: ClassVar[dict[str, Any]] = {}
    _optional_components: ClassVar[list[str]] = ["vae"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "class_labels"]

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked to skip the remaining steps, by setting `_interrupt`."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int] | Tensor,
        guidance_scale: float | None = None,
        generator: Generator | list[Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        latents: Tensor | None = None,
        total_substeps: int = 128,
        temperature: float | Literal["auto"] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """One image for each of `class_labels`.

        Args:
            guidance_scale: classifier-free guidance of the velocities. A student holds its teacher's guidance and runs
                without (1) by default; a base model has diffusers' default, 4.
            generator: one, or a list of one for each image; also makes the noise of a scheduler with h > 0.
            num_inference_steps: network evaluations, 4 for a student, 50 for a base model.
            output_type: "pil", "np", "pt" or "latent".
            latents: the noise to start from, (B, C, H, W).
            total_substeps, temperature: of a student, see `PiFlowPipelineMixin.__call__`; no temperature by default, as
                class-conditional students are trained.
            callback_on_step_end: (pipeline, step, timestep, tensors) -> tensors to go on with, "latents" among them.

        Raises a ValueError that names the argument for what is outside its domain.
        """
        student = is_student(self.transformer)
        guidance_scale = (1.0 if student else 4.0) if guidance_scale is None else guidance_scale
        nfe = (DEFAULT_NFE if student else 50) if num_inference_steps is None else num_inference_steps
        if not student and not isinstance(self.scheduler, FlowMapSDEScheduler | FlowMatchEulerDiscreteScheduler):
            return DiTPipeline.__call__(self, class_labels, guidance_scale, generator, nfe, output_type, return_dict)
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: expected some of {self._callback_tensor_inputs}, "
                f"got {sorted(unknown)}"
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: expected one of {OUTPUT_TYPES}, got {output_type!r}")
        labels = self._labels(class_labels)
        latents = self._start(len(labels), generator, latents)
        loop: AbstractContextManager[None] = self._stand_ins(scheduler=base_scheduler(self.scheduler))
        if student:
            loop = self._policy_loop(nfe, total_substeps, temperature, generator)

        self._interrupt = False
        with loop:
            if student:
                self.scheduler.set_timesteps(nfe, device=latents.device)
            else:  # as diffusers' text-to-image pipelines: left alone, the scheduler spends a step between 0.001 and 0
                self.scheduler.set_timesteps(sigmas=[1 - i / nfe for i in range(nfe)], device=latents.device)
            self.scheduler.set_begin_index(0)  # or it would look for the first timestep, and wait for a GPU
            for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
                if self.interrupt:
                    continue
                velocity = self._velocity(latents, t, labels, guidance_scale)
                latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "class_labels": labels}
                    tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, t, tensors) or {}
                    latents, labels = changed.get("latents", latents), changed.get("class_labels", labels)

        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _velocity(self, latents: Tensor, timestep: Tensor, labels: Tensor, guidance_scale: float) -> Tensor:
        x = latents.to(self.transformer.dtype)

        def velocity(labels: Tensor) -> Tensor:
            output = self.transformer(hidden_states=x, timestep=timestep.expand(len(x)), class_labels=labels)[0]
            return output[:, : x.shape[1]].float()  # without the variances that some DiTs predict

        conditional = velocity(labels)
        if guidance_scale <= 1:
            return conditional
        unconditional = velocity(torch.full_like(labels, self.transformer.config.num_embeds_ada_norm))
        return unconditional + guidance_scale * (conditional - unconditional)

    def _labels(self, class_labels: int | list[int] | Tensor) -> Tensor:
        labels = torch.as_tensor(class_labels).reshape(-1)
        if len(labels) == 0:
            raise ValueError("class_labels: expected at least one label, got an empty list")
        check_class_labels(labels, self.transformer.config.num_embeds_ada_norm)
        return labels.to(self._execution_device, torch.int64)

    def _start(self, batch: int, generator: Generator | list[Generator] | None, latents: Tensor | None) -> Tensor:
        config = self.transformer.config
        shape = (batch, config.in_channels, config.sample_size, config.sample_size)
        check_generators(generator, batch)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents: expected shape {shape}, got {tuple(latents.shape)}")
        return latents.to(self._execution_device, torch.float32)

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        """Images of `latents`, which a network in pixel space makes in [-1, 1]."""
        if self.vae is not None:
            latents = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        images = (latents.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array
