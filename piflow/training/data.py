"""Training data whose order is a function of (seed, position): the resume state is one integer at any world size."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from piflow.training.config import DataConfig
from piflow.training.signals import STOP_SIGNALS


class DigitsDataset(Dataset[tuple[Tensor, Tensor]]):
    """(image (1, 8, 8) float32 in [-1, 1], label () int64) for each of scikit-learn's 1797 digits."""

    def __init__(self) -> None:
        from piflow.digits.data import load_digits_images

        self.images, self.labels = load_digits_images()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


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


def build_loader(
    config: DataConfig, seed: int, batch_size: int, position: int, rank: int, world_size: int
) -> DataLoader[tuple[Tensor, Tensor]]:
    """An endless loader of (images (B, C, H, W), labels (B,)) for this rank, starting at `position` of the stream."""
    dataset = DigitsDataset()
    sampler = PositionSampler(len(dataset), seed, batch_size, position, rank, world_size)
    return DataLoader(dataset, batch_sampler=sampler, num_workers=config.workers, worker_init_fn=_outlive_stop_signals)


def data_format(config: DataConfig) -> tuple[int, tuple[int, int, int]]:
    """(number of classes, image shape (C, H, W)) of the data that a configuration names."""
    from piflow.digits.data import IMAGE_SHAPE, NUM_CLASSES

    return NUM_CLASSES, IMAGE_SHAPE


def _outlive_stop_signals(worker: int) -> None:
    """A stop signal reaches the whole process tree, but the rank still needs its data to finish the step."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
