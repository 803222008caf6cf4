"""A checkpoint read at another number of processes than wrote it.

Weights and optimiser go through DeepSpeed's universal format, which its own converter makes; the shards of the average,
which DeepSpeed does not know, are cut anew here. All of it is copying: the weights stay the same to the bit.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from piflow.training.errors import CheckpointError


@contextlib.contextmanager
def universal_checkpoint(path: Path, scratch: Path) -> Iterator[Path]:
    """A folder `scratch` with `path`'s engine in the universal format, there until the end; collective.

    Raises CheckpointError on every rank where the conversion fails.
    """
    problem = [_convert(path / "engine", scratch) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise CheckpointError(
            f"{path} cannot be converted to another number of processes: {problem[0]} "
            "Resume with as many processes as wrote it."
        )
    try:
        yield scratch
        dist.barrier()  # not after an error: ranks that have none are still at another collective
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def load_universal(engine: Any, folder: Path) -> None:
    """Load weights and optimiser state of `<folder>/engine`, in the universal format; collective."""
    engine._config.load_universal_checkpoint = True  # a setting of the engine; no argument of load_checkpoint
    try:
        engine.load_checkpoint(folder, tag="engine", load_module_strict=False)
    finally:
        engine._config.load_universal_checkpoint = False
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = state["step"].clone()  # DeepSpeed puts one tensor into all, and each would count it up


def read_average(path: Path, saved_world_size: int, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """This rank's shards {name: (size,)} of the average in checkpoint `path`, whatever number of ranks wrote it.

    A parameter lies in equal shards, the last ones padded. Raises KeyError where `path` holds other parameters.
    """
    rank, shards = dist.get_rank(), {}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(path / f"rank_{r}.safetensors", "pt")) for r in range(saved_world_size)]
        saved = {key.removeprefix("ema.") for key in files[0].keys() if key.startswith("ema.")}  # noqa: SIM118
        if saved != sizes.keys():
            raise KeyError(f"the average holds other parameters: {sorted(saved ^ sizes.keys())[:3]}")
        for name, size in sizes.items():
            slices = [file.get_slice(f"ema.{name}") for file in files]
            width = slices[0].get_shape()[0]
            pieces, start, stop = [], rank * size, (rank + 1) * size
            for position, piece in enumerate(slices):
                first, last = max(start - position * width, 0), min(stop - position * width, width)
                if first < last:
                    pieces.append(piece[first:last])
            shard = torch.cat(pieces) if pieces else torch.empty(0)
            shards[name] = torch.nn.functional.pad(shard, (0, size - len(shard)))
    return shards


def _convert(source: Path, scratch: Path) -> str | None:
    """Run DeepSpeed's converter in a process of its own; what went wrong, or None."""
    workers = str(min(os.cpu_count() or 1, 8))
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal",
        "--input_folder", str(source.absolute()), "--output_folder", "engine",  # relative: it takes it for a pattern
        "--num_extract_workers", workers, "--num_merge_workers", workers,
    ]  # fmt: skip
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, errors="replace")
    except OSError as error:
        return str(error)
    if not done.returncode:
        return None
    shutil.rmtree(scratch, ignore_errors=True)
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
