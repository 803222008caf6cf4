"""Run by the deepspeed launcher on each rank: trains every tiny recipe, and writes what it saw to FOLDER/report.json.

deepspeed --num_gpus 2 --module tests.training.recipe_checks FOLDER
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator
from deepspeed.utils import safe_get_full_grad
from torch import Generator, Tensor

from piflow.data.shards import Plan, ShardWriter
from piflow.distillation import imitation_trajectory, teacher_ratio_at
from piflow.training.calls import Batch
from piflow.training.config import TrainConfig, load_config
from piflow.training.data import build_loader, derive_seed
from piflow.training.engine import build_optimizer, leave_process, prepare_process
from piflow.training.errors import CheckpointError, ConfigError
from piflow.training.loop import NOISE_STREAM, Trainer
from piflow.training.module import PiIDModule, build_module
from piflow.training.networks import blocks_of
from piflow.training.teachers import build_teacher

TINY = Path(__file__).parents[2] / "configs" / "tiny"
RECIPES = sorted(path.relative_to(TINY).with_suffix("").as_posix() for path in TINY.rglob("*.yaml"))
ITERATIONS = 3
PARITY = ("qwen_image/gm_4nfe", "qwen_image/gm_4nfe_data_free", "flux/dx_4nfe", "flux2/gm_4nfe", "imagenet/dit_2nfe")
"""Recipes that are compared with a plain loop."""

Batches = list[list[list[Batch]]]
"""[rank][iteration][accumulation]."""


def make_config(folder: Path, recipe: str, **more: str) -> TrainConfig:
    """A recipe with few iterations, in which every schedule has something to do."""
    settings = {
        "output_dir": folder / recipe, "iterations": ITERATIONS, "optimizer.warmup_iterations": 2,
        "optimizer.gradient_clipping": 1e-3, "optimizer.clipping_start_iteration": 1,
        "distillation.teacher_ratio_decay": 0 if recipe.startswith("imagenet") else 2,
        "distillation.teacher_ratio": 0 if recipe.startswith("imagenet") else 1,
        "ema.start_iteration": 1, "zero.max_reuse_distance": 10**9,
    }  # fmt: skip
    if recipe in PARITY and not recipe.startswith("imagenet"):
        settings["student.lora.dropout"] = 0  # whose draws a plain loop does not share
    settings |= more
    return load_config(TINY / f"{recipe}.yaml", [f"{key}={value}" for key, value in settings.items()])


def micro_loss(module: PiIDModule, config: TrainConfig, batch: Batch, iteration: int, generator: Generator) -> Tensor:
    """The loss of a batch; data-free, that of piflow.distillation's own walk over all segments."""
    if not config.distillation.data_free:
        return module(batch, iteration, generator)
    settings = config.distillation
    condition, null = module.calls.conditions(batch)
    count, latents = len(next(iter(condition.values()))), torch.empty(1, *(settings.latent_shape or ()))
    shape, size = module.calls.state(latents).shape[1:], (latents.shape[2], latents.shape[3])
    walk = imitation_trajectory(
        lambda x_src, source: module.policy(x_src, source, condition, size),
        module.teacher_velocity(condition, null, size),
        torch.randn(count, *shape, generator=generator),
        module.schedule,
        module.imitation,
        teacher_ratio=teacher_ratio_at(iteration, settings.teacher_ratio_decay, settings.teacher_ratio),
        generator=generator,
    )
    return torch.stack([weight * result.loss for weight, result in walk]).sum()


