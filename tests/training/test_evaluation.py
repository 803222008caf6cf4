"""Sample grids and hooks: what is drawn is what the pipeline draws."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from piflow.pipelines import PiDiTPipeline
from piflow.schedulers import FlowMapSDEScheduler
from piflow.training.config import LoggingConfig, TrainConfig
from piflow.training.data import build_loader, derive_seed
from piflow.training.errors import ConfigError
from piflow.training.evaluation import (
    SAMPLE_STREAM,
    Evaluation,
    grid,
    load_hooks,
    sample_student,
    spread_samples,
    unpacked,
)
from piflow.training.logging import RunLogger
from piflow.training.module import PiIDModule, build_module
from piflow.training.networks import TextCalls
from tests.pipelines.tiny import vae

TINY_DIT = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 1, "sample_size": 8,
    "num_embeds_ada_norm": 10, "norm_type": "ada_norm_zero", "patch_size": 2,
}  # fmt: skip


def recipe(nfe: int = 3, **logging: Any) -> TrainConfig:
    return TrainConfig.model_validate({
        "output_dir": "run",
        "iterations": 4,
        "teacher": {"kind": "dit", "random": TINY_DIT},
        "student": {"num_gaussians": 3},
        "distillation": {"nfe": nfe, "total_substeps": 24, "final_step_size_scale": 0.5},
        "data": {"kind": "random", "random": {"size": 40, "latents": [4, 8, 8], "num_classes": 10}},
        "logging": logging,
    })  # fmt: skip


def built(config: TrainConfig) -> PiIDModule:
    torch.manual_seed(0)
    return build_module(config).eval()


def dataset(config: TrainConfig) -> Any:
    return build_loader(config.data, 0, 1, 0, 0, 1).dataset


@pytest.mark.parametrize("nfe", [1, 3])
def test_samples_are_those_of_the_pipeline(nfe: int) -> None:
    config = recipe(nfe)
    module = built(config)
    batch = spread_samples(dataset(config), 5)
    drawn = sample_student(module, batch, seed=3)
    assert torch.equal(drawn, sample_student(module, batch, seed=3))
    assert not torch.equal(drawn, sample_student(module, batch, seed=4))
    pipe = PiDiTPipeline(
        transformer=module.student, vae=None, scheduler=FlowMapSDEScheduler(shift=1.0, final_step_size_scale=0.5)
    )
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = pipe(
        batch["class_labels"], num_inference_steps=nfe, latents=noise, total_substeps=24, output_type="latent"
    ).images
    torch.testing.assert_close(drawn, expected, atol=2e-3, rtol=1e-3)  # the scheduler may round to one substep more


def test_tokens_are_unpacked_as_they_are_packed() -> None:
    latents = torch.randn(2, 4, 6, 8)
    for channels in (16, 4):
        packed = TextCalls("flux", channels).state(latents)
        assert torch.equal(unpacked(packed, (4, 6, 8)), latents)


def test_samples_come_from_all_over_the_data() -> None:
    data = [{"class_labels": torch.tensor(n)} for n in range(40)]
    assert spread_samples(data, 4)["class_labels"].tolist() == [0, 10, 20, 30]
    assert spread_samples(data[:3], 9)["class_labels"].tolist() == [0, 1, 2]


def test_the_grid() -> None:
    images = torch.zeros(3, 3, 32, 48)
    images[0, 0], images[1, 1], images[2, 2] = 1, 2, 0.5  # red, more than green, half blue
    pixels = np.asarray(grid(images))
    assert pixels.shape == (2 * 64 + 2, 2 * 96 + 2, 3)  # twice as large, two pixels in between
    assert pixels[10, 10].tolist() == [255, 0, 0]
    assert pixels[10, 110].tolist() == [0, 255, 0]
    assert pixels[80, 10].tolist() == [0, 0, 128]
    assert pixels[80, 110].tolist() == pixels[65, 10].tolist() == pixels[10, 96].tolist() == [255, 255, 255]
    assert np.asarray(grid(torch.full((1, 1, 64, 64), float("nan")))).max() == 0


class Average:
    """The average of a trainer without an engine: counts how often it is put in."""

    def __init__(self) -> None:
        self.inside, self.times = False, 0

    @contextlib.contextmanager
    def swapped_in(self, engine: Any) -> Iterator[None]:
        self.inside, self.times = True, self.times + 1
        yield
        self.inside = False


def trainer_of(config: TrainConfig, rank: int = 0) -> Any:
    engine = SimpleNamespace(module=built(config), device=torch.device("cpu"))
    return SimpleNamespace(
        engine=engine, config=config, rank=rank, ema=Average(), progress=SimpleNamespace(iteration=0)
    )


CALLS: list[tuple[int, bool, bool]] = []


def hook(trainer: Any, iteration: int) -> Mapping[str, float]:
    CALLS.append((iteration, trainer.ema.inside, trainer.engine.module.student.training))
    return {"answer": 42 + iteration}


def run(config: TrainConfig, folder: Path, iterations: int, rank: int = 0) -> tuple[Any, dict[str, Any]]:
    trainer, seen = trainer_of(config, rank), {}
    evaluation = Evaluation(config.logging, folder / "pictures", rank)
    trainer.engine.module.student.train()
    with RunLogger(folder / "tensorboard", iterations, 0, 1, rank == 0) as logger:
        record = logger.scalars
        logger.scalars = lambda done, values: (seen.update({done: values}), record(done, values))  # type: ignore[method-assign,assign]
        for done in range(1, iterations + 1):
            trainer.progress.iteration = done
            evaluation.run(trainer, dataset(config), logger)
    return trainer, seen


def test_hooks_and_pictures_come_when_they_are_due(tmp_path: Path) -> None:
    CALLS.clear()
    vae().save_pretrained(tmp_path / "vae")
    config = recipe(samples_every=2, num_samples=3, vae=tmp_path / "vae", evaluate_every=3, hooks=[f"{__name__}:hook"])
    trainer, seen = run(config, tmp_path, 6)
    assert CALLS == [(3, True, False), (6, True, False)]
    assert seen == {3: {"eval/answer": 45.0}, 6: {"eval/answer": 48.0}}
    assert trainer.ema.times == 4
    assert trainer.engine.module.student.training
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in pictures] == ["samples_000002.png", "samples_000004.png", "samples_000006.png"]
    batch = spread_samples(dataset(config), 3)
    latents = sample_student(trainer.engine.module.eval(), batch, derive_seed(config.seed, SAMPLE_STREAM))
    with torch.no_grad():
        decoded = vae().decode(latents / 0.7 + 0.1).sample / 2 + 0.5
    difference = np.asarray(Image.open(pictures[0])).astype(int) - np.asarray(grid(decoded)).astype(int)
    assert abs(difference).max() <= 1


def test_only_the_first_rank_draws(tmp_path: Path) -> None:
    trainer, _ = run(recipe(samples_every=1, num_samples=2), tmp_path, 1, rank=1)
    assert trainer.ema.times == 1
    assert not (tmp_path / "pictures").exists()


def test_latents_without_a_vae_are_shown_in_false_colours(tmp_path: Path) -> None:
    run(recipe(samples_every=1, num_samples=2), tmp_path, 1)
    assert Image.open(tmp_path / "pictures" / "samples_000001.png").size == (2 * 64 + 2, 64)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no.such.module:f", "No module named 'no'"),
        ("math:no_such", "has no attribute 'no_such'"),
        ("math", "it has no colon"),
    ],
)
def test_hooks_that_do_not_exist(name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"logging.hooks: '{name}' is no package.module:function: .*{problem}"):
        load_hooks((name,))


def test_a_vae_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"logging.vae cannot be loaded: "):
        Evaluation(LoggingConfig(samples_every=1, vae=tmp_path), tmp_path)
