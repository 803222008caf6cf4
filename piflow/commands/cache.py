"""`piflow cache-prompts` and `piflow cache-latents`: what a training reads, computed once.

Both go on where an earlier run was stopped, and share the work among processes that `torchrun` or `deepspeed` started.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from piflow.commands.common import progress, quiet_libraries, told, usable_device

if TYPE_CHECKING:
    from piflow.data.shards import ShardWriter

EXAMPLES = 3  # broken files that are named in the end


class DType(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Check(StrEnum):
    size = "size"
    hash = "hash"


class OnCorrupt(StrEnum):
    fatal = "fatal"
    skip = "skip"


class Classes(StrEnum):
    none = "none"
    imagenet_folder = "imagenet-folder"


Out = Annotated[Path, typer.Option(help="Folder to write; what is finished in it is kept.")]
ShardSize = Annotated[int, typer.Option(min=1, help="Samples of the source in a shard.")]
NumShards = Annotated[int | None, typer.Option(min=1, help="This many shards, instead of --shard-size.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples that go through the network at once.")]
Device = Annotated[str | None, typer.Option(help="Such as cuda:0 or cpu. By default this process's GPU, if any.")]
Rank = Annotated[int | None, typer.Option(min=0, help="Part of the shards to write. By default the launcher's RANK.")]
WorldSize = Annotated[int | None, typer.Option(min=1, help="Number of parts. By default the launcher's WORLD_SIZE.")]
Verify = Annotated[Check, typer.Option(help="How finished shards are checked; damaged ones are made anew.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")]


def cache_prompts(
    source: Annotated[
        str, typer.Argument(help="Text file (one prompt a line), JSONL, CSV, Parquet or Hugging Face dataset.")
    ],
    out: Out,
    model: Annotated[str, typer.Option(help="Folder or repository of the diffusers base.")],
    pipeline: Annotated[
        str | None, typer.Option(help="qwen_image, flux or flux2. By default what the base is.")
    ] = None,
    key: Annotated[str, typer.Option(help="Key or column of the prompt.")] = "prompt",
    split: Annotated[str, typer.Option(help="Split of a Hugging Face dataset.")] = "train",
    negative_prompt: Annotated[
        str | None, typer.Option(help="Of the unconditional branch. By default ' ' for Qwen-Image, '' elsewhere.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens. By default the pipeline's own.")] = None,
    dtype: Annotated[DType, typer.Option(help="Of the text encoder and what is stored.")] = DType.bfloat16,
    batch_size: BatchSize = 16,
    shard_size: ShardSize = 256,
    num_shards: NumShards = None,
    device: Device = None,
    rank: Rank = None,
    world_size: WorldSize = None,
    verify: Verify = Check.size,
    as_json: AsJson = False,
) -> None:
    """Encode prompts with the text encoder of a base, into shards that a training reads."""
    with _told(), ExitStack() as stack:
        import torch

        from piflow.data.prompts import RAGGED, PromptEncoder, plan_prompts, read_prompts, write_negative, write_prompts
        from piflow.data.shards import ShardWriter

        rank, world_size = _place(rank, world_size)
        prompts = read_prompts(source, key, split)
        stack.enter_context(quiet_libraries())
        encoder = PromptEncoder(
            model, pipeline, max_length=max_length, dtype=getattr(torch, dtype), device=_device(device)
        )
        if negative_prompt is None:
            negative_prompt = " " if encoder.family == "qwen_image" else ""
        settings = {"dtype": dtype.value, "negative_prompt": negative_prompt}
        size = _shard_size(len(prompts.texts), shard_size, num_shards)
        plan = plan_prompts(prompts, encoder, model, size, batch_size, **settings)
        writer = ShardWriter(out, plan, rank, world_size, RAGGED)
        write_negative(out, encoder, negative_prompt)
        pending = writer.pending(verify.value)
        summary = _summary(writer, pending)
        for _ in _progress("encoding prompts", write_prompts(writer, pending, prompts, encoder), summary, rank):
            pass
        _tell(writer, summary, as_json)


def cache_latents(
    source: Annotated[str, typer.Argument(help="Folder of images, or JSONL that names them (relative to itself).")],
    out: Out,
    vae: Annotated[str, typer.Option(help="Folder or repository of the VAE, or folder of a pipeline.")],
    size: Annotated[int, typer.Option(min=8, help="Pixels a side, after resizing and cropping to the middle.")] = 256,
    classes: Annotated[
        Classes, typer.Option(help="imagenet-folder: one folder per class, labels in the order of their names.")
    ] = Classes.none,
    key: Annotated[str, typer.Option(help="Key of the file's name in JSONL.")] = "image",
    flip: Annotated[bool, typer.Option("--flip", help="Also the mirrored images.")] = False,
    on_corrupt: Annotated[OnCorrupt, typer.Option(help="What a broken image file does.")] = OnCorrupt.fatal,
    dtype: Annotated[DType, typer.Option(help="Of the VAE.")] = DType.float32,
    store_dtype: Annotated[DType, typer.Option(help="Of what is stored.")] = DType.float32,
    batch_size: BatchSize = 16,
    shard_size: ShardSize = 2048,
    num_shards: NumShards = None,
    device: Device = None,
    rank: Rank = None,
    world_size: WorldSize = None,
    verify: Verify = Check.size,
    as_json: AsJson = False,
) -> None:
    """Encode images with a VAE (mean and standard deviation), into shards that a training reads."""
    with _told(), ExitStack() as stack:
        import torch

        from piflow.data.latents import LatentEncoder, find_images, plan_latents, write_latents
        from piflow.data.shards import ShardWriter

        rank, world_size = _place(rank, world_size)
        images = find_images(source, classes == Classes.imagenet_folder, key)
        stack.enter_context(quiet_libraries())
        encoder = LatentEncoder(vae, dtype=getattr(torch, dtype), device=_device(device))
        settings = {"flip": flip, "dtype": dtype.value, "store_dtype": store_dtype.value}
        plan = plan_latents(
            images, encoder, vae, _shard_size(len(images.paths), shard_size, num_shards), size, **settings
        )
        writer = ShardWriter(out, plan, rank, world_size)
        # Without leave to skip, what an earlier run has left out is wanted now.
        pending = writer.pending(verify.value, 0 if on_corrupt == OnCorrupt.skip else 1 + flip)
        summary = _summary(writer, pending)
        steps = write_latents(
            writer,
            pending,
            images,
            encoder,
            batch_size=batch_size,
            flip=flip,
            store=getattr(torch, store_dtype),
            on_corrupt=on_corrupt.value,
        )
        broken: list[str] = []
        for problems in _progress("encoding images", steps, summary, rank):
            broken += problems
        summary["left_out"] = len(broken)
        for problem in broken[:EXAMPLES]:
            print(f"piflow: left out: {problem}", file=sys.stderr)
        if len(broken) > EXAMPLES:
            print(f"piflow: and {len(broken) - EXAMPLES} more.", file=sys.stderr)
        _tell(writer, summary, as_json)


def _shard_size(items: int, shard_size: int, num_shards: int | None) -> int:
    return -(-items // num_shards) if num_shards else shard_size


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """(rank, world size), from the options or the launcher."""
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
    if rank >= world_size:
        raise ValueError(f"--rank must be below --world-size ({world_size}), got {rank}.")
    return rank, world_size


def _device(device: str | None) -> str:
    """By default the launcher's GPU for this process."""
    place = usable_device(device)
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device is None and place == "cuda" else place


