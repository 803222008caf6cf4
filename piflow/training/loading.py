"""A sharded safetensors base into ZeRO-3 partitions: no rank ever holds more than its share and one block.

    transformer = load_partitioned(QwenImageTransformer2DModel, "Qwen/Qwen-Image", subfolder="transformer",
                                   dtype=torch.bfloat16, config_dict_or_path=deepspeed_config(config))

The network is built without weights. Then, block by block, rank 0 reads the block's tensors, DeepSpeed broadcasts them
and each rank keeps its part. Only rank 0 touches the files, and it looks at all of them before anything is allocated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from piflow.training.errors import ConfigError

Network = TypeVar("Network", bound=nn.Module)
STEMS = ("diffusion_pytorch_model", "model")  # what diffusers and transformers call their weights
NAMED = 5  # keys that an error lists


@dataclass(frozen=True)
class BaseFiles:
    """What a folder holds: its configuration, and the file and shape of each tensor."""

    folder: Path
    config: dict[str, Any]
    file_of: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]


def load_partitioned(
    cls_or_module: type[Network] | Network,
    folder: str | Path,
    *,
    dtype: torch.dtype,
    config_dict_or_path: dict[str, Any] | str,
    subfolder: str | None = None,
    revision: str | None = None,
) -> Network:
    """A network whose parameters are ZeRO-3 partitions of the weights in `folder`; collective.

    Without a process group it joins one, as a world of one where no launcher started it.

    Args:
        cls_or_module: a diffusers class, built from the folder's config.json; or a module, of which the parameters on
            the meta device are filled and the others stay as they are.
        folder: a diffusers folder (config.json and *.safetensors, with an index where there are several), or the name
            of a repository on the hub, which rank 0 downloads.
        dtype: of the parameters; tensors of the files are converted.
        config_dict_or_path: DeepSpeed's settings, as the engine will get them.
        subfolder: of the folder or the repository.
        revision: branch, tag or commit of the repository.

    Raises:
        ConfigError: on every rank alike, before anything is allocated: files that are missing, truncated or no
            safetensors; parameters that are missing, unexpected or of another shape than the network's.
    """
    if not dist.is_initialized():
        from piflow.training.engine import prepare_process

        prepare_process()
    files, problem = None, None
    if dist.get_rank() == 0:
        try:
            files = survey(local_folder(folder, subfolder, revision))
        except ConfigError as error:
            problem = str(error)
    config, shapes, problem = from_rank_0((files.config, files.shapes, None) if files else ({}, {}, problem))
    if problem:
        raise ConfigError(problem)

    if isinstance(cls_or_module, type):
        module = cast(Network, on_meta(cls_or_module, config))
        nn.Module.to(module, dtype)
    else:
        module = cls_or_module
    check_keys(module, shapes, str(folder))
    _load_buffers(module, files, shapes)

    def read(names: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        assert files is not None
        return read_tensors(files, names)

    return partition(module, read, dtype=dtype, config_dict_or_path=config_dict_or_path)


def partition(
    module: Network,
    values: Callable[[Mapping[str, nn.Parameter]], Mapping[str, Tensor]],
    *,
    dtype: torch.dtype,
    config_dict_or_path: dict[str, Any] | str,
) -> Network:
    """Give the parameters on the meta device values, and every parameter its partition, block by block; collective.

    `values` gets {name: parameter} of one block, on rank 0 only, and returns the tensor of each name, in any dtype and
    on any device. What it raises of ConfigError, OSError and SafetensorError is a ConfigError on every rank.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    device = torch.device(get_accelerator().current_device_name())
    for path, unit in units(module):
        empty = {name: p for name, p in unit.named_parameters(prefix=path) if p.is_meta}
        filled, problem = {}, None
        if dist.get_rank() == 0:
            try:
                filled = {name: tensor.to(device, dtype) for name, tensor in values(empty).items()} if empty else {}
            except (ConfigError, OSError, SafetensorError) as error:
                problem = f"The weights of {path or 'the network'} cannot be read: {error}"
        if problem := from_rank_0(problem):  # before the broadcast, in which the others would wait without end
            raise ConfigError(problem)
        for name, parameter in empty.items():
            value = filled.pop(name) if filled else torch.empty(parameter.shape, dtype=dtype, device=device)
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner).register_parameter(leaf, nn.Parameter(value, parameter.requires_grad))
        deepspeed.zero.Init(module=unit, config_dict_or_path=config_dict_or_path)
    return module


def on_meta(cls: type[nn.Module], config: Mapping[str, Any]) -> nn.Module:
    """`cls` of a diffusers configuration with parameters on the meta device and real buffers.

    Raises ConfigError for the configuration of another class.
    """
    from accelerate import init_empty_weights

    written_for = config.get("_class_name")
    if written_for and written_for not in [base.__name__ for base in cls.__mro__]:
        raise ConfigError(
            f"The base is a {written_for}, this recipe needs a {cls.__name__}. Give the folder of such a network."
        )
    with init_empty_weights(include_buffers=False):
        return cast(Any, cls).from_config(dict(config))


