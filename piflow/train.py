"""Distil a few-step student from a teacher with pi-ID, on as many processes as the launcher starts.

    deepspeed --module piflow.train CONFIG.yaml [a.b=c ...] [--resume auto|latest|never|PATH] [--dry-run]

Ends with exit code 0, or with one message and 1 (the run failed), 2 (configuration), 3 (checkpoint). SIGINT and SIGTERM
finish the step, save, say how to go on, and end with 128 + their number.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from piflow.training.config import TrainConfig, load_config
from piflow.training.errors import TrainingError
from piflow.training.signals import raise_on_stop

if TYPE_CHECKING:
    from piflow.training.plan import Plan

PATIENCE = 30
"""Seconds that other ranks give rank 0 to say what went wrong."""


def main(argv: Sequence[str] | None = None, processes: int | None = None) -> int:
    """One rank of the command; returns the exit code.

    processes: how many a dry run speaks of, where no launcher says it; None is one.
    """
    arguments = _parse(argv)
    rank, problem, joined = int(os.environ.get("RANK", "0")), "", False
    try:
        with raise_on_stop():
            config = load_config(arguments.config, arguments.overrides)
            if arguments.dry_run:
                return _dry_run(config, int(os.environ.get("WORLD_SIZE", processes or 1))) if rank == 0 else 0
            exit_code = _run(config, arguments)
    except TrainingError as error:
        problem, joined, exit_code = str(error), "piflow.training.loop" in sys.modules, error.exit_code
        if rank == 0:
            print(f"piflow.train: {error}", file=sys.stderr, flush=True)
    if exit_code and rank != 0:  # rank 0, which speaks, takes the others with it as it leaves
        time.sleep(PATIENCE)
        if problem and joined:
            print(f"piflow.train: rank {rank} has failed alone: {problem}", file=sys.stderr, flush=True)
    return exit_code


def _run(config: TrainConfig, arguments: argparse.Namespace) -> int:
    from piflow.training.engine import prepare_process

    rank, world_size = prepare_process()
    from piflow.training.logging import RunLogger
    from piflow.training.loop import Trainer

    trainer = Trainer(config, rank, world_size, resume=arguments.resume)
    messages = trainer.resume()
    start = trainer.progress.iteration
    with (
        contextlib.closing(trainer),
        RunLogger(
            trainer.logs.local,
            config.iterations,
            start,
            config.log_every,
            rank == 0,
            config.logging.wandb,
            config.model_dump(mode="json"),
        ) as logger,
    ):
        if rank == 0:
            (trainer.output_dir / "config.yaml").write_text(config.to_yaml())
        for message in messages:
            logger.say(message)
        logger.say(f"{arguments.config}: {config.iterations - start} iterations on {world_size} process(es)")
        stopped_by = trainer.train(logger)
        if stopped_by:
            logger.say(
                f"stopped by {signal.Signals(stopped_by).name} after iteration {trainer.progress.iteration}; "
                f"everything is saved in {trainer.store}. Go on with:\n  {_resume_command(arguments, world_size)}"
            )
            return 128 + stopped_by
        logger.say(f"student saved in {trainer.export()}")
    return 0


def _resume_command(arguments: argparse.Namespace, world_size: int) -> str:
    """A line for the shell that needs no activated environment."""
    script = Path(sys.executable).with_name("deepspeed")
    launcher = [str(script)] if script.is_file() else [sys.executable, "-m", "deepspeed.launcher.runner"]
    settings = [f"{name}={os.environ[name]}" for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS") if name in os.environ]
    words = [*launcher, "--num_gpus", str(world_size), "--module", "piflow.train", arguments.config]
    return shlex.join([*settings, *words, *arguments.overrides, "--resume", "latest"])


def planned(config: TrainConfig, world_size: int) -> tuple[dict[str, int], Plan]:
    """Parameter counts and memory of a run that is not started, also where there is no GPU, for a run elsewhere.

    Raises ConfigError for an optimiser that is not installed.
    """
    from piflow.training.engine import check_optimizer
    from piflow.training.networks import count_parameters
    from piflow.training.plan import memory_plan

    check_optimizer(config, needs_gpu=False)
    return count_parameters(config), memory_plan(config, world_size, gpu_memory=math.inf, advise=False)


def _dry_run(config: TrainConfig, world_size: int) -> int:
    batches = config.accumulation(world_size)
    counts, plan = planned(config, world_size)
    print(config.to_yaml(), end="")
    for name, count in counts.items():
        print(f"# {name}: {count:,} parameters")
    each = config.batch_size_per_rank
    print(f"# batch: {each * world_size * batches} = {each} x {world_size} process(es) x {batches} in turn")
    print(f"# memory of each of {world_size} process(es), {plan.peak / 1e9:.3g} GB in all:")
    for item in plan.items:
        print(f"#   {item.bytes / 1e9:.3g} GB {item.name} ({item.what})")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="piflow.train", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides of configuration keys")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|latest|never|PATH",
        help="auto: the newest checkpoint in output_dir if there is one (default); latest: there must be one; "
        "never: there must be none; PATH: this checkpoint",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration, parameter counts and memory plan"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    code = main()
    from piflow.training.engine import leave_process

    leave_process(code)
