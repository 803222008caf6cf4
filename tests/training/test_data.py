"""The order of the data depends on (seed, position) alone, at any world size."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from piflow.data import ShardWriter
from piflow.data.shards import Plan
from piflow.training.config import DataConfig
from piflow.training.data import (
    DataFormat,
    PositionSampler,
    build_loader,
    collate,
    derive_seed,
    describe_data,
)
from piflow.training.errors import ConfigError, TrainingError
from piflow.training.signals import STOP_SIGNALS
from tests.processes import time_limit


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


def test_an_error_ends_a_process_that_has_workers() -> None:
    """They outlive SIGTERM, which the interpreter sends them at its end: it would wait for them for ever."""
    script = (
        "from piflow.training.config import DataConfig\nfrom piflow.training.data import build_loader\n"
        "batches = iter(build_loader(DataConfig(workers=2), 3, 4, 0, 0, 1))\nnext(batches)\n"
        "raise RuntimeError('in a step')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("RuntimeError: in a step")


def test_empty_dataset() -> None:
    with pytest.raises(ValueError, match="empty"):
        PositionSampler(0, 0, 1)


def config(**sections: Any) -> DataConfig:
    return DataConfig.model_validate(sections)


RANDOM = config(
    kind="random",
    random={
        "size": 10,
        "latents": [4, 6, 6],
        "num_classes": 3,
        "prompt_length": 5,
        "prompt_width": 8,
        "pooled_width": 2,
    },
)


def write_shards(folder: Path, kind: str, places: range, **settings: Any) -> Path:
    """Two shards; the sample of place p holds the number p."""
    plan = Plan(kind=kind, items=places.stop, shard_size=-(-places.stop // 2), settings=settings)  # type: ignore[arg-type]
    writer = ShardWriter(folder, plan, ragged=["prompt_embeds"])
    for number in writer.pending():
        writer.write(number, [(p, shard_sample(kind, p)) for p in writer.items(number) if p in places])
    writer.finish()
    return folder


def shard_sample(kind: str, place: int) -> dict[str, Tensor]:
    number = float(place)
    if kind == "prompts":
        return {"prompt_embeds": torch.full((place % 4 + 1, 3), number), "pooled": torch.full((2,), number)}
    mean, std = torch.full((4, 2, 2), number), torch.full((4, 2, 2), 0.01)
    return {"mean": mean, "std": std, "class_labels": torch.tensor(place % 7)}


def read(data: DataConfig, position: int, batches: int, rank: int = 0, world_size: int = 1) -> list[dict[str, Tensor]]:
    return list(islice(build_loader(data, 3, 12 // world_size, position, rank, world_size), batches))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def unpadded(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The samples of a batch."""
    samples = [{name: value[row] for name, value in batch.items()} for row in range(len(next(iter(batch.values()))))]
    for sample in samples:
        if "prompt_mask" in sample:
            mask = sample.pop("prompt_mask")
            assert not sample["prompt_embeds"][~mask].any()
            sample["prompt_embeds"] = sample["prompt_embeds"][mask]
    return samples


@pytest.fixture
def cached(tmp_path: Path) -> dict[str, DataConfig]:
    latents = write_shards(tmp_path / "latents", "latents", range(0, 21), num_classes=7)
    prompts = write_shards(tmp_path / "prompts", "prompts", range(5, 30))
    return {
        "latents": config(kind="latents", path=latents),
        "prompts": config(kind="prompts", path=prompts),
        "both": config(kind="latents", path=latents, prompts=prompts),
        "random": RANDOM,
    }


