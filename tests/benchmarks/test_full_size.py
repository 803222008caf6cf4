"""The benchmark at full size, on two narrow blocks: the same code."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.full_size import ROOT, recipe, result_file
from piflow.models.heads import head_modules
from piflow.training.calls import as_batch
from piflow.training.config import load_config
from piflow.training.data import build_loader
from piflow.training.evaluation import sample_student
from piflow.training.launch import launcher_environment
from piflow.training.module import build_module
from piflow.training.plan import build
from piflow.training.teachers import build_teacher
from tests.processes import no_shared_memory_left


@pytest.mark.launcher
def test_the_tiny_scale_measures_every_part(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.full_size", "--scale", "tiny", "--steps", "1", "--json", str(file)]
    with no_shared_memory_left():
        done = subprocess.run(
            command, env=launcher_environment(), stdout=subprocess.PIPE, text=True, check=True, timeout=180
        )
    content = json.loads(file.read_text())
    result = content["full_size"]
    assert content["machine"]["torch"]
    assert result["share"].keys() == {"student", "teacher", "policy", "optimiser", "rest"}
    assert all(0 < share < 1 for share in result["share"].values())
    assert sum(result["share"].values()) == pytest.approx(1)
    assert 0 < result["seconds_per_step"] < result["seconds_in_all"]
    assert all(math.isfinite(loss) for loss in result["losses"])
    assert len(result["losses"]) == 2
    assert "s a step of 4 segments and 2 images" in done.stdout


def test_the_full_scale_is_the_published_recipe_at_full_size(tmp_path: Path) -> None:
    config = recipe("full", 2, str(tmp_path))
    module = build(config)
    assert sum(p.numel() for p in module.parameters() if not p.requires_grad) == 20_430_401_088
    assert config.student.lora is not None
    assert config.student.lora.rank == 256
    assert config.distillation.data_free
    assert config.distillation.latent_shape == (16, 128, 128)
    assert config.precision == "bfloat16"
    assert config.accumulation(1) == 1


def test_results_lie_beside_those_of_the_same_gpu() -> None:
    assert result_file("NVIDIA H200").parts[-3:] == ("results", "nvidia-h200", "full_size.json")


class AnotherDevice(TorchDispatchMode):
    """Tensors of the meta device stand for those of a GPU: they mix with no others, and nothing can be read of them.

    What meta tensors would let pass and CUDA does not: a generator of the CPU that draws into them.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        generator = (kwargs or {}).get("generator")
        result = func(*args, **(kwargs or {}))
        if generator is not None and isinstance(result, Tensor) and result.device != generator.device:
            raise RuntimeError(f"Expected a '{result.device}' device type for generator but found '{generator.device}'")
        return result


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs/tiny").glob("*/*.yaml")), ids=lambda f: f"{f.parent.name}-{f.stem}"
)
def test_a_step_runs_on_another_device_than_its_draws_and_waits_for_nothing(file: Path) -> None:
    config = load_config(file, ["precision=bfloat16"])
    loader = build_loader(config.data, 0, 2, 0, 0, 1)
    batch = {name: value.to("meta") for name, value in as_batch(next(iter(loader))).items()}
    free = config.distillation.data_free
    with AnotherDevice():
        teacher = build_teacher(config, meta=True)  # a class-conditional one has values, and goes to a GPU when built
        module = build_module(config, teacher, fill=False).to("meta", torch.bfloat16).train()
        generator, x_src = Generator().manual_seed(0), None
        for segment in range(config.distillation.nfe) if free else [None]:
            loss = module(batch, 0, generator, segment, x_src)
            loss.backward()
            assert module.last is not None
            x_src = module.last.x_dst
        sample = sample_student(module, batch, seed=0)
    assert loss.is_meta
    assert sample.is_meta
    assert all(p.grad is not None for layer in head_modules(module.student) for p in layer.parameters())
