"""A distillation step of Qwen-Image at full size on one GPU, with random weights that are made on the device.

    python -m benchmarks.full_size                 20.4e9 parameters and LoRA 256: a GPU of 100 GB or more, some minutes
    python -m benchmarks.full_size --scale tiny    two narrow blocks, the same code, on any machine

Runs the trainer on its own recipe, data-free pi-ID with 4 segments, and prints the peak memory, the seconds of a step,
and how they divide: student (forward, recomputation, backward), teacher, policy (rollouts, loss and their gradients),
optimiser (with the average). A step here has one batch; more batches of an iteration repeat all but the optimiser. At
full size the result is stored in benchmarks/results/<gpu>/full_size.json.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from os import environ
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import machine
from benchmarks.pipeline import Clock
from piflow.training.config import TrainConfig, load_config
from piflow.training.data import build_loader
from piflow.training.engine import deepspeed_config, leave_process, prepare_process
from piflow.training.loading import on_meta, partition
from piflow.training.loop import Trainer
from piflow.training.lora import lora_values
from piflow.training.module import PiIDModule, build_module
from piflow.training.networks import as_batch, diffusers_class
from piflow.training.plan import memory_plan

ROOT = Path(__file__).parents[1]
RECIPE = "qwen_image/gm_4nfe_data_free.yaml"
PROMPT_TOKENS = 256
SETTINGS = {
    "full": [
        "teacher.path=null",
        "teacher.random={}",
        "data.path=null",
        "data.kind=random",
        "data.workers=0",
        f"data.random={{prompt_width: 3584, prompt_length: {PROMPT_TOKENS}}}",
        "zero.param_persistence_threshold=1000000000000",  # the weights stay where they are
    ],
    "tiny": [],
}


def recipe(scale: str, batch: int, folder: str) -> TrainConfig:
    """The published recipe with random weights and prompts, or its tiny variant, and one batch an iteration."""
    path = ROOT / "configs" / ("tiny" if scale == "tiny" else "") / RECIPE
    common = [f"batch_size={batch}", f"batch_size_per_rank={batch}", f"output_dir={folder}"]
    return load_config(path, [*SETTINGS[scale], *common])


def random_values(
    parameters: Mapping[str, nn.Parameter], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Values on the device that keep activations finite: normal matrices, no biases, norms that scale by one."""
    values = {}
    for name, parameter in parameters.items():
        empty = torch.empty(parameter.shape, device=device, dtype=dtype)
        matrix, bias = parameter.dim() > 1, name.endswith("bias")
        values[name] = empty.normal_(std=0.02) if matrix else empty.fill_(0.0 if bias else 1.0)
    return values


def build(config: TrainConfig, device: torch.device) -> PiIDModule:
    """The trainer's module: no rank ever holds the base whole, or reads it from anywhere."""
    import deepspeed

    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    settings: dict[str, Any] = {"dtype": dtype, "config_dict_or_path": deepspeed_config(config)}
    assert config.teacher.random is not None
    network: Any = on_meta(diffusers_class(config.teacher), config.teacher.random)
    partition(network, partial(random_values, device=device, dtype=dtype), **settings)
    with deepspeed.zero.GatheredParameters([*network.norm_out.parameters(), *network.proj_out.parameters()]):
        module = build_module(config, network, fill=False)
    return partition(module, partial(lora_values, seed=config.seed), **settings)