@pytest.mark.parametrize("kind", ["latents", "prompts", "both", "random"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_samples_are_the_same_at_any_world_size_and_after_a_resume(
    kind: str, world_size: int, cached: dict[str, DataConfig]
) -> None:
    data = cached[kind]
    expected = [unpadded(batch) for batch in read(data, 0, 5)]
    for first in (0, 3):
        ranks = [read(data, 12 * first, 5 - first, rank, world_size) for rank in range(world_size)]
        for number, parts in enumerate(zip(*ranks), start=first):
            together = [sample for part in parts for sample in unpadded(part)]
            assert all(same(*pair) for pair in zip(together, expected[number], strict=True))


def test_random_samples(cached: dict[str, DataConfig]) -> None:
    (batch,) = read(RANDOM, 0, 1)
    assert {name: tuple(value.shape) for name, value in batch.items() if name != "prompt_mask"} == {
        "latents": (12, 4, 6, 6), "class_labels": (12,), "prompt_embeds": (12, 5, 8), "pooled": (12, 2),
    }  # fmt: skip
    assert set(batch["class_labels"].tolist()) <= {0, 1, 2}
    assert set(batch["prompt_mask"].sum(dim=1).tolist()) <= set(range(1, 6))
    assert len(batch["latents"].unique(dim=0)) == 10  # the size of the dataset: two came again
    assert describe_data(RANDOM) == DataFormat((4, 6, 6), 3, 5, 8, 2)
    only_text = config(kind="random", random={"prompt_width": 8})
    assert read(only_text, 0, 1)[0].keys() == {"prompt_embeds", "prompt_mask"}


def test_latents_are_drawn_anew_in_each_epoch(cached: dict[str, DataConfig]) -> None:
    samples = [sample for batch in read(cached["latents"], 0, 4) for sample in unpadded(batch)]
    epochs = [{int(s["latents"].mean().round()): s for s in part} for part in (samples[:21], samples[21:42])]
    assert epochs[0].keys() == epochs[1].keys() == set(range(21))
    deviations = [s["latents"] - place for place, s in epochs[0].items()]
    assert torch.stack(deviations).std() == pytest.approx(0.01, rel=0.2)
    for place, sample in epochs[0].items():
        assert int(sample["class_labels"]) == place % 7
        assert not torch.equal(sample["latents"], epochs[1][place]["latents"])
    assert describe_data(cached["latents"]) == DataFormat((4, 2, 2), 7)


def test_captions_belong_to_their_images(cached: dict[str, DataConfig]) -> None:
    samples = [sample for batch in read(cached["both"], 0, 4) for sample in unpadded(batch)]
    for sample in samples:
        place = sample["pooled"][0].item()
        assert round(sample["latents"].mean().item()) == place
        assert (sample["prompt_embeds"] == place).all()
        assert len(sample["prompt_embeds"]) == place % 4 + 1
    assert {int(sample["pooled"][0]) for sample in samples} == set(range(5, 21))
    assert describe_data(cached["both"]) == DataFormat((4, 2, 2), 7, 4, 3, 2)


@pytest.mark.parametrize("how", ["truncated", "header", "changed"])
def test_a_damaged_shard_is_named_or_left_out(
    how: str, cached: dict[str, DataConfig], caplog: pytest.LogCaptureFixture
) -> None:
    folder = cached["prompts"].path
    assert folder is not None
    shard = folder / "shard-00000.safetensors"
    content = shard.read_bytes()
    verify = "hash" if how == "changed" else "size"
    fatal = config(kind="prompts", path=folder, verify=verify)
    damaged, said = {
        "truncated": (content[:-1], f"has {len(content) - 1} bytes, not {len(content)}"),
        "header": (content[:4] + b"x" * 20 + content[24:], "begins otherwise than was written"),
        "changed": (content[:-1] + b"x", "has another content than was written"),
    }[how]
    shard.write_bytes(damaged)
    problem = f"{shard} {said}"
    with pytest.raises(ConfigError) as error:
        build_loader(fatal, 3, 4, 0, 0, 1)
    assert str(error.value).startswith(f"The data cannot be used: {problem}")
    again = "the same arguments and --verify hash again" if how == "changed" else "the same arguments again"
    assert f"Run `piflow cache-prompts` with {again}" in str(error.value)
    assert str(error.value).endswith("Or set data.on_corrupt=skip to go on without.")
    if how != "changed":
        with pytest.raises(ConfigError, match=said):
            describe_data(fatal)
    skip = config(kind="prompts", path=folder, verify=verify, on_corrupt="skip")
    seen = {int(s["pooled"][0]) for batch in read(skip, 0, 3) for s in unpadded(batch)}
    assert seen == set(range(15, 30))
    assert problem in caplog.text
    describe_data(skip)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_goes_bad_during_the_run_is_named(workers: int, cached: dict[str, DataConfig]) -> None:
    data = cached["prompts"].model_copy(update={"workers": workers})
    loader = build_loader(data, 3, 4, 0, 0, 1)
    shard = data.path / "shard-00001.safetensors"  # type: ignore[operator]
    shard.write_bytes(shard.read_bytes()[:20])
    with time_limit(60), pytest.raises(TrainingError) as error:
        for _ in islice(loader, 20):
            pass
    said = str(error.value)
    assert said.startswith(f"The data cannot be read any more: {shard} cannot be read: ")
    assert said.endswith("Then run the same command again: it goes on from the last checkpoint.")
    assert "Traceback" not in said


def test_data_that_are_not_there(tmp_path: Path) -> None:
    for ask in (describe_data, lambda data: build_loader(data, 3, 4, 0, 0, 1)):
        with pytest.raises(
            ConfigError, match=r"data.kind=prompts needs data.path, a folder that `piflow cache-prompts`"
        ):
            ask(config(kind="prompts"))
        with pytest.raises(ConfigError, match=r"none is no folder of shards: .*Run `piflow cache-latents`"):
            ask(config(kind="latents", path=tmp_path / "none"))


def test_images_without_any_caption(cached: dict[str, DataConfig], tmp_path: Path) -> None:
    others = write_shards(tmp_path / "others", "prompts", range(25, 30))
    with pytest.raises(ConfigError, match=r"no image of .* has its caption in .*: both must come from one"):
        build_loader(config(kind="latents", path=cached["latents"].path, prompts=others), 3, 4, 0, 0, 1)


def test_collate_keeps_dtypes() -> None:
    batch = collate(
        [{"prompt_embeds": torch.ones(n, 2, dtype=torch.bfloat16), "pooled": torch.ones(3)} for n in (1, 2)]
    )
    assert batch["prompt_embeds"].dtype == torch.bfloat16
    assert batch["prompt_mask"].tolist() == [[True, False], [True, True]]


def check_on_rank(rank: int, folder: Path, results: Any) -> None:
    """One of two processes, of which only the second finds a shard damaged, and later its folder gone."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mine = folder / f"rank_{rank}"
    found = []
    for data in (
        config(kind="prompts", path=mine),
        config(kind="prompts", path=mine, on_corrupt="skip"),
        config(kind="prompts", path=mine if rank == 0 else folder / "none", on_corrupt="skip"),
    ):
        try:
            found.append(str(len(build_loader(data, 3, 4, 0, rank, 2).dataset)))  # type: ignore[arg-type]
        except ConfigError as error:
            found.append(str(error))
    results[rank] = found
    dist.destroy_process_group()


def test_what_one_rank_finds_damaged_all_leave_out(tmp_path: Path) -> None:
    for rank in range(2):
        write_shards(tmp_path / f"rank_{rank}", "prompts", range(0, 30))
    shard = tmp_path / "rank_1" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with torch.multiprocessing.Manager() as manager, time_limit(100):
        results = manager.dict()
        torch.multiprocessing.spawn(check_on_rank, (tmp_path, results), nprocs=2)
        (fatal, skipped, gone), other = results[0], results[1]
    assert "rank_0/shard-00001.safetensors has" in fatal
    assert "rank_1/shard-00001.safetensors has" in other[0]
    assert skipped == other[1] == "15"
    assert gone == other[2]
    assert "none is no folder of shards" in gone
