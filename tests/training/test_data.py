"""The order of the data depends on (seed, position) alone, at any world size."""

from __future__ import annotations

import time
from itertools import islice

import psutil
import pytest
import torch

from piflow.training.config import DataConfig
from piflow.training.data import PositionSampler, build_loader, derive_seed
from piflow.training.signals import STOP_SIGNALS


def stream(world_size: int, global_batch: int, batches: int, position: int = 0, size: int = 50) -> list[int]:
    """The global stream as the ranks read it together."""
    ranks = [
        islice(iter(PositionSampler(size, 7, global_batch // world_size, position, rank, world_size)), batches)
        for rank in range(world_size)
    ]
    return [index for batch in zip(*ranks) for part in batch for index in part]


@pytest.mark.parametrize("world_size", [2, 3])
def test_same_stream_at_any_world_size(world_size: int) -> None:
    assert stream(world_size, 6, 20) == stream(1, 6, 20)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resume_in_the_middle(world_size: int) -> None:
    assert stream(world_size, 6, 11, position=9 * 6) == stream(1, 6, 20)[9 * 6 :]


def test_each_epoch_is_a_new_permutation() -> None:
    both = stream(1, 10, 10)
    first, second = both[:50], both[50:]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != list(range(50))


def test_seeds_are_independent() -> None:
    assert len({derive_seed(0, 1), derive_seed(1, 0), derive_seed(0, 0, 1), derive_seed(1)}) == 4


def test_digits_loader_resumes() -> None:
    def read(position: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(islice(build_loader(DataConfig(), 3, 4, position, rank=1, world_size=2), count))

    whole, tail = read(0, 4), read(16, 2)
    for (images, labels), (later_images, later_labels) in zip(whole[2:], tail):
        assert images.shape == (4, 1, 8, 8)
        assert torch.equal(images, later_images)
        assert torch.equal(labels, later_labels)


def test_workers_outlive_stop_signals() -> None:
    before = set(psutil.Process().children())  # compilers that other tests have started
    batches = iter(build_loader(DataConfig(workers=1), 3, 4, 0, 0, 1))
    expected = list(islice(build_loader(DataConfig(), 3, 4, 0, 0, 1), 12))
    first = next(batches)
    (worker,) = set(psutil.Process().children()) - before
    for number in STOP_SIGNALS:
        worker.send_signal(number)
    time.sleep(0.2)
    assert worker.is_running()
    assert worker.status() != psutil.STATUS_ZOMBIE
    for (images, labels), read in zip(expected, [first, *islice(batches, 11)]):
        assert torch.equal(images, read[0])
        assert torch.equal(labels, read[1])


def test_empty_dataset() -> None:
    with pytest.raises(ValueError, match="empty"):
        PositionSampler(0, 0, 1)
