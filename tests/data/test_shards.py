"""Shards: what is written is read, an interrupted writer goes on, damage is named."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor

from piflow.data import ShardedDataset, ShardError, ShardWriter, check_shards, read_index
from piflow.data.shards import Plan

ITEMS, SHARD_SIZE = 11, 4


def sample(place: int) -> dict[str, Tensor]:
    """A text of place % 3 + 1 tokens, a vector and a number."""
    generator = torch.Generator().manual_seed(place)
    return {
        "text": torch.randn(place % 3 + 1, 5, generator=generator).bfloat16(),
        "vector": torch.randn(2, 3, generator=generator),
        "label": torch.tensor(place),
    }


def plan(**changes: object) -> Plan:
    return Plan(**{"kind": "prompts", "items": ITEMS, "shard_size": SHARD_SIZE, "settings": {"model": "a"}, **changes})


def write(folder: Path, ranks: int = 1, without: tuple[int, ...] = ()) -> Path:
    """All ranks in turn; places `without` are left out."""
    for rank in range(ranks):
        writer = ShardWriter(folder, plan(), rank, ranks, ragged=["text"])
        for number in writer.pending():
            writer.write(number, [(place, sample(place)) for place in writer.items(number) if place not in without])
        index = writer.finish()
    assert index is not None
    return folder


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


def test_every_sample_comes_back(tmp_path: Path) -> None:
    data = ShardedDataset(write(tmp_path))
    assert len(data) == ITEMS
    assert all(equal(data[place], sample(place)) for place in (7, 0, 10, 3, 4, 5, 1, 2, 9, 8, 6))
    assert data.sources().tolist() == list(range(ITEMS))
    assert data.index.fields["text"].model_dump() == {"dtype": "bfloat16", "shape": (5,), "longest": 3}
    for outside in (-1, ITEMS):
        with pytest.raises(IndexError, match=f"sample {outside} of 11"):
            data[outside]


def test_samples_are_not_views_of_the_file(tmp_path: Path) -> None:
    data = ShardedDataset(write(tmp_path))
    data[5]["vector"].zero_()
    assert equal(data[5], sample(5))


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_any_number_of_ranks_writes_the_same_files(tmp_path: Path, ranks: int) -> None:
    one, many = write(tmp_path / "one"), write(tmp_path / "many", ranks)
    names = sorted(os.listdir(one))
    assert names == sorted(os.listdir(many))
    assert all((one / name).read_bytes() == (many / name).read_bytes() for name in names)


def test_samples_and_whole_shards_may_be_missing(tmp_path: Path) -> None:
    data = ShardedDataset(write(tmp_path, without=(1, 4, 5, 6, 7)))
    assert data.sources().tolist() == [0, 2, 3, 8, 9, 10]
    assert equal(data[1], sample(2))
    assert equal(data[3], sample(8))
    assert not (tmp_path / "shard-00001.safetensors").exists()
    with pytest.raises(ShardError, match="not one of 11 items"):
        write(tmp_path / "none", without=tuple(range(ITEMS)))


def test_finished_shards_are_kept_and_damaged_ones_made_anew(tmp_path: Path) -> None:
    write(tmp_path)
    writer = ShardWriter(tmp_path, plan(), ragged=["text"])
    assert writer.pending() == writer.pending("hash") == []
    truncate(tmp_path / "shard-00001.safetensors")
    flip_a_bit(tmp_path / "shard-00002.safetensors")
    assert writer.pending() == [1]
    assert writer.pending("hash") == [1, 2]
    (tmp_path / "shard-00000.json").unlink()
    assert writer.pending() == [0, 1]
    assert writer.finish() is None
    (tmp_path / ".shard-00001.safetensors.host.1.partial").write_bytes(b"of a process that was killed")
    write(tmp_path)
    assert len(ShardedDataset(tmp_path)) == ITEMS
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]


def test_other_settings_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ShardError, match=r"shard_size was 4, is 5; model was 'a', is 'b'. Give the same ones"):
        ShardWriter(tmp_path, plan(shard_size=5, settings={"model": "b"}))
    with pytest.raises(ValueError, match=r"rank must lie in 0\.\.1"):
        ShardWriter(tmp_path, plan(), 2, 2)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_damage_is_named(tmp_path: Path) -> None:
    index = read_index(write(tmp_path))
    assert check_shards(tmp_path, index) == check_shards(tmp_path, index, "hash") == {}
    truncate(tmp_path / "shard-00000.safetensors")
    flip_a_bit(tmp_path / "shard-00001.safetensors")
    (tmp_path / "shard-00002.safetensors").unlink()
    sizes = check_shards(tmp_path, index)
    assert list(sizes) == ["shard-00000.safetensors", "shard-00002.safetensors"]
    assert sizes["shard-00000.safetensors"].endswith(f"not {index.shards[0].size}")
    by_rank = [check_shards(tmp_path, index, "hash", rank, 2) for rank in range(2)]
    assert {name: rank for rank, found in enumerate(by_rank) for name in found} == {
        "shard-00000.safetensors": 0, "shard-00001.safetensors": 1, "shard-00002.safetensors": 0,
    }  # fmt: skip
    assert by_rank[1]["shard-00001.safetensors"] == "has another content than was written"

    data = ShardedDataset(tmp_path, skip=sizes)
    assert data.sources().tolist() == [4, 5, 6, 7]
    with pytest.raises(ShardError, match="holds no good shard"):
        ShardedDataset(tmp_path, skip=[shard.name for shard in index.shards])


def test_a_shard_damaged_later_is_named_when_it_is_read(tmp_path: Path) -> None:
    data = ShardedDataset(write(tmp_path))
    truncate(tmp_path / "shard-00001.safetensors")
    assert equal(data[0], sample(0))
    with pytest.raises(ShardError, match=r"shard-00001.safetensors cannot be read: .*Run `piflow cache-prompts` with"):
        data[4]


def test_a_damaged_header_is_noticed_without_reading_all(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[3:40] = b"x" * 37
    path.write_bytes(content)
    found = check_shards(tmp_path, read_index(tmp_path))
    assert found == {"shard-00001.safetensors": "begins otherwise than was written"}
    writer = ShardWriter(tmp_path, plan(), ragged=["text"])
    assert writer.pending() == [1]
    assert writer.pending(samples_an_item=2) == [0, 1, 2]


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"is no folder of shards: it has no index.json. Run `piflow cache-latents`"):
        read_index(tmp_path / "none", "latents")
    write(tmp_path)
    with pytest.raises(ShardError, match="holds prompts, expected latents: piflow cache-latents makes these"):
        read_index(tmp_path, "latents")
    (tmp_path / "index.json").write_text('{"kind": 3}')
    with pytest.raises(ShardError, match=r"index.json cannot be read: it does not hold what was written"):
        read_index(tmp_path)
    (tmp_path / "index.json").unlink()
    (tmp_path / "shard-00002.json").unlink()
    with pytest.raises(ShardError, match="incomplete: 2 of 3 shards are finished"):
        read_index(tmp_path)


def test_a_file_that_cannot_be_written_leaves_what_is_finished(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, plan(), ragged=["text"])
    writer.write(0, [(place, sample(place)) for place in writer.items(0)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as a full disk, but only for this process
    try:
        with pytest.raises(OSError, match=r"shard-00001.safetensors could not be written: File too large. What is fin"):
            writer.write(1, [(place, sample(place)) for place in writer.items(1)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert writer.pending() == [1, 2]
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]
    assert len(ShardedDataset(write(tmp_path))) == ITEMS
