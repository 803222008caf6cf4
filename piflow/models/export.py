"""Students written as folders that this library and diffusers read: adapters (LoRA and output layers) or networks.

    export_adapter(student, base, "my-adapter", policy_config={"type": "GMFlow"})
    export_checkpoint("outputs/run/checkpoints/step_001000", "my-student")

The format is that of `piflow.models.adapter_files`. A folder is written beside its place, then renamed: it is whole or
absent.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.serialization import safe_globals

from piflow import models
from piflow.models.adapter_files import CONFIG, INDEX, WEIGHTS, read_adapter
from piflow.models.adapter_student import head_of, policy_config_for, student_class
from piflow.models.adapters import name_of
from piflow.models.heads import base_of
from piflow.models.sharing import layer_at

WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"

LORA = re.compile(r"\.lora_([AB])(?:\.[^.]+)?\.weight$")
"""The end of a LoRA weight's name, with the adapter's name or without it."""


def export_adapter(
    student: Any,
    base: nn.Module | None,
    out_dir: str | Path,
    *,
    policy_config: dict[str, Any] | None = None,
    adapter_name: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write what distinguishes a student from its base: one LoRA, and the whole weights of the output layers.

    Tensors keep their dtypes. A LoRA whose alpha is not its rank has the quotient multiplied into `lora_B`, since
    readers of the format take alpha for the rank.

    Args:
        base: further parameters that differ from its are written as whole weights. None: output layers only.
        policy_config: the policy that pipelines are to use; the student's own, or its class's, where it is not given.
        adapter_name: the LoRA to write; needed where the student has several.
        overwrite: replace an earlier export.

    Returns:
        The folder.

    Raises:
        ValueError: a student, LoRA or base of another kind.
        FileExistsError: the folder is there, and `overwrite` is not given or it holds other files too.
    """
    if not hasattr(type(student), "from_teacher"):
        raise ValueError(f"student: expected a student of piflow.models, got a {type(student).__name__}")
    if base is not None and not isinstance(base, base_of(type(student))):
        wanted = base_of(type(student)).__name__
        raise ValueError(f"base: expected a {wanted}, which the student extends, got a {type(base).__name__}")
    tensors = own_weights(student, base)
    if name := _lora_name(student, adapter_name):
        tensors |= _lora_weights(student, name)
    asked = policy_config or getattr(student, "policy_config", None)
    policy_config = policy_config_for(type(student), asked, "policy_config")
    return write_folder(out_dir, published_config(student), tensors, policy_config, overwrite=overwrite)


def export_checkpoint(
    checkpoint: str | Path,
    out_dir: str | Path,
    *,
    ema: bool = True,
    allow_pickle: bool = False,
    policy_config: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the student of a training checkpoint.

    Args:
        checkpoint: a folder `step_000100` of `piflow.train`; or its `checkpoints` or output folder, for the newest good
            one; or a student's saved folder, of which only LoRA and output layers are written if it has a LoRA.
        ema: the averaged weights, else the raw ones, which only DeepSpeed's pickled shards hold.
        allow_pickle: read those (with `torch.load(weights_only=True)`).
        policy_config: as in `export_adapter`; that of a run says the `nfe` it was trained for.
        overwrite: as in `export_adapter`.

    Raises:
        FileNotFoundError: there is no checkpoint.
        CheckpointError: it is damaged. ConfigError: its teacher is not there any more.
        ValueError, FileExistsError: as in `export_adapter`.
    """
    path = Path(checkpoint)
    check_free(Path(out_dir), overwrite)
    if (path / CONFIG).is_file():
        if not ema:
            raise ValueError(f"{path} is a saved student, without raw weights: give a checkpoint of the run.")
        return _export_saved(path, out_dir, policy_config, overwrite)
    if not ema and not allow_pickle:
        raise ValueError(
            "The raw weights of a checkpoint are in pickled files, which can run code when they are read: pass "
            "--allow-pickle (allow_pickle=True) too if you trust where it comes from."
        )
    student, weights, nfe = _student_of_run(path, ema)
    policy_config = policy_config_for(type(student), policy_config or {"nfe": nfe}, "policy_config")
    return write_folder(out_dir, published_config(student), weights, policy_config, overwrite=overwrite)


def own_weights(student: Any, base: nn.Module | None) -> dict[str, Tensor]:
    """The student's whole weights that are not the base's: its output layers, and whatever else differs."""
    of_the_head, weights = head_of(student), {}
    for name, parameter in student.named_parameters():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        if of_the_head(plain) or (base is not None and not _is_base_weight(base, plain, parameter)):
            weights[plain] = parameter
    return weights


def published_config(student: Any) -> dict[str, Any]:
    """The student's config.json, without what is of this machine or of a quantised base."""
    config = json.loads(student.to_json_string())
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "quantization_config")}


