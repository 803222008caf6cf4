"""Folders of weights on disk: made before a job starts, read whole or not at all, moved aside but never deleted."""

from pathlib import Path
from typing import TypeVar

import torch
from diffusers import DiTTransformer2DModel

Network = TypeVar("Network", bound=DiTTransformer2DModel)

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


def make_folder(folder: Path) -> Path:
    """The folder, made with its parents where it is missing. Raises OSError that names it and says what to do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"{folder} cannot be a folder for the results ({error.strerror}): give another.") from error
    return folder


def move_aside(folder: Path) -> Path:
    """Rename `nfe1` to the first free of `nfe1.replaced.1`, `nfe1.replaced.2`, ...; returns the new path."""
    names = (folder.with_name(f"{folder.name}.replaced.{n}") for n in range(1, 10**6))
    return folder.rename(next(name for name in names if not name.exists()))


def load_network(kind: type[Network], folder: Path | str, what: str, remedy: str) -> Network:
    """The network in a diffusers folder: in evaluation mode, without gradients, float32 on the CPU.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the weights are damaged or not exactly those of config.json. Both name the file and the remedy.
    """
    folder = Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"No {what} in {folder}: {' and '.join(missing)} not found. {remedy}")
    try:
        model, found = kind.from_pretrained(
            folder, torch_dtype=torch.float32, low_cpu_mem_usage=False, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # diffusers, safetensors and json raise many kinds
        raise ValueError(
            f"The {what} in {folder} cannot be read ({type(error).__name__}: {error}). {remedy}"
        ) from error
    for keys, verdict in (
        (found["missing_keys"], "lacks"),
        (found["unexpected_keys"], "has, unknown to its config.json,"),
    ):
        if keys:
            raise ValueError(
                f"The {what} in {folder / WEIGHTS} {verdict} {len(keys)} tensors, {min(keys)} among them. {remedy}"
            )
    network: Network = model.eval().requires_grad_(False)
    return network
