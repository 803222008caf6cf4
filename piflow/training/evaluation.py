"""What is done with the averaged student now and then: sample pictures, and hooks of the user's own.

A hook is any function (trainer, iteration) -> {name: number}, named "package.module:function" in `logging.hooks`. It
is called on every rank, with the averaged weights in `trainer.engine.module.student`; where it calls the student, it
must do so equally often on every rank. Rank 0's numbers are recorded as `eval/<name>`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Generator, Tensor

from piflow.distillation import SourceTimes
from piflow.noise_schedule import segments
from piflow.policies import resolve_temperature
from piflow.training.config import LoggingConfig
from piflow.training.data import LatentDataset, collate, derive_seed
from piflow.training.errors import ConfigError
from piflow.training.logging import RunLogger

if TYPE_CHECKING:
    from piflow.training.loop import Trainer

Hook = Callable[["Trainer", int], Mapping[str, float]]

SAMPLE_STREAM = 4  # of random numbers
SMALLEST_SIDE = 64  # pixels of a picture in a grid; smaller ones are enlarged


class Evaluation:
    """Samples and hooks of a run; rank 0 writes `samples_<iteration>.png` to `pictures`.

    Raises ConfigError for a hook or a VAE that cannot be loaded.
    """

    def __init__(self, config: LoggingConfig, pictures: Path, rank: int = 0) -> None:
        self.config, self.pictures = config, pictures
        self.hooks = load_hooks(config.hooks)
        self.vae = _load_vae(config.vae) if config.vae and config.samples_every and rank == 0 else None

    def run(self, trainer: Trainer, dataset: Any, logger: RunLogger) -> None:
        """Whatever is due at the trainer's iteration; the samples have conditions of `dataset`. Collective."""
        done, config = trainer.progress.iteration, self.config
        draw = config.samples_every and done % config.samples_every == 0
        evaluate = self.hooks and config.evaluate_every and done % config.evaluate_every == 0
        if not draw and not evaluate:
            return
        student = trainer.engine.module.student
        training = student.training
        with trainer.ema.swapped_in(trainer.engine), torch.no_grad():
            student.eval()
            if draw:
                self._draw(trainer, dataset, logger)
            if evaluate:
                for hook in self.hooks.values():
                    values = hook(trainer, done)
                    logger.scalars(done, {f"eval/{name}": float(value) for name, value in values.items()})
            student.train(training)

    def _draw(self, trainer: Trainer, dataset: Any, logger: RunLogger) -> None:
        module, device, done = trainer.engine.module, trainer.engine.device, trainer.progress.iteration
        batch = spread_samples(dataset, self.config.num_samples)
        batch = {name: value.to(device) for name, value in batch.items()}
        latents = sample_student(module, batch, derive_seed(trainer.config.seed, SAMPLE_STREAM))
        if trainer.rank == 0:
            picture = grid(self._images(latents.float()))
            self.pictures.mkdir(parents=True, exist_ok=True)
            picture.save(self.pictures / f"samples_{done:06d}.png")
            logger.picture(done, "samples", picture)

    def _images(self, latents: Tensor) -> Tensor:
        """(N, 1 or 3, H, W) in [0, 1]: decoded, as they are in pixel space, or three channels in false colours."""
        if self.vae is not None:
            from piflow.data.latents import decode

            self.vae.to(latents.device)
            images = torch.cat([decode(self.vae, one[None]) for one in latents])
            self.vae.to("cpu")
            return images.cpu() / 2 + 0.5
        latents = latents.cpu()
        if latents.shape[1] in (1, 3):
            return latents / 2 + 0.5
        channels = latents[:, :3].expand(-1, 3, -1, -1) if latents.shape[1] == 2 else latents[:, :3]
        return channels / 6 + 0.5  # three standard deviations


def spread_samples(dataset: Any, count: int) -> dict[str, Tensor]:
    """A batch of `count` samples from all over a dataset of piflow.training.data, always the same."""
    count = min(count, len(dataset))
    indices = [n * len(dataset) // count for n in range(count)]
    samples = [dataset[(index, index) if isinstance(dataset, LatentDataset) else index] for index in indices]
    return collate([s if isinstance(s, dict) else dict(zip(("latents", "class_labels"), s)) for s in samples])


@torch.no_grad()
def sample_student(module: Any, batch: dict[str, Tensor], seed: int) -> Tensor:
    """Latents (B, C, H, W) float32 of a PiIDModule's student for the conditions of a batch, as its recipe samples."""
    config, schedule, calls = module.config, module.schedule, module.calls
    condition, _ = calls.conditions(batch)
    first = next(iter(condition.values()))
    shape = tuple(batch["latents"].shape[1:]) if "latents" in batch else tuple(config.latent_shape)
    noise = torch.randn(len(first), *shape, generator=Generator().manual_seed(seed))
    x = calls.state(noise).to(first.device)
    seq_len = calls.seq_len(x)
    # As the pipelines do: class-conditional students are sampled as they were trained.
    temperature = None if "class_labels" in batch else resolve_temperature("auto", config.nfe)
    steps = segments(config.nfe, config.final_step_size_scale)
    for index, (raw_t, size) in enumerate(steps):
        start, end = (
            torch.full((len(first),), t) for t in (raw_t, steps[index + 1][0] if index + 1 < len(steps) else 0.0)
        )
        source = SourceTimes(start, schedule.sigma(start, seq_len), torch.full_like(start, size))
        policy = module.policy(x, source, condition, (shape[1], shape[2]))
        if index + 1 < len(steps):
            policy = policy.with_temperature(temperature)
        x = policy.integrate(x, start, end, schedule, config.total_substeps, seq_len)
    return x.float() if x.dim() == 4 else unpacked(x.float(), shape)


def unpacked(tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Latents (B, C, H, W) of tokens (B, T, C p) with channel index c p + sub-pixel, shape being (C, H, W)."""
    (channels, height, width), (batch, count, _) = shape, tokens.shape
    side = math.isqrt(height * width // count)
    pixels = tokens.reshape(batch, height // side, width // side, channels, side, side)
    return pixels.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def grid(images: Tensor) -> Image.Image:
    """One picture of images (N, 1 or 3, H, W) in [0, 1], row by row; small ones are enlarged."""
    enlarge = max(-(-SMALLEST_SIDE // min(images.shape[2:])), 1)
    images = images.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3).expand(-1, 3, -1, -1)
    number, _, height, width = images.shape
    columns = math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    canvas = torch.ones(3, rows * (height + 2) - 2, columns * (width + 2) - 2)
    for n, image in enumerate(images):
        top, left = n // columns * (height + 2), n % columns * (width + 2)
        canvas[:, top : top + height, left : left + width] = image
    pixels = (canvas.nan_to_num(0).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def load_hooks(names: tuple[str, ...]) -> dict[str, Hook]:
    """{name: function} of "package.module:function" each. Raises ConfigError that says what is missing."""
    hooks = {}
    for name in names:
        module, separator, function = name.partition(":")
        try:
            hooks[name] = getattr(import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            problem = str(error) if separator else "it has no colon"
            raise ConfigError(f"logging.hooks: {name!r} is no package.module:function: {problem}.") from error
    return hooks


def _load_vae(path: Path) -> Any:
    from piflow.data.latents import load_vae

    try:
        return load_vae(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"logging.vae cannot be loaded: {str(error).splitlines()[0]}") from error