def default_policy(student: nn.Module) -> dict[str, Any]:
    """What a pipeline takes for a student that does not say."""
    return policy_config_for(type(student), None, "policy_config")


def write_folder(
    out_dir: str | Path,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    policy_config: dict[str, Any],
    *,
    overwrite: bool = False,
) -> Path:
    """Write `config.json` and the weights, with `policy_config` as metadata, then put the folder in its place."""
    out = Path(out_dir).resolve()  # a link to another disk stays one
    check_free(out, overwrite)
    unfinished, replaced = (out.with_name(f".{out.name}.{state}_{os.getpid()}") for state in ("unfinished", "replaced"))
    unfinished.mkdir(parents=True)
    try:
        (unfinished / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(tensors.items())}
        save_file(whole, unfinished / WEIGHTS, metadata={"policy_config": json.dumps(policy_config)})
        if out.exists():
            out.rename(replaced)
        unfinished.rename(out)
    except SafetensorError as error:
        raise OSError(f"{out} cannot be written: {error}") from error
    except BaseException:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        raise
    finally:
        for rest in (unfinished, replaced):
            shutil.rmtree(rest, ignore_errors=True)
    return out


def check_free(out: Path, overwrite: bool) -> None:
    """FileExistsError unless a folder can be written here: nothing else of the person's is ever replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{out} is there already: give another folder, or --overwrite (overwrite=True).")
    others = {f.name for f in out.iterdir()} - {CONFIG, WEIGHTS, INDEX} if out.is_dir() else {out.name}
    if others:
        raise FileExistsError(f"{out} is no earlier export, it holds {min(others)}: give another folder.")
    if not is_students(out):
        raise FileExistsError(f"{out} is no earlier export, it holds no student: give another folder.")


def is_students(folder: Path) -> bool:
    """Whether a folder's config.json names a student of `piflow.models`."""
    try:
        name = json.loads((folder / CONFIG).read_bytes())["_class_name"]
        return hasattr(getattr(models, name.lstrip("_")), "from_teacher")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _is_base_weight(base: nn.Module, name: str, parameter: Tensor) -> bool:
    path, _, kind = name.rpartition(".")
    layer = layer_at(base, path)
    theirs = None if layer is None else layer._parameters.get(kind)
    if theirs is None or theirs is parameter:
        return theirs is not None
    return theirs.shape == parameter.shape and theirs.dtype == parameter.dtype and torch.equal(theirs, parameter)


def _lora_name(student: Any, name: str | None) -> str | None:
    """The LoRA to write: the one that is asked for, the student's pi-Flow adapter, or its only one."""
    loaded = list(getattr(student, "peft_config", None) or {})
    if name is None:
        name = name_of(student)
        own = loaded if name is None else [name]
        if len(own) > 1:
            raise ValueError(f"adapter_name: the student has several LoRAs, give one of {loaded}")
        name = own[0] if own and own[0] in loaded else None
    elif name not in loaded:
        raise ValueError(f"adapter_name: expected one of {loaded}, got {name!r}")
    return name


def _lora_weights(student: Any, name: str) -> dict[str, Tensor]:
    """The LoRA's weights by `<module>.lora_A.weight`, scaled for alpha = rank."""
    weights = get_peft_model_state_dict(student, adapter_name=name)
    if other := next((key for key in weights if not LORA.search(key)), None):
        raise ValueError(f"student: the format has lora_A and lora_B weights only, the LoRA {name!r} has {other}")
    for path, layer in student.named_modules():
        if isinstance(layer, LoraLayer) and name in layer.r:
            rank = layer.r[name]
            scale = layer.lora_alpha[name] / (rank**0.5 if student.peft_config[name].use_rslora else rank)
            if scale != 1:
                weights[f"{path}.lora_B.weight"] = weights[f"{path}.lora_B.weight"] * scale
    return weights


