"""Training data whose order is a function of (seed, position): the resume state is one integer at any world size.

Shards that are left out change the order, not the rule. A batch is a dict of tensors, of which a kind of data has some:

    latents (B, C, *S) float32      class_labels (B,) int64
    prompt_embeds (B, L, D)         prompt_mask (B, L) bool, False where a shorter prompt is padded with zeros
    pooled (B, P)
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from piflow.data.shards import COMMANDS, Kind, Sample, ShardedDataset, ShardError, check_shards, read_index
from piflow.training.config import DataConfig, RandomDataConfig
from piflow.training.errors import ConfigError, TrainingError
from piflow.training.signals import STOP_SIGNALS

RANDOM_STREAM, LATENT_STREAM = 2, 3  # of random numbers; 1 is the training loop's

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataFormat:
    """What the samples hold: shape of the latents (C, *S), number of classes, widths of the text embeddings.

    None where there are none. `prompt_length` is the largest number of tokens of any prompt.
    """

    latents: tuple[int, ...] | None = None
    num_classes: int | None = None
    prompt_length: int | None = None
    prompt_width: int | None = None
    pooled_width: int | None = None


class DigitsDataset(Dataset[tuple[Tensor, Tensor]]):
    """(image (1, 8, 8) float32 in [-1, 1], label () int64) for each of scikit-learn's 1797 digits."""

    def __init__(self) -> None:
        from piflow.digits.data import load_digits_images

        self.images, self.labels = load_digits_images()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