def plain_loop(config: TrainConfig, batches: Batches) -> dict[str, Any]:
    """The same run in one process with plain torch: the reference."""
    module = build_module(config).to(torch.bfloat16 if config.precision == "bfloat16" else torch.float32)
    optimizer = build_optimizer(module, config)
    trainable = [p for p in module.parameters() if p.requires_grad]
    losses, norms, grads = [], [], {}
    for iteration in range(config.iterations):
        per_rank = []
        for rank, rank_batches in enumerate(batches):
            generator = Generator().manual_seed(derive_seed(config.seed, NOISE_STREAM, iteration, rank))
            per_rank += [micro_loss(module, config, b, iteration, generator) for b in rank_batches[iteration]]
        loss = torch.stack(per_rank).mean()
        optimizer.zero_grad()
        loss.backward()
        if iteration == 0:
            named = [(name, p) for name, p in module.student.named_parameters() if p.requires_grad]
            grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}
        settings = config.optimizer
        limit = settings.gradient_clipping if iteration >= settings.clipping_start_iteration else math.inf
        norms.append(torch.nn.utils.clip_grad_norm_(trainable, limit).item())
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(iteration)
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "gradients": grads}


@contextmanager
def gradients_of(trainer: Trainer) -> Iterator[dict[str, Tensor]]:
    """The whole gradient {name: on the CPU} of each trained parameter at the optimiser step within; collective."""
    grads: dict[str, Tensor] = {}
    step = trainer.engine.step

    def noting() -> None:
        grads.update({name: safe_get_full_grad(p).cpu() for name, p in trainer.ema.parameters.items()})
        step()

    trainer.engine.step = noting
    try:
        yield grads
    finally:
        trainer.engine.step = step


def read_batches(config: TrainConfig, world_size: int) -> Batches:
    """What each rank reads."""
    count = config.accumulation(world_size)
    whole = []
    for rank in range(world_size):
        loader = build_loader(config.data, config.seed, config.batch_size_per_rank, 0, rank, world_size)
        stream = iter(loader)
        whole.append([list(islice(stream, count)) for _ in range(config.iterations)])
    return whole


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Within, counts invalidated traces and the largest number of the gathered ones among `seen["parameters"]`."""
    seen: dict[str, Any] = {"invalidations": 0, "peak": 0, "parameters": []}
    invalidate, fetch = Coordinator._invalidate_trace, Coordinator.fetch_sub_module

    def count(self: Any) -> Any:
        seen["invalidations"] += 1
        return invalidate(self)

    def measure(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = fetch(self, *args, **kwargs)
        gathered = (p.ds_numel for p in seen["parameters"] if p.ds_status != ZeroParamStatus.NOT_AVAILABLE)
        seen["peak"] = max(seen["peak"], sum(gathered))
        return result

    Coordinator._invalidate_trace, Coordinator.fetch_sub_module = count, measure
    try:
        yield seen
    finally:
        Coordinator._invalidate_trace, Coordinator.fetch_sub_module = invalidate, fetch


def on_every_rank(value: Any) -> list[Any]:
    """The value of each rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def hexed(history: list[tuple[float, float]]) -> list[list[str]]:
    return [[x.hex() for x in pair] for pair in history]


def check_resume(config: TrainConfig, rank: int, world_size: int) -> dict[str, Any]:
    """A LoRA run that is saved, and goes on from there; a prompt that is not finite, on rank 1 only."""
    batches = read_batches(config, world_size)[rank]
    trainer = Trainer(config, rank, world_size)
    trainer.step(batches[0])
    trainer.save()
    history = [trainer.step(batches[i])[:2] for i in range(1, config.iterations)]
    report: dict[str, Any] = {}
    shards = [s.clone() for s in trainer.ema.current_shards().values()]
    good, first = batches[0][1:], dict(batches[0][0])
    first["prompt_embeds"] = first["prompt_embeds"] * (math.nan if rank == 1 else 1.0)
    with watched() as seen:
        skipped = trainer.step([first, *good])[:2]
        same = all(torch.equal(a, b) for a, b in zip(shards, trainer.ema.current_shards().values()))
        report["skipped"] = on_every_rank([same, trainer.skipped, math.isfinite(skipped[0])])
        report["after_skip"] = trainer.step(batches[0])[:2]
    report["invalidations"] = seen["invalidations"]
    trainer.engine.destroy()
    again = Trainer(config, rank, world_size, resume="latest")
    again.resume()
    report["resumed"] = on_every_rank(hexed([again.step(batches[i])[:2] for i in range(1, config.iterations)]))
    report["history"] = hexed(history)
    again.engine.destroy()
    return report