def _summary(writer: ShardWriter, pending: list[int]) -> dict[str, Any]:
    mine = len(range(writer.rank, writer.num_shards, writer.world_size))
    return {
        "folder": str(writer.folder),
        "shards": writer.num_shards,
        "written": len(pending),
        "kept": mine - len(pending),
        "items": sum(len(writer.items(number)) for number in pending),
    }


def _progress(what: str, steps: Iterable[Any], summary: dict[str, Any], rank: int) -> Iterator[Any]:
    """Go through steps of `n` or (n, extra) items, with a bar on rank 0's terminal; yields what is extra."""
    with progress(shown=rank == 0) as bars:
        task = bars.add_task(what, total=summary["items"])
        for step in steps:
            done, extra = step if isinstance(step, tuple) else (step, None)
            bars.advance(task, done)
            yield extra


def _tell(writer: ShardWriter, summary: dict[str, Any], as_json: bool) -> None:
    index = writer.finish()
    summary |= {"complete": index is not None, "samples": index.count if index else None}
    if as_json:
        print(json.dumps(summary))
        return
    shards = f"{summary['written']} shards written, {summary['kept']} kept"
    if index:
        print(f"{index.count} samples in {writer.folder} ({shards})")
    else:
        print(f"rank {writer.rank} of {writer.world_size} is done ({shards}); {writer.folder} waits for other ranks")


@contextmanager
def _told() -> Iterator[None]:
    from piflow.training.errors import ConfigError
    from piflow.training.signals import raise_on_stop

    with told(), raise_on_stop():
        try:
            yield
        except ImportError as error:
            raise ConfigError(str(error)) from error