def measure(scale: str, batch: int, steps: int) -> dict[str, Any]:
    """Peak memory and seconds of `steps` steps, and then their shares in as many more, which wait for each part."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    clock = Clock(device.type)
    with tempfile.TemporaryDirectory() as folder:
        config = recipe(scale, batch, folder)
        started = clock.now()
        trainer = Trainer(config, 0, 1, build(config, device))
        built = clock.now() - started
        loader = build_loader(config.data, config.seed, batch, 0, 0, 1)
        batches = [as_batch(loaded) for loaded in islice(loader, 2 + 2 * steps)]
        reset_peak(on_gpu)
        for number in range(2):  # in the second the trace of parameters is complete
            trainer.step([batches[number]])
        start = clock.now()
        losses = [trainer.step([loaded])[0] for loaded in batches[2 : 2 + steps]]
        seconds = (clock.now() - start) / steps
        peak = peak_bytes(on_gpu)
        with clocked(trainer, clock):
            start = clock.now()
            losses += [trainer.step([loaded])[0] for loaded in batches[2 + steps :]]
            total = clock.now() - start
        planned = memory_plan(config, 1, 141e9, prompt_tokens=PROMPT_TOKENS, advise=False)

    parts = {name: clock.seconds[name] for name in ("student", "teacher", "policy", "optimiser")}
    parts["rest"] = total - sum(parts.values())
    return {
        "scale": scale,
        "recipe": RECIPE,
        "batch": batch,
        "segments": config.distillation.nfe,
        "latents": config.distillation.latent_shape,
        "parameters": {"base": planned.counts.base, "trainable": planned.counts.trainable},
        "steps": steps,
        "seconds_to_build": built,
        "seconds_per_step": seconds,
        "seconds_per_step_clocked": total / steps,
        "share": {name: value / total for name, value in parts.items()},
        "peak_memory_bytes": peak,
        "planned_bytes": planned.peak,
        "flops_per_step": planned.flops,
        "losses": losses,
    }


@contextmanager
def clocked(trainer: Trainer, clock: Clock) -> Iterator[None]:
    """Take the time of the parts of a step; the device is waited for at each of their ends."""
    engine = trainer.engine
    module, marks = engine.module, {"reached": 0.0}

    def student(*args: Any, **kwargs: Any) -> Any:
        output = timed_student(*args, **kwargs)

        def reached(gradient: Tensor) -> None:
            marks["reached"] = clock.now()

        for tensor in output:
            if tensor.requires_grad:
                tensor.register_hook(reached)  # the last of them ends the policy's share of the backward pass
        return output

    def forward(*args: Any, **kwargs: Any) -> Any:
        before = clock.seconds["student"] + clock.seconds["teacher"]
        start = clock.now()
        loss = originals[2](*args, **kwargs)
        networks = clock.seconds["student"] + clock.seconds["teacher"] - before
        clock.seconds["policy"] += clock.now() - start - networks
        return loss

    def backward(*args: Any, **kwargs: Any) -> Any:
        start = clock.now()
        result = originals[3](*args, **kwargs)
        clock.seconds["policy"] += marks["reached"] - start
        clock.seconds["student"] += clock.now() - marks["reached"]
        return result

    places: list[tuple[Any, str]] = [
        (module.student, "forward"),
        (module.teacher, "forward"),
        (module, "forward"),
        (engine, "backward"),
        (engine, "step"),
        (trainer.ema, "update"),
    ]
    originals = [getattr(owner, name) for owner, name in places]
    own = [name in vars(owner) for owner, name in places]
    timed_student = clock.wrap("student", originals[0])
    replacements = [student, clock.wrap("teacher", originals[1]), forward, backward]
    replacements += [clock.wrap("optimiser", original) for original in originals[4:]]
    for (owner, name), replacement in zip(places, replacements):
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for (owner, name), original, is_own in zip(places, originals, own):
            if is_own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)


def reset_peak(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(on_gpu: bool) -> dict[str, int]:
    """Of the allocator on a GPU, of the whole process on a CPU."""
    if on_gpu:
        return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {"process": 1024 * int(match[1]) if match else 0}


def result_file(gpu: str) -> Path:
    """benchmarks/results/<gpu>/full_size.json."""
    return ROOT / "benchmarks" / "results" / re.sub(r"[^a-z0-9]+", "-", gpu.lower()) / "full_size.json"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_size", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scale", choices=SETTINGS, default="full")
    parser.add_argument("--batch", type=int, default=2, help="images of a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="steps of each measurement (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="store the result in this file")
    arguments = parser.parse_args(argv)
    facts = machine()
    if arguments.scale == "full" and facts["gpu"] == "none":
        print("The full size needs a GPU of 100 GB or more; this machine has none. Try --scale tiny.", file=sys.stderr)
        return 1

    if "MASTER_PORT" not in environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environ["MASTER_PORT"] = str(free.getsockname()[1])
    prepare_process()
    start = time.perf_counter()
    result = measure(arguments.scale, arguments.batch, arguments.steps)
    result["seconds_in_all"] = time.perf_counter() - start
    share = ", ".join(f"{name} {value:.2%}" for name, value in result["share"].items())
    memory = ", ".join(f"{name} {value / 1e9:.2f} GB" for name, value in result["peak_memory_bytes"].items())
    print(f"{result['parameters']['base']:,} parameters frozen, {result['parameters']['trainable']:,} trained")
    print(f"{result['seconds_per_step']:.3g} s a step of {result['segments']} segments and {arguments.batch} images")
    print(f"    {share}")
    print(f"    peak memory: {memory}; planned {result['planned_bytes'] / 1e9:.2f} GB of tensors")
    file = arguments.json or (result_file(facts["gpu"]) if arguments.scale == "full" else None)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"machine": facts, "full_size": result}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    leave_process(main())
