"""The root module: teachers and labels that do not fit the data are named before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel

from piflow.models import GMDiTTransformer2DModelV2
from piflow.training.config import TrainConfig
from piflow.training.errors import ConfigError
from piflow.training.module import build_module

DIGITS = {"in_channels": 1, "sample_size": 8, "num_embeds_ada_norm": 10}


def tiny(**settings: Any) -> DiTTransformer2DModel:
    return DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, **{**DIGITS, **settings})


def config_for(teacher: Path, kind: str = "digits") -> TrainConfig:
    settings = {"kind": kind, "path": teacher}
    distillation = {"total_substeps": 4}
    return TrainConfig.model_validate(
        {"output_dir": "run", "iterations": 1, "teacher": settings, "distillation": distillation}
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_embeds_ada_norm": 5}, r"5 classes \(num_embeds_ada_norm\), the data 10"),
        ({"in_channels": 3}, r"3 input channels \(in_channels\), the data 1"),
        ({"out_channels": 2}, r"2 output channels \(out_channels\), the data 1"),
        ({"sample_size": 16}, r"16 pixels a side \(sample_size\), the data 8"),
    ],
)
def test_a_teacher_of_other_data_is_named(settings: dict[str, int], message: str, tmp_path: Path) -> None:
    tiny(**settings).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        build_module(config_for(tmp_path))


@pytest.mark.parametrize("kind", ["digits", "dit"])
def test_a_student_is_no_teacher(kind: str, tmp_path: Path) -> None:
    GMDiTTransformer2DModelV2.from_teacher(tiny(), num_gaussians=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="holds a GMDiTTransformer2DModelV2, not a DiTTransformer2DModel"):
        build_module(config_for(tmp_path, kind))


@pytest.mark.parametrize("label", [-1, 10, 11])
def test_training_labels_are_classes(label: int, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    module = build_module(config_for(tmp_path))
    batch = {"latents": torch.zeros(2, 1, 8, 8), "class_labels": torch.tensor([0, label])}
    with pytest.raises(ValueError, match=f"class label {label} is out of range: data has 0 to 9"):
        module(batch, 0, torch.Generator())
