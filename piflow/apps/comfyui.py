"""ComfyUI's nodes: a diffusers base model, a pi-Flow adapter on it with a strength, and sampling.

ComfyUI's own MODEL is another implementation of these networks, with other layers under other names, so that an adapter
cannot go on it. What travels between the nodes, PIFLOW_PIPELINE, is therefore a pipeline of `piflow.pipelines`. What
comes out is ComfyUI's: IMAGE (B, H, W, C) within [0, 1], and LATENT as ComfyUI's VAE nodes take it.

Nothing of ComfyUI is imported before a node runs. The folder `comfyui` of the repository makes ComfyUI find them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, Flux2Pipeline, QwenImagePipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor

from piflow import pipelines

from .latents import QWEN_IMAGE_GUIDANCE, decode, spatial, start_noise, vae_latents
from .places import split_repository
from .sizes import LONGEST_SIDE

CATEGORY = "pi-Flow"
PIPELINE = "PIFLOW_PIPELINE"
KNOWN = ("PiQwenImagePipeline", "PiFluxPipeline", "PiFlux2Pipeline")
ADAPTERS = "piflow"
"""Folder of adapters among ComfyUI's models."""


@dataclass(frozen=True)
class Loaded:
    """A pipeline, and the adapter to use on it: by the name that it is loaded under, None for the base model."""

    pipe: Any
    adapter: str | None = None
    strength: float = 1.0

    @property
    def uses_student(self) -> bool:
        """At strength 0 it is the base model that computes."""
        return self.adapter is not None and self.strength > 0

    @contextmanager
    def ready(self) -> Iterator[Any]:
        """The pipeline with the transformer that is meant, LoRA scaled; afterwards the LoRA is as in its file."""
        if not self.uses_student:
            if family_of(self.pipe) is not None:
                self.pipe.disable_piflow_adapter()
            yield self.pipe
            return
        self.pipe.set_piflow_adapter(self.adapter)
        layers = [
            layer
            for layer in self.pipe.transformer.modules()
            if isinstance(layer, BaseTunerLayer) and self.adapter in layer.scaling
        ]
        if self.strength != 1 and not layers:
            raise ValueError("strength: this adapter has no LoRA to scale, so that only 0 and 1 mean something")
        try:
            for layer in layers:
                layer.set_scale(self.adapter, self.strength)
            yield self.pipe
        finally:
            for layer in layers:
                layer.set_scale(self.adapter, 1)


class PiFlowLoadBase:
    """Load pi-Flow Base Model"""

    DESCRIPTION = "A diffusers base model: Qwen-Image, FLUX.1 or FLUX.2."
    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = (PIPELINE,), ("pipeline",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (
                    "STRING",
                    {
                        "default": "Qwen/Qwen-Image",
                        "tooltip": "A folder in models/diffusers, any other folder, or a Hugging Face repository, "
                        "in the format of diffusers.",
                    },
                ),
                "dtype": (["bfloat16", "float16", "float32"],),
                "offload": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "Keep on the GPU only the part that is computing: slower, smaller."},
                ),
            }
        }

    def load(self, model: str, dtype: str, offload: bool) -> tuple[Loaded]:
        """The pipeline on ComfyUI's device, from which ComfyUI's own models are moved away."""
        from comfy import model_management  # type: ignore[import-not-found]

        place = located(model, "diffusers")
        name = str(DiffusionPipeline.load_config(place).get("_class_name"))
        ours = name if name.startswith("Pi") else f"Pi{name}"
        if ours not in KNOWN:
            known = ", ".join(name.removeprefix("Pi") for name in KNOWN)
            raise ValueError(f"model: {model} is a {name}; adapters are for {known}")
        pipe = getattr(pipelines, ours).from_pretrained(place, dtype=getattr(torch, dtype))
        pipe.set_progress_bar_config(disable=True)
        device = model_management.get_torch_device()
        if device.type != "cpu":
            model_management.unload_all_models()
        if offload and device.type != "cpu":
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.to(device)
        return (Loaded(pipe),)


class PiFlowLoadAdapter:
    """Load pi-Flow Adapter"""

    DESCRIPTION = "A pi-Flow adapter on a base model. The base's weights are shared: several adapters cost little."
    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = (PIPELINE,), ("pipeline",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "pipeline": (PIPELINE,),
                "adapter": (
                    "STRING",
                    {
                        "default": "Lakonik/pi-Qwen-Image/gmqwen_k8_piid_4step",
                        "tooltip": "A folder in models/piflow, any other folder, or a Hugging Face repository, with "
                        "its subfolder behind it.",
                    },
                ),
                "strength": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 2.0,
                        "step": 0.01,
                        "tooltip": "Scales the adapter's LoRA. Its output layers are there above 0, and whole; "
                        "0 is the base model.",
                    },
                ),
            }
        }

    def load(self, pipeline: Loaded, adapter: str, strength: float) -> tuple[Loaded]:
        """The same pipeline with the adapter chosen, which is read once."""
        place, subfolder = split_repository(located(adapter, ADAPTERS))
        name = "piflow_" + hashlib.sha256(f"{place}/{subfolder}".encode()).hexdigest()[:12]
        family = family_of(pipeline.pipe)
        if family is None or name not in family.students:
            pipeline.pipe.load_piflow_adapter(place, subfolder=subfolder, adapter_name=name)
        return (replace(pipeline, adapter=name, strength=strength),)


