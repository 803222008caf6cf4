"""Text-to-image models of the real classes at tiny size in folders: bases with text encoders, adapters with LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from piflow.models.export import export_adapter
from tests.data.bases import SAVE
from tests.pipelines.tiny import flux2_base, flux_base, qwen_base, student_of

BASES: dict[str, Callable[[], Any]] = {"qwen_image": qwen_base, "flux": flux_base, "flux2": flux2_base}


def save_tiny(family: str, folder: Path, kind: str = "GM") -> tuple[str, str]:
    """Folders of a base model and of an adapter for it, whose LoRA and output layers both matter."""
    base, adapter = SAVE[family](folder / f"{family}-base"), folder / f"{family}-{kind}-adapter"
    student = student_of(BASES[family](), kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        student.add_adapter(
            LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False)
        )
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            parameter.data *= 10  # so that pictures show it
    policy = {"type": "GMFlow", "nfe": 4} if kind == "GM" else {"type": "DX", "segment_size": 1 / 3.5, "shift": 3.2}
    return str(base), str(export_adapter(student, BASES[family](), adapter, policy_config=policy))
