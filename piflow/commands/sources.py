"""What people name as a model: a pipeline's folder or repository, a student, a training, or the digits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError

from piflow.commands.common import UsageError
from piflow.json_files import read_json_object

if TYPE_CHECKING:
    import torch

DIGITS, DIGITS_TEACHER = "digits", "digits-teacher"
PIPELINE, CONFIG = "model_index.json", "config.json"
PIPELINES = {
    "QwenImagePipeline": "PiQwenImagePipeline",
    "FluxPipeline": "PiFluxPipeline",
    "Flux2Pipeline": "PiFlux2Pipeline",
    "DiTPipeline": "PiDiTPipeline",
}
"""diffusers' class in a folder of a base model -> ours."""


@dataclass(frozen=True)
class Training:
    """What a training says of the sampling of its student: its `nfe`, and settings of a FlowMapSDEScheduler."""

    nfe: int | None = None
    total_substeps: int | None = None
    schedule: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A pipeline that is ready to be called, and what its calls are to be by default."""

    pipe: Any
    training: Training = Training()
    guidance: float | None = None

    @property
    def is_class_conditional(self) -> bool:
        return type(self.pipe).__name__ == "PiDiTPipeline"


def open_model(
    name: str,
    scratch: Path,
    *,
    adapter: str | None = None,
    subfolder: str | None = None,
    vae: str | None = None,
    dtype: torch.dtype,
) -> Model:
    """The pipeline of a model on the CPU, with the adapter on it.

    Args:
        name: `digits` or `digits-teacher`; a diffusers pipeline's folder or repository; a class-conditional student's
            folder; or a training of one, or a checkpoint of it.
        scratch: an empty folder for the student of a checkpoint.
        adapter: folder or repository of an adapter, or a training or checkpoint that makes one. subfolder: in it.
        vae: folder or repository of the VAE of a student that makes latents.

    Raises:
        FileNotFoundError, ValueError: saying what was looked for, and what to give instead; a UsageError where the
            arguments do not go together.
    """
    path = Path(name)
    if name in (DIGITS, DIGITS_TEACHER) or (path.is_dir() and not (path / PIPELINE).is_file()):
        if adapter is not None:
            raise UsageError(f"--adapter goes on the pipeline of a base model, not on {name}.")
        if name not in (DIGITS, DIGITS_TEACHER):
            return _class_conditional(path, scratch, vae, dtype)
        if vae is not None:
            raise UsageError(f"--vae is for a student that makes latents; {name} makes pictures.")
        return _digits(name, dtype)
    if path.is_file():
        raise UsageError(f"{name} is a file: give the folder that holds it (`piflow inspect {name}` tells what it is).")
    if vae is not None:
        raise UsageError(f"--vae is for a student without one; {name} is a pipeline and has its own.")
    pipe = _pipeline(name, dtype)
    if adapter is None:
        return Model(pipe)
    if not Path(adapter).is_dir():
        pipe.load_piflow_adapter(adapter, subfolder=subfolder)
        return Model(pipe, Training(pipe.transformer.policy_config.get("nfe")))
    folder, training = student_folder(Path(adapter) / (subfolder or ""), scratch)
    pipe.load_piflow_adapter(folder)
    return Model(pipe, Training(pipe.transformer.policy_config.get("nfe")) if training == Training() else training)


def student_folder(path: Path, scratch: Path) -> tuple[Path, Training]:
    """The folder of the student itself, and what its training says of it.

    Of a training that is not finished, or of a single checkpoint, the averaged student is written into `scratch`.
    """
    if (path / CONFIG).is_file():
        return path, _training_beside(path)
    if (path / "student" / CONFIG).is_file():
        return path / "student", _training_beside(path / "student")
    from piflow.models.export import export_checkpoint
    from piflow.training.checkpoint import MANIFEST, read_manifest

    if not (path / MANIFEST).is_file() and not any((*path.glob("step_*"), *path.glob("checkpoints/step_*"))):
        raise FileNotFoundError(f"{path} holds no pipeline ({PIPELINE}), student ({CONFIG}) or training.")
    folder = export_checkpoint(path, scratch / "student")
    manifests = sorted(path.glob(f"**/{MANIFEST}"))
    return folder, _training_of(read_manifest(manifests[-1].parent).config)


def _digits(name: str, dtype: torch.dtype) -> Model:
    """The shipped four-step student, or its teacher."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from piflow.digits.teacher import SHIPPED_WEIGHTS, load_teacher
    from piflow.pipelines import PiDiTPipeline

    if name == DIGITS:
        student = _class_conditional(SHIPPED_WEIGHTS.with_name("student-nfe4"), SHIPPED_WEIGHTS, None, dtype)
        return Model(student.pipe, Training(nfe=4, total_substeps=64))
    pipe = PiDiTPipeline(load_teacher().to(dtype), vae=None, scheduler=FlowMatchEulerDiscreteScheduler())
    return Model(pipe, Training(nfe=32), guidance=2.0)


