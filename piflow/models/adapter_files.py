"""A published pi-Flow adapter read from a folder or a Hugging Face repository.

    config.json                           `_class_name` of the student and everything to rebuild it
    diffusion_pytorch_model.safetensors   `<module>.lora_A.weight`, `<module>.lora_B.weight`, and whole weights of the
                                          output layers; or shards, which `...safetensors.index.json` lists

The weights' metadata may hold `policy_config`, and `lora_adapter_metadata` as diffusers and peft write it (both JSON).
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import file_exists, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from piflow.json_files import read_json_object

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLED = tuple(f"diffusion_pytorch_model.{suffix}" for suffix in ("bin", "pt", "pth", "ckpt"))

Fetch = Callable[[str], Path]
"""The path of a file of the adapter, by name. Raises FileNotFoundError."""


@dataclass(frozen=True)
class Adapter:
    """What the files of an adapter hold.

    `weights` are whole parameters of the student by name, `lora` the low-rank ones, `alphas` {module: alpha} and
    `lora_config` (keyword arguments of peft's LoraConfig) what the file says of their scale, if it does.
    """

    source: str
    config: dict[str, Any]
    weights: dict[str, Tensor]
    lora: dict[str, Tensor] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    lora_config: dict[str, Any] | None = None
    policy_config: dict[str, Any] | None = None


def read_adapter(
    path_or_repo: str | Path,
    *,
    subfolder: str | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Adapter:
    """The adapter in a local folder, or in the Hugging Face repository of that name.

    Args:
        allow_pickle: also take weights from a pickled file (read with `torch.load(weights_only=True)`).
        revision, token, cache_dir, local_files_only: as `huggingface_hub.hf_hub_download` takes them.

    Raises:
        FileNotFoundError: there is no such folder or repository, or a file of it is missing.
        ValueError: a file is damaged, or its weights are pickled.
    """
    folder = Path(path_or_repo) / (subfolder or "")
    if Path(path_or_repo).is_dir():
        source, fetch = str(folder), partial(_local_file, folder)
    elif Path(path_or_repo).is_file():
        raise ValueError(f"{path_or_repo} is a file: give the folder that holds it, with {CONFIG} beside it.")
    else:
        hub = {"subfolder": subfolder, "revision": revision, "token": token}
        here = {"cache_dir": cache_dir, "local_files_only": local_files_only}
        source = "/".join(filter(None, (str(path_or_repo), subfolder)))
        fetch = partial(_hub_file, str(path_or_repo), {**hub, **here})

    config = read_json_object(fetch(CONFIG))
    if not isinstance(config.get("_class_name"), str):
        raise ValueError(f"{source}/{CONFIG}: expected a `_class_name`, the class of the student; it has none.")
    if files := _weight_files(fetch):
        tensors, metadata = _read_weights(files)
    else:
        name = _pickled_name(path_or_repo, subfolder, revision, token, local_files_only)
        if name is None:
            raise FileNotFoundError(f"{source} has neither {WEIGHTS} nor {INDEX}: it is no pi-Flow adapter.")
        if not allow_pickle:
            raise ValueError(
                f"{source} has its weights in {name}, a pickled file, which can run code when it is read: only "
                "safetensors are. Convert it, or pass allow_pickle=True if you trust where it comes from."
            )
        tensors, metadata = _read_pickled(fetch(name)), {}
    if several := next((k for k, v in tensors.items() if k.endswith(".alpha") and v.numel() != 1), None):
        raise ValueError(f"{source}: {several}: expected one number, got {tuple(tensors[several].shape)}.")
    is_lora = {name: ".lora_" in name for name in tensors}
    return Adapter(
        source=source,
        config=config,
        weights={k: v for k, v in tensors.items() if not is_lora[k] and not k.endswith(".alpha")},
        lora={k: v for k, v in tensors.items() if is_lora[k]},
        alphas={k.removesuffix(".alpha"): float(v) for k, v in tensors.items() if k.endswith(".alpha")},
        lora_config=_json_metadata(metadata, "lora_adapter_metadata", source),
        policy_config=_json_metadata(metadata, "policy_config", source),
    )


def _local_file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {name}." if folder.is_dir() else f"There is no folder {folder}.")
    return path


def _hub_file(repo: str, options: dict[str, Any], name: str) -> Path:
    try:
        return Path(hf_hub_download(repo, name, **options))
    except HFValidationError as error:
        raise FileNotFoundError(
            f"There is no folder {repo}, and it is no name of a Hugging Face repository."
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"There is no folder {repo}; as a Hugging Face repository, its {name} is not in the cache and cannot be "
            "downloaded. Check the name and the connection."
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"The Hugging Face repository {repo} has no {name}.") from error
    except (HfHubHTTPError, OSError) as error:  # no such repository or revision, gated, no connection
        problem = str(error).strip().splitlines() or [type(error).__name__]
        raise FileNotFoundError(
            f"There is no folder {repo}, and the Hugging Face repository cannot be read: {problem[0]}"
        ) from error


def _weight_files(fetch: Fetch) -> list[Path]:
    """The safetensors file, or all shards of the index; none where there is neither."""
    try:
        return [fetch(WEIGHTS)]
    except FileNotFoundError:
        pass
    try:
        index = fetch(INDEX)
    except FileNotFoundError:
        return []
    shards = read_json_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index}: expected a `weight_map`, {{tensor: file}}.")
    return [fetch(name) for name in sorted(set(shards.values()))]


def _read_weights(files: list[Path]) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
                metadata |= file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short ({error}). Copy or download it again.") from error
    return tensors, metadata


def _pickled_name(
    path_or_repo: str | Path, subfolder: str | None, revision: str | None, token: str | bool | None, offline: bool
) -> str | None:
    """The name of a pickled weights file that is there instead, which is not downloaded to find out."""
    if Path(path_or_repo).is_dir():
        return next((name for name in PICKLED if (Path(path_or_repo) / (subfolder or "") / name).is_file()), None)
    if offline:
        return None
    prefix = f"{subfolder}/" if subfolder else ""
    there = partial(file_exists, str(path_or_repo), revision=revision, token=token)
    return next((name for name in PICKLED if there(prefix + name)), None)


def _read_pickled(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} cannot be read as weights ({str(error).splitlines()[0]}).") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{file}: expected a dictionary of tensors.")
    return content


def _json_metadata(metadata: dict[str, str], key: str, source: str) -> dict[str, Any] | None:
    if key not in metadata:
        return None
    try:
        content = json.loads(metadata[key])
    except ValueError as error:
        raise ValueError(f"{source}: {key} in the weights' metadata is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{source}: {key} in the weights' metadata: expected a JSON object, got {content!r}.")
    return content