def check_refused(folder: Path, rank: int) -> list[list[str]]:
    """What each rank says to a run that cannot be, whose teacher is damaged too: nobody got as far as to read it."""
    teacher, prompts = folder / "damaged", folder / "prompts"
    if rank == 0:
        shutil.copytree(folder / "teacher", teacher)
        writer = ShardWriter(
            prompts, Plan(kind="prompts", items=2, shard_size=2, settings={}), ragged=["prompt_embeds"]
        )
        writer.write(0, [(place, {"prompt_embeds": torch.zeros(3, 24)}) for place in range(2)])
        writer.finish()
        for damaged in (next(teacher.glob("*.safetensors")), next(prompts.glob("*.safetensors"))):
            damaged.write_bytes(damaged.read_bytes()[:-8])
    dist.barrier()
    settings = {"teacher.random": "null", "teacher.path": str(teacher)}
    nothing_left = {"data.kind": "prompts", "data.path": str(prompts), "data.on_corrupt": "skip"}
    said = []
    for more in (
        nothing_left,
        {"output_dir": str(teacher / "config.json" / "run")},
        {"output_dir": str(folder / "new")},
    ):
        config = make_config(folder, "qwen_image/gm_4nfe_data_free", **settings, **more)
        try:
            Trainer(config, rank, dist.get_world_size(), resume="latest")
            raise AssertionError("a run that cannot be has started")
        except (ConfigError, CheckpointError) as error:
            said.append(on_every_rank(str(error)))
    return said