def _class_conditional(path: Path, scratch: Path, vae: str | None, dtype: torch.dtype) -> Model:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

    from piflow import models
    from piflow.digits.folders import load_network
    from piflow.models.dit import TEACHER_CLASSES, load_dit_teacher
    from piflow.pipelines import PiDiTPipeline
    from piflow.pipelines.stand_ins import policy_config_of

    folder, training = student_folder(path, scratch)
    kind = str(read_json_object(folder / CONFIG).get("_class_name")).lstrip("_")
    if kind in TEACHER_CLASSES:
        transformer = load_dit_teacher(folder)
    elif kind in ("GMDiTTransformer2DModelV2", "DXDiTTransformer2DModel"):
        transformer = load_network(getattr(models, kind), folder, "student", "Copy it again.")
    else:
        raise UsageError(
            f"{path} holds a {kind}, which goes on the pipeline of its base model: "
            f"piflow sample BASE --adapter {path} --prompt ..."
        )
    channels = transformer.config.in_channels
    if vae is None and channels not in (1, 3):
        raise UsageError(f"{path} makes latents of {channels} channels: give the VAE that decodes them with --vae.")
    within = {"subfolder": "vae"} if vae is not None and (Path(vae) / PIPELINE).is_file() else {}
    decoder = None if vae is None else _loaded(AutoencoderKL, vae, torch_dtype=dtype, **within)
    pipe = PiDiTPipeline(transformer.to(dtype), vae=decoder, scheduler=FlowMatchEulerDiscreteScheduler())
    if training.nfe is None:
        training = Training(policy_config_of(transformer).get("nfe"))
    elif not policy_config_of(transformer):
        transformer.policy_config = {"nfe": training.nfe}  # so that the pipeline warns of fewer
    return Model(pipe, training)


def _pipeline(name: str, dtype: torch.dtype) -> Any:
    from piflow import pipelines

    kind = str(read_json_object(_index_of(name)).get("_class_name"))
    ours = PIPELINES.get(kind, kind)
    if ours not in pipelines.__all__:
        raise ValueError(f"{name} is a {kind}: expected one of {', '.join(PIPELINES)}.")
    return _loaded(getattr(pipelines, ours), name, dtype=dtype)


def _index_of(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name) / PIPELINE
    try:
        return Path(hf_hub_download(name, PIPELINE))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if isinstance(error, HFValidationError):
            problem = "that is no name of a Hugging Face repository either"
        elif isinstance(error, LocalEntryNotFoundError):
            problem = "as a Hugging Face repository it is not in the cache, and cannot be downloaded"
        else:
            problem = f"the Hugging Face repository has no pipeline: {(str(error).strip().splitlines() or [''])[0]}"
        raise FileNotFoundError(f"There is no folder {name}, and {problem}. `{DIGITS}` needs no download.") from error


def _loaded(cls: Any, name: str, **options: Any) -> Any:
    """`cls.from_pretrained`, whose many kinds of errors become one message."""
    try:
        return cls.from_pretrained(name, **options)
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        problem = " ".join(str(error).split())[:300]
        raise ValueError(f"{name} cannot be loaded as {cls.__name__} ({type(error).__name__}: {problem}).") from error


def _training_beside(student: Path) -> Training:
    """Of `<output_dir>/student`: what `<output_dir>/config.yaml` says."""
    config = student.parent / "config.yaml"
    if student.name != "student" or not config.is_file():
        return Training()
    from piflow.training.config import load_config

    return _training_of(load_config(config).model_dump(mode="json"))


def _training_of(config: dict[str, Any]) -> Training:
    settings = config["distillation"]
    schedule = {"final_step_size_scale": settings["final_step_size_scale"], "shift": settings["shift"]}
    if dynamic := settings.get("dynamic_shift"):
        schedule |= {"use_dynamic_shifting": True, "dynamic_shifting_type": dynamic["kind"]}
        schedule |= {key: value for key, value in dynamic.items() if key != "kind"}
    return Training(settings["nfe"], settings["total_substeps"], schedule)