def units(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, submodule) of what is partitioned at once: the blocks of every list, and what is beside the lists."""
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        holds_blocks = any(isinstance(m, nn.ModuleList) for m in child.modules())
        if holds_blocks and not isinstance(module, nn.ModuleList):
            yield from units(child, below)
        else:
            yield below, child
    if module._parameters or not path:
        yield path, module


def local_folder(
    source: str | Path, subfolder: str | None = None, revision: str | None = None, *, weights: bool = True
) -> Path:
    """The folder that `source` names; a repository on the hub (owner/name, or owner/name/subfolder) is downloaded, with
    `weights=False` its configuration only. Raises ConfigError without one.
    """
    if Path(source).is_dir():
        return Path(source) / (subfolder or "")
    owner, name, *rest = [*str(source).split("/"), "", ""][: max(2, str(source).count("/") + 1)]
    if isinstance(source, Path) or not owner or not name or owner in (".", "..", "~"):
        raise ConfigError(
            f"There is no folder {source} (looked from {Path.cwd()}). "
            "Give a folder, or a repository on the hub as owner/name."
        )
    below = "/".join([*rest, *filter(None, [subfolder])])
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ("config.json", "*.safetensors", "*.safetensors.index.json") if weights else ("config.json",)
    patterns = [f"{below}/{file}".lstrip("/") for file in wanted]
    try:
        return Path(snapshot_download(f"{owner}/{name}", revision=revision, allow_patterns=patterns)) / below
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"There is no folder {source}, and it cannot be had from the hub: {str(error).strip().splitlines()[0]} "
            "Check the name, the network and your access, or download it and give the folder."
        ) from error


def survey(folder: Path) -> BaseFiles:
    """Look at every file of a diffusers folder, reading headers only. Raises ConfigError that names what is wrong."""
    config = _read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    weights = _weight_files(folder)
    file_of: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file, listed in weights.items():
        try:
            with safe_open(file, "pt") as opened:
                found = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise ConfigError(f"{folder} is incomplete: {file.name} is missing. Download it again.") from None
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{file} has {file.stat().st_size} bytes and is truncated or damaged: {error}. Download it again."
            ) from error
        if lacking := sorted((listed or set()) - found.keys()):
            raise ConfigError(f"{file} lacks {_some(lacking)}, which the index places there. Download it again.")
        for key in found if listed is None else listed:
            file_of[key], shapes[key] = file, found[key]
    return BaseFiles(folder, config, file_of, shapes)


def read_tensors(files: BaseFiles, names: Mapping[str, Any]) -> dict[str, Tensor]:
    """{name: tensor} of the files, in their dtype. Each file stays mapped only as long as one of its tensors lives."""
    tensors: dict[str, Tensor] = {}
    for file in sorted({files.file_of[name] for name in names}):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in names if files.file_of[name] == file}
    return tensors


def check_keys(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """ConfigError unless the files hold the parameters on the meta device, in their shapes, and nothing unknown."""
    known = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    needed = {name: tuple(p.shape) for name, p in module.named_parameters() if p.is_meta}
    filled = needed | {name: tuple(buffer.shape) for name, buffer in module.named_buffers()}
    problems = []
    if missing := sorted(needed.keys() - shapes.keys()):
        problems.append(f"{_some(missing)} missing in the files")
    if unexpected := sorted(shapes.keys() - known):
        problems.append(f"{_some(unexpected)} unknown to the network")
    if wrong := [
        f"{name} is {list(shape)} in the files and {list(filled[name])} in the network"
        for name, shape in shapes.items()
        if name in filled and shape != filled[name]
    ]:
        problems.append(_some(wrong, "; "))
    if problems:
        raise ConfigError(
            f"The weights in {source} do not fit a {type(module).__name__}: {'; '.join(problems)}. "
            "Give the folder of this network, with the config.json that belongs to its weights."
        )


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _load_buffers(module: nn.Module, files: BaseFiles | None, shapes: Mapping[str, Any]) -> None:
    """Buffers that the files hold; they are small and stay whole."""
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in shapes}
    tensors = from_rank_0(read_tensors(files, buffers) if files else None)
    for name, buffer in buffers.items():
        buffer.data.copy_(tensors[name])


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """{file: keys that the index places there, or None without an index}."""
    names = [name for stem in STEMS for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors")]
    name = next((name for name in names if (folder / name).is_file()), None)
    if name is None:
        found = sorted(p.name for p in folder.glob("*.safetensors*"))
        if len(found) != 1:
            has = (
                f"it holds {_some(found)}"
                if found
                else f"{folder} {'is empty of' if folder.is_dir() else 'lacks'} them"
            )
            raise ConfigError(f"There are no weights {' or '.join(names[:2])} in {folder}: {has}. Give their folder.")
        name = found[0]
    if not name.endswith(".index.json"):
        return {folder / name: None}
    index = _read_json(folder / name).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise ConfigError(f"{folder / name} has no weight_map of file names. Download it again.")
    files: dict[Path, set[str] | None] = {folder / file: set() for file in index.values()}
    for key, file in index.items():
        cast(set[str], files[folder / file]).add(key)
    return files


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, OSError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}. Download it again.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no JSON object. Download it again.")
    return content


def _some(items: list[str], separator: str = ", ") -> str:
    more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return separator.join(items[:NAMED]) + more
