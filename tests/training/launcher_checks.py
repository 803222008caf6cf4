"""Run by the deepspeed launcher on each rank: drives the real trainer and writes what it saw to FOLDER/report.json.

deepspeed --num_gpus 2 --module tests.training.launcher_checks FOLDER TEACHER
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from piflow.training.checkpoint import verify
from piflow.training.config import TrainConfig
from piflow.training.data import build_loader, derive_seed
from piflow.training.ema import karras_momentum
from piflow.training.engine import build_optimizer, leave_process, prepare_process
from piflow.training.errors import TrainingError
from piflow.training.loop import NOISE_STREAM, Trainer
from piflow.training.module import build_module
from piflow.training.networks import Batch, as_batch

ITERATIONS, SAVED_AT = 6, 3

Batches = list[list[Batch]]  # [rank][iteration]


def make_config(folder: Path, teacher: Path, checkpointing: bool = False) -> TrainConfig:
    return TrainConfig.model_validate({
        "output_dir": folder / "run",
        "iterations": ITERATIONS,
        "max_skipped_iterations": 1,
        "batch_size_per_rank": 4,
        "teacher": {"kind": "digits", "path": teacher},
        "student": {"num_gaussians": 4, "gradient_checkpointing": checkpointing},
        "distillation": {
            "nfe": 2, "total_substeps": 16, "policy_dropout": 0.2, "guidance_scale": 2.0, "window_substeps": 3,
            "teacher_ratio": 0.5, "teacher_ratio_decay": 4,
        },
        "optimizer": {"learning_rate": 1e-3, "warmup_iterations": 3, "gradient_clipping": 0.5, "weight_decay": 0.01},
        "ema": {"gamma": 2.0},
        "zero": {"max_reuse_distance": 10**9},
    })  # fmt: skip


def plain_loop(config: TrainConfig, batches: Batches) -> dict[str, Any]:
    """The same run in one process with plain torch: the reference."""
    module = build_module(config)
    optimizer = build_optimizer(module, config)
    trainable = dict(module.student.named_parameters())
    average = {name: p.detach().clone() for name, p in trainable.items()}
    losses, norms = [], []
    for iteration in range(config.iterations):
        per_rank = []
        for rank, rank_batches in enumerate(batches):
            generator = Generator().manual_seed(derive_seed(config.seed, NOISE_STREAM, iteration, rank))
            per_rank.append(module(rank_batches[iteration], iteration, generator))
        loss = torch.stack(per_rank).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable.values(), config.optimizer.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.learning_rate_at(iteration)
        optimizer.step()
        momentum = karras_momentum(iteration, config.ema.gamma)
        for name, p in trainable.items():
            average[name] = momentum * average[name] + (1 - momentum) * p.detach()
        losses.append(loss.item())
        norms.append(norm.item())
    return {"losses": losses, "norms": norms, "average": average}


def run(trainer: Trainer, batches: list[Batch], first: int, last: int) -> list[tuple[float, float]]:
    return [trainer.step([batches[i]])[:2] for i in range(first, last)]


def shards(trainer: Trainer) -> list[Tensor]:
    """This rank's weights and averages."""
    return [shard.clone() for shard in (*trainer.ema.current_shards().values(), *trainer.ema.shadow.values())]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--local_rank", type=int)
    arguments = parser.parse_args()
    rank, world_size = prepare_process()
    config = make_config(arguments.folder, arguments.teacher)
    batches = [
        [as_batch(b) for b in islice(build_loader(config.data, config.seed, 4, 0, r, world_size), ITERATIONS)]
        for r in range(world_size)
    ]
    report: dict[str, Any] = {"world_size": world_size}

    invalidations = []
    invalidate = PartitionedParameterCoordinator._invalidate_trace
    PartitionedParameterCoordinator._invalidate_trace = lambda self: (invalidations.append(1), invalidate(self))[1]

    trainer = Trainer(config, rank, world_size, resume="auto")
    trainer.resume()
    history = run(trainer, batches[rank], 0, 1)
    after_first = len(invalidations)
    history += run(trainer, batches[rank], 1, SAVED_AT)
    path = trainer.save()
    history += run(trainer, batches[rank], SAVED_AT, ITERATIONS)
    report["invalidations"] = len(invalidations) - after_first
    coordinator = trainer.engine.optimizer.parameter_offload.get_param_coordinator()
    report["trace_complete"] = coordinator.is_complete_trace()
    report["losses"], report["norms"] = zip(*history)
    folder = trainer.export()
    report["verify"] = verify(path)

    again = Trainer(config, rank, world_size, resume="latest")
    report["resume_messages"] = again.resume()
    report["position"] = again.progress.position
    resumed = run(again, batches[rank], SAVED_AT, ITERATIONS)
    report["resume_exact"] = [[x.hex() for x in pair] for pair in resumed] == [
        [x.hex() for x in pair] for pair in history[SAVED_AT:]
    ]
    same = all(torch.equal(again.ema.shadow[name], trainer.ema.shadow[name]) for name in trainer.ema.shadow)
    report["resume_ema_exact"] = same

    def refusals(attempt: Callable[[], Any]) -> list[str]:
        """The message of each rank."""
        try:
            attempt()
            message = ""
        except TrainingError as error:
            message = str(error)
        messages = [""] * world_size
        dist.all_gather_object(messages, message)
        return messages

    def files() -> list[tuple[str, int]]:
        return sorted((p.as_posix(), p.stat().st_mtime_ns) for p in again.output_dir.rglob("*"))

    before = files()
    good = batches[rank][0]
    poison = {**good, "latents": good["latents"] * (float("nan") if rank == 1 else 1.0)}
    report["skipped_messages"], weights = [], shards(again)
    report["skipped_messages"] += refusals(lambda: again.step([poison]))
    unchanged = [all(torch.equal(a, b) for a, b in zip(weights, shards(again)))] * world_size
    dist.all_gather_object(unchanged, unchanged[rank])
    report["skipped_unchanged"] = unchanged
    report["skipped"] = [again.skipped, again.skipped_in_a_row, again.progress.iteration]
    report["step_after_a_skip"] = again.step([good])[:2]
    report["moved_after_a_skip"] = not all(torch.equal(a, b) for a, b in zip(weights, shards(again)))
    report["skipped_messages"] += refusals(lambda: again.step([poison]))
    weights = shards(again)
    report["nan_messages"] = refusals(lambda: again.step([poison]))
    report["nan_unchanged"] = all(torch.equal(a, b) for a, b in zip(weights, shards(again)))
    if rank == 1:
        next(iter(again.ema.shadow.values()))[0] = float("inf")
    report["broken_average_messages"] = [refusals(again.save), refusals(again.export)]
    report["nan_files_untouched"] = files() == before != []

    checkpointed = Trainer(make_config(arguments.folder, arguments.teacher, checkpointing=True), rank, world_size)
    students = dict(checkpointed.engine.module.student.named_parameters())
    report["checkpointed"], average = [], {}
    for i in range(3):
        report["checkpointed"] += run(checkpointed, batches[rank], i, i + 1)
        momentum = karras_momentum(i, config.ema.gamma)
        with deepspeed.zero.GatheredParameters(list(students.values())):
            for name, p in students.items():
                average[name] = momentum * average.get(name, 0.0) + (1 - momentum) * p.detach().double()
    gathered = checkpointed.ema.full_state_dict()
    report["ema_difference"] = max(
        [(value - average[name]).abs().max().item() for name, value in gathered.items()] or [0]
    )

    trainer.save()  # at the iteration of its export above
    raw = dict(trainer.engine.module.student.named_parameters())
    with deepspeed.zero.GatheredParameters(list(raw.values())):
        if rank == 0:
            save_file({name: p.detach().clone() for name, p in raw.items()}, arguments.folder / "raw.safetensors")

    if rank == 0:
        expected = plain_loop(config, batches)
        exported = load_file(folder / "diffusion_pytorch_model.safetensors")
        report["expected_losses"], report["expected_norms"] = expected["losses"], expected["norms"]
        report["same_parameters"] = exported.keys() == expected["average"].keys()
        differences = [(exported[name] - value).abs().max().item() for name, value in expected["average"].items()]
        report["export_difference"] = max(differences)
        (arguments.folder / "report.json").write_text(json.dumps(report))
    dist.barrier()


if __name__ == "__main__":
    main()
    leave_process(0)