class PiFlowSample:
    """Sample with pi-Flow"""

    DESCRIPTION = "Pictures in a few network evaluations; without an adapter, Euler steps of the base model."
    CATEGORY, FUNCTION = CATEGORY, "sample"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "LATENT"), ("images", "latent")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = {"default": 1024, "min": 16, "max": LONGEST_SIDE, "step": 16}
        return {
            "required": {
                "pipeline": (PIPELINE,),
                "prompt": ("STRING", {"multiline": True, "default": "", "dynamicPrompts": True}),
                "width": ("INT", side),
                "height": ("INT", side),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 64, "tooltip": "With seeds that count upwards."}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}),
                "steps": ("INT", {"default": 4, "min": 1, "max": 100, "tooltip": "Network evaluations."}),
                "substeps": (
                    "INT",
                    {"default": 128, "min": 1, "max": 1024, "tooltip": "Of the policies, in all steps together."},
                ),
                "temperature": (
                    "FLOAT",
                    {
                        "default": -1.0,
                        "min": -1.0,
                        "max": 1.0,
                        "step": 0.05,
                        "tooltip": "Below 1 sharpens the policies. -1 is automatic: 0.1 (steps - 1).",
                    },
                ),
            },
            "optional": {"images": ("IMAGE", {"tooltip": "Pictures to change, by FLUX.2."})},
        }

    def sample(
        self,
        pipeline: Loaded,
        prompt: str,
        width: int,
        height: int,
        batch_size: int,
        seed: int,
        steps: int,
        substeps: int,
        temperature: float,
        images: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """IMAGE (B, H, W, 3) and LATENT; picture i is what `seed + i` makes alone."""
        from comfy import model_management, utils

        multiple = 2 * pipeline.pipe.vae_scale_factor
        if width % multiple or height % multiple:
            raise ValueError(f"width, height: expected multiples of {multiple}, got {width} x {height}")
        arguments: dict[str, Any] = {"prompt": prompt, "width": width, "height": height}
        if images is not None:
            if not isinstance(pipeline.pipe, Flux2Pipeline):
                raise ValueError("images: only FLUX.2 takes pictures to change")
            arguments["image"] = pictures(images)
        if pipeline.uses_student:
            arguments |= {"total_substeps": substeps, "temperature": "auto" if temperature < 0 else temperature}
        elif isinstance(pipeline.pipe, QwenImagePipeline):
            arguments |= QWEN_IMAGE_GUIDANCE

        bar = utils.ProgressBar(steps)

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(step + 1, steps)
            return {}

        generators = [torch.Generator().manual_seed((seed + i) % 2**64) for i in range(batch_size)]
        with pipeline.ready() as pipe:
            latents = pipe(
                **arguments,
                latents=start_noise(pipe, width, height, generators, batch_size),
                num_images_per_prompt=batch_size,
                generator=generators,
                num_inference_steps=steps,
                output_type="latent",
                callback_on_step_end=after_step,
            ).images
            pixels = decode(pipe, latents, width, height, "pt")
            pipe.maybe_free_model_hooks()
        is_flux2 = isinstance(pipe, Flux2Pipeline)
        samples = (spatial if is_flux2 else vae_latents)(pipe, latents, width, height)
        return pixels.permute(0, 2, 3, 1).float().cpu(), {"samples": samples.float().cpu()}


def family_of(pipe: Any) -> Any:
    """The adapters that are loaded on a pipeline's base model; None if none is."""
    return getattr(pipe.transformer, "piflow_family", None)


def located(name: str, kind: str) -> str:
    """The folder of that name among ComfyUI's models of a kind, if there is one, else the name as it is."""
    import folder_paths  # type: ignore[import-not-found]

    folders = folder_paths.get_folder_paths(kind) if kind in folder_paths.folder_names_and_paths else []
    found = (path for path in (Path(folder) / name for folder in folders) if name and path.is_dir())
    return str(next(found, name))


def pictures(images: Tensor) -> list[Image.Image]:
    """ComfyUI's IMAGE (B, H, W, C) within [0, 1] as PIL images."""
    arrays = (255 * images[..., :3].clamp(0, 1)).round().to(torch.uint8).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def register_folders() -> None:
    """Have ComfyUI know `models/piflow`, and what extra_model_paths.yaml says of `piflow`."""
    import folder_paths

    folder_paths.add_model_folder_path(ADAPTERS, str(Path(folder_paths.models_dir) / ADAPTERS))


NODE_CLASS_MAPPINGS: dict[str, type] = {cls.__name__: cls for cls in (PiFlowLoadBase, PiFlowLoadAdapter, PiFlowSample)}
NODE_DISPLAY_NAME_MAPPINGS = {name: cls.__doc__ for name, cls in NODE_CLASS_MAPPINGS.items()}
