"""Run by the deepspeed launcher on each rank: checkpoints of a real trainer, at several numbers of processes.

deepspeed --num_gpus N --module tests.training.checkpoint_checks FOLDER TEACHER STAGE

Stage `first` trains, swaps the average in and out, runs into a full disk and saves. Each later stage resumes, compares
with what the stage before had, trains and saves. Each writes what it saw to FOLDER/STAGE.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from piflow.training.checkpoint import verify
from piflow.training.config import TrainConfig, load_config
from piflow.training.data import build_loader
from piflow.training.engine import leave_process, prepare_process
from piflow.training.errors import TrainingError
from piflow.training.loop import Trainer
from piflow.training.module import build_module
from piflow.training.networks import as_batch

BATCH = 4


def make_config(folder: Path, teacher: Path) -> TrainConfig:
    """A whole student in bfloat16, so that master weights and weights differ; small parameters stay gathered."""
    return TrainConfig.model_validate({
        "output_dir": folder / "run",
        "iterations": 100,
        "batch_size_per_rank": BATCH,
        "precision": "bfloat16",
        "teacher": {"kind": "digits", "path": teacher},
        "student": {"num_gaussians": 3},
        "distillation": {"nfe": 1, "total_substeps": 8},
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.01},
        "ema": {"gamma": 1.0},
        "zero": {"param_persistence_threshold": 50},
        "checkpoint": {"keep": 1},
        "directories": {"checkpoints": f"file://{folder}/remote"},
    })  # fmt: skip


def make_lora_config(folder: Path) -> TrainConfig:
    """The tiny recipe of a student that shares its frozen base with the teacher."""
    recipe = Path(__file__).parents[2] / "configs" / "tiny" / "qwen_image" / "gm_4nfe.yaml"
    return load_config(recipe, [f"output_dir={folder / 'lora'}", "batch_size=null"])


def whole_state(trainer: Trainer) -> dict[str, Tensor]:
    """All that is trained, put together from the shards of all ranks."""
    state = {f"ema.{name}": tensor for name, tensor in trainer.ema.full_state_dict().items()}
    state |= weights(trainer)
    for name, p in trainer.ema.parameters.items():
        state[f"master.{name}"] = safe_get_full_fp32_param(p).clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"{moment}.{name}"] = safe_get_full_optimizer_state(p, moment).clone()
    state["step"] = torch.stack([s["step"].cpu() for s in trainer.engine.optimizer.optimizer.state.values()])
    return state


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """The weights that the forward pass sees."""
    with deepspeed.zero.GatheredParameters(list(trainer.ema.parameters.values())):
        return {f"weight.{name}": p.detach().clone() for name, p in trainer.ema.parameters.items()}


def train(trainer: Trainer, iterations: int) -> list[str]:
    config = trainer.config
    loader = build_loader(
        config.data,
        config.seed,
        config.batch_size_per_rank,
        trainer.progress.position,
        trainer.rank,
        trainer.world_size,
    )
    return [trainer.step([as_batch(batch)])[0].hex() for _, batch in zip(range(iterations), loader)]


def files(folder: Path) -> list[tuple[str, int]]:
    return sorted((p.as_posix(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file())


def swap(trainer: Trainer, config: TrainConfig) -> dict[str, Any]:
    """The average in place of the weights, and out again."""
    inputs = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8).bfloat16(), torch.tensor([800.0, 300.0]), torch.arange(2)
    student = trainer.engine.module.student
    before, average = weights(trainer), trainer.ema.full_state_dict()
    shards = {name: p.ds_tensor.clone() for name, p in trainer.ema.parameters.items()}
    with torch.no_grad():
        raw = student(*inputs).means.float()  # leaves what it gathered in the cache
        with trainer.ema.swapped_in(trainer.engine):
            swapped, inside = student(*inputs).means.float(), weights(trainer)
        after = student(*inputs).means.float()
    facts: dict[str, Any] = {
        "out_exact": all(torch.equal(value, before[name]) for name, value in weights(trainer).items()),
        "shards_exact": all(torch.equal(p.ds_tensor, shards[n]) for n, p in trainer.ema.parameters.items()),
        "output_exact": torch.equal(raw, after),
    }
    if trainer.rank == 0:
        facts["in_exact"] = all(
            torch.equal(inside[f"weight.{n}"].float(), value.bfloat16().float()) for n, value in average.items()
        )
        reference = build_module(config).student
        reference.load_state_dict(average, strict=False)
        with torch.no_grad():
            expected = reference.bfloat16()(*inputs).means.float()
        facts["difference"] = (swapped - expected).abs().max().item()
        facts["effect"] = (swapped - raw).abs().max().item()
    return facts


def fill_disk(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Rank 1 can write no large file any more, then rank 0 cannot."""
    before, messages = files(folder), []
    for full in (1, 0):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if trainer.rank == full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            trainer.save()
            message = ""
        except TrainingError as error:
            message = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        everyone: list[Any] = [None, None]
        dist.all_gather_object(everyone, message)
        messages.append(everyone)
    leftovers = [p.name for p in trainer.store.local.iterdir() if not p.name.startswith(("step_", "latest"))]
    return {"messages": messages, "untouched": files(folder) == before != [], "leftovers": leftovers}