def _export_saved(folder: Path, out_dir: str | Path, policy_config: dict[str, Any] | None, overwrite: bool) -> Path:
    """A folder of `save_pretrained`, as it is, or as an adapter if it has a LoRA."""
    if not is_students(folder):
        raise ValueError(f"{folder} holds no student of piflow.models: give a checkpoint, or a student's folder.")
    saved = read_adapter(folder)
    lora = {LORA.sub(r".lora_\1.weight", key): tensor for key, tensor in saved.lora.items()}
    if len(lora) != len(saved.lora):
        raise ValueError(f"{folder} has several LoRAs: load the student, and call export_adapter with an adapter_name.")
    weights = {key.replace(".base_layer.", "."): tensor for key, tensor in saved.weights.items()}
    if lora:
        weights = {key: tensor for key, tensor in weights.items() if key.startswith(("proj_out", "norm_out"))} | lora
    policy_config = policy_config_for(student_class(saved), policy_config or saved.policy_config, "policy_config")
    return write_folder(out_dir, saved.config, weights, policy_config, overwrite=overwrite)


def _student_of_run(path: Path, ema: bool) -> tuple[nn.Module, dict[str, Tensor], int]:
    """The student of a checkpoint of `piflow.train`; what is to be written, all or LoRA and output layers; its nfe."""
    from piflow.training.checkpoint import MANIFEST, find_checkpoint, read_manifest
    from piflow.training.config import TrainConfig
    from piflow.training.errors import CheckpointError
    from piflow.training.lora import adapter_weights
    from piflow.training.networks import build_networks

    if not path.is_dir():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    is_one = (folder / MANIFEST).is_file() or not list(folder.glob("step_*"))
    found, warnings = find_checkpoint(folder, str(folder) if is_one else "latest")
    if found is None or warnings:
        raise CheckpointError(" ".join(warnings) + " Give the checkpoint to export itself.")
    manifest = read_manifest(found)
    config = TrainConfig.model_validate(manifest.config)
    student, _ = build_networks(
        config, fill=False, meta=config.teacher.is_text_to_image
    )  # all weights are trained ones
    trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    weights = _averaged(found, manifest.world_size, trained) if ema else _raw(found)
    if lacking := sorted(trained.keys() ^ weights.keys()):
        raise CheckpointError(f"{found} does not hold the student of its own configuration: {lacking[0]} differs.")
    if config.student.lora is not None:
        return student, adapter_weights(weights, config.student.lora), config.distillation.nfe
    student.load_state_dict(weights, strict=False, assign=config.teacher.is_text_to_image)  # buffers are its own
    return student, dict(student.state_dict()), config.distillation.nfe


def _averaged(checkpoint: Path, world_size: int, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole average, in the shapes of the `trained` parameters, from the padded shards of all ranks."""
    ranks = [safe_open(checkpoint / f"rank_{rank}.safetensors", "pt") for rank in range(world_size)]
    whole = {}
    for name, parameter in trained.items():
        shards = torch.cat([file.get_tensor(f"ema.{name}") for file in ranks])
        whole[name] = shards[: parameter.numel()].reshape(parameter.shape)
    return whole


def _raw(checkpoint: Path) -> dict[str, Tensor]:
    """The weights themselves, which DeepSpeed puts together from its shards."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from piflow.training.errors import CheckpointError

    try:
        with _nothing_is_run(), safe_globals([LossScaler, ZeroStageEnum]):
            weights = get_fp32_state_dict_from_zero_checkpoint(
                str(checkpoint), tag="engine", exclude_frozen_parameters=True
            )
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{checkpoint}/engine holds other things than weights, which can run code.") from error
    return {name.removeprefix("student."): tensor for name, tensor in weights.items() if name.startswith("student.")}


@contextmanager
def _nothing_is_run() -> Iterator[None]:
    """Within: `torch.load` reads weights only. DeepSpeed asks for more, and only torch's variable overrules it."""
    before = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        os.environ.pop(WEIGHTS_ONLY)
        if before is not None:
            os.environ[WEIGHTS_ONLY] = before
