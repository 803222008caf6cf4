"""Trains the configurations FOLDER/*.yaml for a few iterations on each rank and writes the bytes of its tensors, by
item, to FOLDER/report.json.

deepspeed --num_gpus 2 --module tests.training.plan_checks FOLDER
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import Tensor

from piflow.training.config import load_config
from piflow.training.data import build_loader
from piflow.training.engine import leave_process, prepare_process
from piflow.training.loop import Trainer
from piflow.training.networks import as_batch
from piflow.training.workload import LiveBytes

ITERATIONS = 4  # the parameter trace is complete from the second on


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """{storage: bytes}, each once."""
    return {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}


def size(tensors: Iterable[Tensor]) -> int:
    return sum(storages(tensors).values())


def living() -> list[Tensor]:
    """Every tensor that takes memory."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and x.device.type == "cpu"]
    return [x for x in tensors if x.untyped_storage().nbytes()]


class Gathered:
    """The most bytes of whole parameters seen when a module is about to run."""

    def __init__(self, parameters: list[Any]) -> None:
        self.parameters, self.peak = parameters, 0
        fetch = PartitionedParameterCoordinator.fetch_sub_module

        def fetched(coordinator: Any, *args: Any, **kwargs: Any) -> Any:
            result = fetch(coordinator, *args, **kwargs)
            live = [p for p in self.parameters if p.ds_status != ZeroParamStatus.NOT_AVAILABLE]
            self.peak = max(self.peak, sum(p.ds_numel * p.element_size() for p in live))
            return result

        PartitionedParameterCoordinator.fetch_sub_module = fetched


def measure(config_file: Path, rank: int, world_size: int) -> dict[str, Any]:
    config = load_config(config_file)
    loader = build_loader(config.data, config.seed, config.batch_size_per_rank, 0, rank, world_size)
    batches = [as_batch(batch) for batch in islice(loader, ITERATIONS)]
    before = storages(living())
    trainer = Trainer(config, rank, world_size)
    parameters: list[Any] = list(trainer.engine.module.parameters())
    for batch in batches[:-2]:
        trainer.step([batch])

    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        whole = {p.data.untyped_storage()._cdata for p in parameters}
        saved.update({key: n for key, n in storages([tensor]).items() if key not in whole})
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.step([batches[-2]])

    optimizer = trainer.engine.optimizer
    moments = [t for state in optimizer.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    items = {
        "base": size(p.ds_tensor for p in parameters if not p.requires_grad),
        "trainable": size(p.ds_tensor for p in parameters if p.requires_grad),
        "optimiser": size([*optimizer.fp32_partitioned_groups_flat, *moments]),
        "gradients": size([optimizer.grad_partitions_flat_buffer]),
        "ema": size(trainer.ema.shadow.values()),
    }
    gathered = Gathered(parameters)
    resident = living()
    with LiveBytes(resident) as live:
        trainer.step([batches[-1]])
    standing = sum(n for key, n in storages(resident).items() if key not in before)
    items |= {"saved": sum(saved.values()), "gathered": gathered.peak, "peak": standing + live.peak}
    with trainer.meter.iteration():
        trainer.step([batches[0]])
    return {**items, "communication": trainer.meter.collect()["time/communication"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--local_rank", type=int)
    folder = parser.parse_args().folder
    rank, world_size = prepare_process()
    report = {file.stem: measure(file, rank, world_size) for file in sorted(folder.glob("*.yaml"))}
    ranks: list[Any] = [None] * world_size
    dist.all_gather_object(ranks, report)
    if rank == 0:
        (folder / "report.json").write_text(json.dumps(ranks))


if __name__ == "__main__":
    main()
    leave_process(0)
