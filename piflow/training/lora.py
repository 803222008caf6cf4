"""Low-rank updates (LoRA, arXiv 2106.09685) on a student that shares its teacher's layers."""

from __future__ import annotations

import difflib
import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Generator, Tensor, nn

from piflow.training.config import LoRAConfig
from piflow.training.errors import ConfigError

HEAD = ("norm_out", "proj_out")
"""What the names of a student's own output layers begin with: they are trained whole."""


def add_lora(student: Any, config: LoRAConfig) -> None:
    """Wrap the target layers; what is added lies on the meta device until `fill_lora` or a loader gives it values.

    A layer that the student shares with its teacher is wrapped for both: `lora_disabled` makes the teacher of it.
    Raises ConfigError for a target that matches no linear layer.
    """
    from peft import inject_adapter_in_model

    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,
        lora_dropout=config.dropout,
        target_modules=target_layers(student, config.targets),
    )
    student._hf_peft_config_loaded = True  # as diffusers' add_adapter, which would allocate the weights at once
    inject_adapter_in_model(settings, student, low_cpu_mem_usage=True)


def target_layers(network: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Full paths of the linear layers, outside the head, whose path is a target or ends with one after a dot."""
    layers = [
        path for path, module in network.named_modules() if isinstance(module, nn.Linear) and not path.startswith(HEAD)
    ]
    for target in targets:
        if not any(_ends_with(path, target) for path in layers):
            kinds = sorted({_without_index(path) for path in layers})
            nearest = difflib.get_close_matches(target, kinds, n=3, cutoff=0.3) or kinds[:5]
            raise ConfigError(
                f"student.lora.targets: `{target}` is the end of no linear layer's name in a {type(network).__name__} "
                f"(its head apart, which is trained whole). Near it are {', '.join(nearest)}."
            )
    return [path for path in layers if any(_ends_with(path, target) for target in targets)]


def fill_lora(student: nn.Module, seed: int) -> None:
    """Give the added weights that are on the meta device their initial values."""
    empty = {name: p for name, p in student.named_parameters() if p.is_meta and ".lora_" in name}
    for name, value in lora_values(empty, seed).items():
        owner, _, leaf = name.rpartition(".")
        student.get_submodule(owner).register_parameter(leaf, nn.Parameter(value))


def lora_values(parameters: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Initial value of each parameter {name: of that shape}: lora_A as nn.Linear begins, lora_B zero: no update.

    A function of (name, shape, seed) alone, so that parameters may be asked for in any order, and in parts.
    """
    values = {}
    for name, parameter in parameters.items():
        values[name] = torch.zeros(parameter.shape)
        if ".lora_A." in name:
            path = name.removeprefix("student.")  # of the root module
            generator = Generator().manual_seed(seed ^ zlib.crc32(path.encode()))
            nn.init.kaiming_uniform_(values[name], a=math.sqrt(5), generator=generator)
    return values


@contextmanager
def lora_disabled(network: nn.Module) -> Iterator[None]:
    """Within, the network computes without its low-rank updates.

    Only the flag is set: peft's own `enable_adapters` also changes requires_grad, which ZeRO-3 reads once.
    """
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapter_weights(weights: Mapping[str, Tensor], config: LoRAConfig) -> dict[str, Tensor]:
    """A trained student's {name: tensor} in the published format: alpha = rank, no name of the adapter."""
    scale = 1.0 if config.alpha is None else config.alpha / config.rank
    plain = {name.replace(".default.weight", ".weight"): tensor for name, tensor in weights.items()}
    return {name: tensor * scale if ".lora_B." in name else tensor for name, tensor in plain.items()}


def _ends_with(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _without_index(path: str) -> str:
    """`transformer_blocks.7.attn.to_q` -> `attn.to_q`."""
    parts = path.split(".")
    return ".".join(parts[2:]) if len(parts) > 2 and parts[1].isdigit() else path