class RandomDataset(Dataset[Sample]):
    """Samples of the given shapes, each a function of (seed, index)."""

    def __init__(self, config: RandomDataConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def __len__(self) -> int:
        return self.config.size

    def __getitem__(self, index: int) -> Sample:
        config, generator = self.config, Generator().manual_seed(derive_seed(self.seed, RANDOM_STREAM, index))
        sample = {}
        if config.latents:
            sample["latents"] = torch.randn(config.latents, generator=generator)
        if config.num_classes:
            sample["class_labels"] = torch.randint(config.num_classes, (), generator=generator)
        if config.prompt_width:
            length = int(torch.randint(1, config.prompt_length + 1, (), generator=generator))
            sample["prompt_embeds"] = torch.randn(length, config.prompt_width, generator=generator)
        if config.pooled_width:
            sample["pooled"] = torch.randn(config.pooled_width, generator=generator)
        return sample


class LatentDataset(Dataset[Sample]):
    """Latents drawn from the posteriors that a folder of shards holds, with their classes or their captions.

    Keys are (index, n), n the position in the global stream, of which the draw is a function: each epoch has its own.
    prompts: embeddings of the same source; images and prompts that lack the other are left out.
    """

    def __init__(self, images: ShardedDataset, prompts: ShardedDataset | None, seed: int) -> None:
        self.images, self.prompts, self.seed = images, prompts, seed
        self.pairs: Tensor | None = None  # (N, 2): places in `images` and in `prompts`
        if prompts is not None:
            places = prompts.sources()
            here = images.sources()
            nearest = torch.searchsorted(places, here).clamp(max=len(places) - 1)
            found = (places[nearest] == here).nonzero()[:, 0]
            self.pairs = torch.stack([found, nearest[found]], dim=1)
            if not len(found):
                raise ShardError(
                    f"no image of {images.folder} has its caption in {prompts.folder}: both must come from one JSONL"
                )

    def __len__(self) -> int:
        return len(self.images) if self.pairs is None else len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, n = key
        text: Sample = {}
        if self.prompts is not None and self.pairs is not None:
            index, prompt = self.pairs[index].tolist()
            text = self.prompts[prompt]
        sample = self.images[index]
        mean, std = sample.pop("mean").float(), sample.pop("std").float()
        noise = torch.randn(mean.shape, generator=Generator().manual_seed(derive_seed(self.seed, LATENT_STREAM, n)))
        return {"latents": mean + std * noise, **sample, **text}


def derive_seed(*parts: int) -> int:
    """One 64-bit seed from several non-negative integers; different tuples give independent streams."""
    return int(np.random.SeedSequence([len(parts), *parts]).generate_state(1, np.uint64)[0])


class PositionSampler(Sampler[list[int]]):
    """The batches of one rank, without end, from sample `position` of the global stream on.

    Sample n of the stream is element n mod size of the permutation of epoch n // size. A global batch is `world_size`
    neighbouring stretches of `batch_size` samples, one per rank in order: the stream is the same at any world size.
    """

    def __init__(
        self, size: int, seed: int, batch_size: int, position: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if size < 1:
            raise ValueError("the dataset is empty.")
        self.size, self.seed, self.batch_size = size, seed, batch_size
        self.position, self.rank, self.world_size = position, rank, world_size
        self._epoch, self._order = -1, torch.empty(0)

    def __iter__(self) -> Iterator[list[int]]:
        position = self.position
        while True:
            start = position + self.rank * self.batch_size
            yield [self.index(n) for n in range(start, start + self.batch_size)]
            position += self.batch_size * self.world_size

    def index(self, n: int) -> int:
        """The dataset index of sample n of the global stream."""
        epoch, offset = divmod(n, self.size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(self.size, generator=generator)
        return int(self._order[offset])


def collate(samples: Sequence[Sample]) -> Sample:
    """One batch of samples; prompts (L_i, D) are padded with zeros to the longest, which `prompt_mask` (B, L) tells."""
    rest = [{name: value for name, value in sample.items() if name != "prompt_embeds"} for sample in samples]
    batch: Sample = default_collate(rest)
    if "prompt_embeds" in samples[0]:
        prompts = [sample["prompt_embeds"] for sample in samples]
        batch["prompt_embeds"] = pad_sequence(prompts, batch_first=True)
        batch["prompt_mask"] = pad_sequence([torch.ones(len(p), dtype=torch.bool) for p in prompts], batch_first=True)
    return batch


def build_loader(
    config: DataConfig, seed: int, batch_size: int, position: int, rank: int, world_size: int
) -> DataLoader[Any]:
    """An endless loader for this rank, starting at `position` of the stream.

    Yields dicts (see above); for digits still (images (B, C, H, W), labels (B,)). Where shards have to be checked, a
    collective call in a process group. Raises ConfigError for data that are missing, empty or damaged.
    """
    with _as_config_error():
        dataset = _dataset(config, seed, rank, world_size)
        sampler = PositionSampler(len(dataset), seed, batch_size, position, rank, world_size)  # type: ignore[arg-type]
    return _NamingLoader(
        dataset,
        batch_sampler=_PositionedSampler(sampler) if isinstance(dataset, LatentDataset) else sampler,
        num_workers=config.workers,
        collate_fn=default_collate if config.kind == "digits" else collate,
        worker_init_fn=_outlive_stop_signals,
    )


class _NamingLoader(DataLoader[Any]):
    """A shard that went bad during the run ends it with the shard's name, whichever process read it."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        before = {process.pid for process in multiprocessing.active_children()}
        batches = super().__iter__()
        atexit.register(_kill, [p for p in multiprocessing.active_children() if p.pid not in before])
        try:
            yield from batches
        except ShardError as error:
            said = str(error).rpartition("ShardError: ")[2].strip()  # a worker's traceback goes before
            raise TrainingError(
                f"The data cannot be read any more: {said} Then run the same command again: it goes on from the last "
                "checkpoint."
            ) from error


class _PositionedSampler(Sampler[list[tuple[int, int]]]):
    """(index, position) for each index of a PositionSampler's batches."""

    def __init__(self, sampler: PositionSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        sampler = self.sampler
        start = sampler.position + sampler.rank * sampler.batch_size
        for batch in sampler:
            yield list(zip(batch, range(start, start + sampler.batch_size)))
            start += sampler.batch_size * sampler.world_size


def describe_data(config: DataConfig) -> DataFormat:
    """What the samples that a configuration names look like; reads no sample.

    Raises ConfigError for data that are missing, incomplete or, with `on_corrupt: fatal`, of a wrong size.
    """
    if config.kind == "digits":
        from piflow.digits.data import IMAGE_SHAPE, NUM_CLASSES

        return DataFormat(latents=IMAGE_SHAPE, num_classes=NUM_CLASSES)
    if config.kind == "random":
        shapes = config.random
        length = shapes.prompt_length if shapes.prompt_width else None
        return DataFormat(shapes.latents, shapes.num_classes, length, shapes.prompt_width, shapes.pooled_width)
    found: dict[str, Any] = {}
    with _as_config_error():
        for kind, folder in _folders(config).items():
            index = read_index(folder, kind)
            if config.on_corrupt == "fatal" and (problems := check_shards(folder, index)):
                raise _damaged(folder, kind, problems, config)
            if kind == "latents":
                found |= {"latents": index.fields["mean"].shape, "num_classes": index.settings["num_classes"] or None}
            else:
                embeds, pooled = index.fields["prompt_embeds"], index.fields.get("pooled")
                found |= {"prompt_length": embeds.longest, "prompt_width": embeds.shape[0]}
                found |= {"pooled_width": pooled.shape[0] if pooled else None}
    return DataFormat(**found)


def _dataset(config: DataConfig, seed: int, rank: int, world_size: int) -> Dataset[Any]:
    if config.kind == "digits":
        return DigitsDataset()
    if config.kind == "random":
        return RandomDataset(config.random, seed)
    opened = {kind: _open(folder, kind, config, rank, world_size) for kind, folder in _folders(config).items()}
    return LatentDataset(opened["latents"], opened.get("prompts"), seed) if "latents" in opened else opened["prompts"]


def _folders(config: DataConfig) -> dict[Kind, Path]:
    """Where the shards of each kind are, in a fixed order."""
    if config.kind not in COMMANDS:
        return {}
    if config.path is None:
        raise ShardError(f"data.kind={config.kind} needs data.path, a folder that `{COMMANDS[_kind(config)]}` wrote")
    captions: dict[Kind, Path] = {"prompts": config.prompts} if config.prompts else {}
    return {_kind(config): config.path} | captions


def _kind(config: DataConfig) -> Kind:
    return "latents" if config.kind == "latents" else "prompts"


def _open(folder: Path, kind: Kind, config: DataConfig, rank: int, world_size: int) -> ShardedDataset:
    """The good shards of a folder: every rank leaves out what any of them found damaged, or all raise ShardError."""
    try:
        problems = check_shards(folder, read_index(folder, kind), config.verify, rank, world_size)
    except ShardError as error:
        problems = {"": str(error)}  # no rank may be left waiting for this one
    if dist.is_available() and dist.is_initialized():
        everyone: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, problems)
        problems = {name: problem for found in everyone for name, problem in found.items()}
    if "" in problems:
        raise ShardError(problems[""])
    if problems and config.on_corrupt == "fatal":
        raise _damaged(folder, kind, problems, config)
    if problems and rank == 0:
        log.warning("left out (data.on_corrupt: skip): %s", _describe(folder, problems))
    return ShardedDataset(folder, kind, problems.keys())


def _damaged(folder: Path, kind: Kind, problems: dict[str, str], config: DataConfig) -> ShardError:
    hashes = " and --verify hash" if config.verify == "hash" else ""
    return ShardError(
        f"{_describe(folder, problems)}. Run `{COMMANDS[kind]}` with the same arguments{hashes} again: it keeps what "
        "is good and makes the rest. Or set data.on_corrupt=skip to go on without"
    )


def _describe(folder: Path, problems: dict[str, str]) -> str:
    some = [f"{folder / name} {problem}" for name, problem in sorted(problems.items())[:3]]
    return "; ".join(some) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")


@contextmanager
def _as_config_error() -> Iterator[None]:
    try:
        yield
    except (ShardError, OSError) as error:
        raise ConfigError(f"The data cannot be used: {str(error).rstrip('.')}.") from error


def _kill(workers: list[BaseProcess]) -> None:
    """After an error the interpreter would send workers SIGTERM, which they outlive, and then wait without end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # of torch, which would raise for the first one that dies
    for worker in workers:
        with suppress(ValueError):  # closed: it has ended
            worker.kill()


def _outlive_stop_signals(worker: int) -> None:
    """A stop signal reaches the whole process tree, but the rank still needs its data to finish the step."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
