"""Loads FOLDER/base into ZeRO-3 partitions on each rank and writes what it saw to FOLDER/report.json.

deepspeed --num_gpus 2 --module tests.training.loading_checks FOLDER, or without a launcher as a world of one.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from diffusers import QwenImageTransformer2DModel

from piflow.training.engine import leave_process, prepare_process
from piflow.training.errors import ConfigError
from piflow.training.loading import load_partitioned, read_tensors, survey, units

SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def resident(which: str) -> int:
    """VmRSS or VmHWM (its high-water mark) in bytes.

    Anonymous and shared memory and the pages of mapped files that this process has touched: an upper bound of what it
    holds by itself, for the last kind is the system's page cache.
    """
    match = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


def reset_high_water_mark() -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def refused(folder: Path) -> str:
    try:
        load_partitioned(QwenImageTransformer2DModel, folder, dtype=torch.bfloat16, config_dict_or_path=SETTINGS)
    except ConfigError as error:
        return str(error)
    return ""


def check_rank(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {"refused": refused(folder / "none")}
    reset_high_water_mark()
    before, start = resident("VmRSS"), time.perf_counter()
    module = load_partitioned(
        QwenImageTransformer2DModel, folder, subfolder="base", dtype=torch.bfloat16, config_dict_or_path=SETTINGS
    )
    facts |= {"seconds": time.perf_counter() - start, "peak": resident("VmHWM") - before}
    parameters = dict(module.named_parameters())
    facts["share"] = sum(p.ds_tensor.nbytes for p in parameters.values())
    facts["held"] = sum(p.nbytes for p in parameters.values())  # what is whole
    facts["block"] = max(sum(2 * p.ds_numel for p in block.parameters()) for block in module.transformer_blocks)
    files = survey(folder / "base")
    facts["files"] = len(set(files.file_of.values()))
    facts["different"] = [name for name in files.file_of if name not in parameters]
    for path, unit in units(module):
        named = dict(unit.named_parameters(prefix=path))
        expected = read_tensors(files, named)
        with deepspeed.zero.GatheredParameters(list(named.values())):
            facts["different"] += [n for n, p in named.items() if not torch.equal(p, expected[n].to(torch.bfloat16))]
    return facts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--launched", action="store_true")
    parser.add_argument("--local_rank", type=int)
    arguments = parser.parse_args()
    if arguments.launched:  # else load_partitioned does it
        prepare_process()
        dist.broadcast(torch.zeros(2**20), 0)  # what the first collective allocates belongs to the baseline
    facts = check_rank(arguments.folder)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, facts)
    if dist.get_rank() == 0:
        (arguments.folder / "report.json").write_text(json.dumps(ranks))


if __name__ == "__main__":
    main()
    leave_process(0)