def lose_storage(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """The URL fails while a checkpoint is copied to it: with more to come, in the last one, and no more."""
    remote, away = folder / "remote", folder / "away"
    facts: dict[str, Any] = {"before": sorted(os.listdir(remote))}
    dist.barrier()
    if trainer.rank == 0:
        remote.rename(away)
        remote.touch()
    said = []
    for last in (False, True):
        try:
            path = trainer.save(last)
            said.append("")
            facts["verify"] = verify(path)
        except TrainingError as error:
            said.append(str(error))
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, said)
    facts |= {"said": everyone, "here": sorted(os.listdir(trainer.store.local))}
    dist.barrier()
    if trainer.rank == 0:
        remote.unlink()
        away.rename(remote)
    dist.barrier()
    facts["after"] = sorted(os.listdir(remote))
    return facts


def skip_and_resume(trainer: Trainer, config: TrainConfig) -> list[int]:
    """How many iterations in a row were skipped, before a checkpoint and after."""
    batch = as_batch(next(iter(trainer.loader)))
    trainer.step([{name: value * math.nan if value.is_floating_point() else value for name, value in batch.items()}])
    trainer.save()
    again = Trainer(config, trainer.rank, trainer.world_size, resume="latest")
    again.resume()
    return [trainer.skipped_in_a_row, again.skipped_in_a_row]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("stage")
    parser.add_argument("--local_rank", type=int)
    arguments = parser.parse_args()
    rank, world_size = prepare_process()
    configs = {"all": make_config(arguments.folder, arguments.teacher), "lora": make_lora_config(arguments.folder)}
    reports = {}
    for kind, config in configs.items():
        trainer = Trainer(config, rank, world_size, resume="auto")
        report: dict[str, Any] = {"messages": trainer.resume(), "progress": trainer.progress.position}
        stored = arguments.folder / f"{kind}.pt"
        if arguments.stage != "first":
            expected, state = torch.load(stored), whole_state(trainer)
            report["different"] = [n for n, value in state.items() if not torch.equal(value, expected[n])]
            report["compared"] = len(state)
            report["scratch"] = [p.name for p in trainer.store.local.glob("universal_*")]
        report["losses"] = train(trainer, 3)
        if arguments.stage == "first" and kind == "all":
            trainer.save()
            train(trainer, 1)
            report["disk"] = fill_disk(trainer, arguments.folder)
            report["storage"] = lose_storage(trainer, arguments.folder)
            report["swap"] = swap(trainer, config)
        path = trainer.save()
        state = whole_state(trainer)
        if rank == 0:
            torch.save(state, stored)
            report["verify"] = verify(path)
            report["kept"] = sorted(os.listdir(trainer.store.local))
            saved = torch.load(path / "engine" / "zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=False)
            frozen = {name for name, p in trainer.engine.module.named_parameters() if not p.requires_grad}
            report["frozen"], report["frozen_saved"] = len(frozen), len(frozen & saved["module"].keys())
        if arguments.stage == "more" and kind == "lora":
            report["skipped"] = skip_and_resume(trainer, config)
        reports[kind] = report
    if rank == 0:
        reports["all"]["kept_remotely"] = sorted(os.listdir(arguments.folder / "remote"))
        (arguments.folder / f"{arguments.stage}.json").write_text(json.dumps(reports))
    dist.barrier()


if __name__ == "__main__":
    main()
    leave_process(0)
