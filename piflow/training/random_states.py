"""The generators of a process, begun anew, kept and put back."""

from __future__ import annotations

import json
import random

import numpy as np
import torch
from torch import Tensor


def seed_everything(seed: int) -> None:
    """Begin all generators of this process anew."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


def random_states() -> tuple[dict[str, Tensor], dict[str, str]]:
    """The generators of torch, CUDA, numpy and Python as tensors and JSON text, for a safetensors file."""
    tensors = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - libraries draw from the global one
    return tensors, {
        "numpy": json.dumps([name, np.asarray(keys).tolist(), *rest]),
        "python": json.dumps(random.getstate()),
    }


def restore_random_states(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """The inverse of `random_states`."""
    torch.set_rng_state(tensors["rng.torch"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    name, keys, *rest = json.loads(metadata["numpy"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss = json.loads(metadata["python"])
    random.setstate((version, tuple(internal), gauss))
