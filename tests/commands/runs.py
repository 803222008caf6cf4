"""What a finished training of the digits leaves, without the minutes that it takes."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from piflow.digits.teacher import load_teacher
from piflow.models import GMDiTTransformer2DModelV2
from piflow.training.checkpoint import write_manifest
from piflow.training.config import TrainConfig

SETTINGS = {"nfe": 2, "total_substeps": 16, "shift": 1.5, "final_step_size_scale": 0.5}


def finished_run(folder: Path, world_size: int = 2) -> Path:
    """Configuration, one checkpoint with the average in padded shards of two ranks, and the exported student."""
    raw = {"output_dir": str(folder), "iterations": 2, "student": {"num_gaussians": 2}, "distillation": SETTINGS}
    config = TrainConfig.model_validate(raw)
    generator = torch.Generator().manual_seed(0)
    student = GMDiTTransformer2DModelV2.from_teacher(load_teacher(), num_gaussians=2, generator=generator)
    student.save_pretrained(folder / "student")
    (folder / "config.yaml").write_text(config.to_yaml())
    step = folder / "checkpoints" / "step_000002"
    (step / "engine").mkdir(parents=True)
    (step / "engine" / "states.pt").write_bytes(b"DeepSpeed's own")
    for rank in range(world_size):
        shards = {}
        for name, parameter in student.named_parameters():
            each = -(-parameter.numel() // world_size)
            padded = torch.nn.functional.pad(parameter.detach().flatten(), (0, world_size * each - parameter.numel()))
            shards[f"ema.{name}"] = padded[rank * each : (rank + 1) * each].clone()
        save_file(shards, step / f"rank_{rank}.safetensors")
    facts = {"iteration": 2, "position": 128, "loss": (0.25).hex(), "world_size": world_size}
    write_manifest(step, {**facts, "config": config.model_dump(mode="json")})
    (folder / "checkpoints" / "latest").write_text(step.name)
    return folder