def check_loaded(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """The same teacher from files as made at random: with LoRA, and trained whole."""
    random = make_config(folder, "qwen_image/gm_4nfe")
    if rank == 0:
        build_teacher(random).save_pretrained(folder / "teacher")
    dist.barrier()
    report = {}
    for name, more in {"lora": {}, "whole": {"student.lora": "null"}}.items():
        there = {"teacher.random": "null", "teacher.path": str(folder / "teacher"), **more}
        config = make_config(folder, "qwen_image/gm_4nfe", output_dir=str(folder / f"loaded_{name}"), **there)
        report[name] = check(config, rank, world_size, compare=True)
    return report


def fixed_weights(trainer: Trainer) -> list[Tensor]:
    """This rank's shards of what must not change."""
    return [p.ds_tensor.clone() for p in trainer.engine.module.parameters() if not p.requires_grad]


def check(config: TrainConfig, rank: int, world_size: int, compare: bool) -> dict[str, Any]:
    """Train a recipe, export it, and say what was seen."""
    report: dict[str, Any] = {}
    batches = read_batches(config, world_size)
    with watched() as seen:
        trainer = Trainer(config, rank, world_size)
        seen["parameters"] = list(trainer.engine.module.parameters())
        before, average = fixed_weights(trainer), [s.clone() for s in trainer.ema.shadow.values()]
        with gradients_of(trainer) as gradients:
            history = [trainer.step(batches[rank][0])[:2]]
        after_first = seen["invalidations"]
        history += [trainer.step(batches[rank][i])[:2] for i in range(1, config.iterations)]
    report["losses"], report["norms"] = zip(*history)
    report["invalidations"] = seen["invalidations"] - after_first
    coordinator = trainer.engine.optimizer.parameter_offload.get_param_coordinator()
    report["trace_complete"] = coordinator.is_complete_trace()
    master = {p.dtype for p in trainer.engine.optimizer.fp32_partitioned_groups_flat}
    report["dtypes"] = sorted({str(p.dtype) for p in trainer.engine.module.parameters()}), sorted(map(str, master))
    report["frozen_unchanged"] = all(torch.equal(a, b) for a, b in zip(before, fixed_weights(trainer)))
    moved = [not torch.equal(a, b) for a, b in zip(average, trainer.ema.shadow.values())]
    report["moved"] = sum(moved) / len(moved)
    report["position"] = trainer.progress.position
    trainer.save()
    trainer.export()
    if compare and rank == 0:
        expected = plain_loop(config, batches)
        report["expected_losses"], report["expected_norms"] = expected["losses"], expected["norms"]
        report["gradient_errors"] = {
            name: ((gradients[name] - grad).norm() / grad.norm().clamp(min=1e-6)).item()
            for name, grad in expected["gradients"].items()
        }
    dist.barrier()
    trainer.engine.destroy()
    return report


def check_gathered(folder: Path, recipe: str, rank: int, world_size: int) -> dict[str, int]:
    """The most parameters that are whole at once, with ZeRO-3's numbers in blocks as in the big recipes."""
    config = make_config(folder, recipe, **DEEPER[recipe.partition("/")[0]])
    block = max(sum(p.numel() for p in b.parameters()) for b in blocks_of(build_module(config, meta=True).student))
    zero = {"max_reuse_distance": 0, "prefetch_bucket_size": block, "max_live_parameters": 2 * block}
    more = {f"zero.{key}": str(value) for key, value in zero.items()}
    config = make_config(
        folder, recipe, output_dir=str(folder / "gathered"), **DEEPER[recipe.partition("/")[0]], **more
    )
    batches = read_batches(config, world_size)[rank]
    with watched() as seen:
        trainer = Trainer(config, rank, world_size)
        seen["parameters"] = list(trainer.engine.module.parameters())
        trainer.step(batches[0])
        after_first = seen["invalidations"]
        trainer.step(batches[1])
    trainer.engine.destroy()
    whole = sum(p.ds_numel for p in seen["parameters"])
    return {"block": block, "peak": seen["peak"], "whole": whole, "invalidations": seen["invalidations"] - after_first}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--local_rank", type=int)
    folder = parser.parse_args().folder
    rank, world_size = prepare_process()
    report: dict[str, Any] = {}
    for recipe in RECIPES:
        report[recipe] = check(make_config(folder, recipe), rank, world_size, recipe in PARITY)
    report["gathered"] = {recipe: check_gathered(folder, recipe, rank, world_size) for recipe in GATHERED}
    low = {"precision": "bfloat16", "output_dir": str(folder / "bfloat16"), "student.lora.dropout": "0"}
    bfloat16 = make_config(folder, "flux/gm_4nfe", **low)
    report["bfloat16"] = check(bfloat16, rank, world_size, compare=True)
    again = {"output_dir": str(folder / "resumed"), "precision": "bfloat16", "student.lora.dropout": "0.1"}
    report["resume"] = check_resume(make_config(folder, "qwen_image/gm_4nfe_data_free", **again), rank, world_size)
    report["loaded"] = check_loaded(folder, rank, world_size)
    report["refused"] = check_refused(folder, rank)
    if rank == 0:
        (folder / "report.json").write_text(json.dumps(report))
    dist.barrier()


GATHERED = ("imagenet/dit_2nfe", "flux/gm_4nfe", "flux2/gm_4nfe", "qwen_image/gm_4nfe_data_free")
"""Recipes of which the gathered parameters are counted."""
LAYERS, WIDTH = {"teacher.random.num_layers": "6"}, {"teacher.random.num_attention_heads": "4"}
DEEPER = {
    "imagenet": LAYERS | WIDTH, "qwen_image": LAYERS | WIDTH,
    "flux": {"teacher.random.num_layers": "3", "teacher.random.num_single_layers": "4"} | WIDTH,
    "flux2": {"teacher.random.num_layers": "3", "teacher.random.num_single_layers": "4"} | WIDTH,
}  # fmt: skip
"""Enough blocks, wide enough, that what is beside them is small."""


if __name__ == "__main__":
    main()
    leave_process(0)
