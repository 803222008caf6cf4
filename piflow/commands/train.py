"""`piflow train`: what `deepspeed --module piflow.train` does, from one command."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from piflow.commands.common import AsJson, told

if TYPE_CHECKING:
    from piflow.training.config import TrainConfig

SAID_BY_RANKS = "piflow.train: "
"""How an error of the training itself begins."""


def train(
    config: Annotated[Path, typer.Argument(help="Configuration of the training.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="a.b=c: other values than the file's.")] = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|latest|never|PATH", help="The checkpoint to go on from.")
    ] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration, parameter counts and memory plan.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine. By default one for each GPU.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Distil a student. On several machines use the `deepspeed` launcher itself, with --module piflow.train.

    With --json the log goes to stderr, and stdout holds one object, also of a run that was stopped or has failed.
    """
    started = time.perf_counter()
    with told():
        from piflow.training.config import load_config

        # What cannot be used is said now, and not after the launcher's seconds.
        resolved = load_config(config, overrides or ())
    import torch

    from piflow.train import main

    processes = processes or max(torch.cuda.device_count(), 1)
    arguments = [str(config), *(overrides or ()), "--resume", resume]
    log, rank = sys.stderr if as_json else sys.stdout, os.environ.get("RANK")

    def tell(found: dict[str, Any]) -> None:
        if as_json and rank in (None, "0"):
            typer.echo(json.dumps(found))

    if dry_run and as_json:
        with told(), redirect_stdout(log):
            found = planned_facts(resolved, int(os.environ.get("WORLD_SIZE", processes)))
        tell(found)
    elif dry_run:
        raise typer.Exit(main([*arguments, "--dry-run"], processes))
    elif rank is not None:  # a launcher started this process as one of its ranks
        from piflow.training.engine import leave_process

        with redirect_stdout(log):
            code = main(arguments)
        tell(outcome(resolved, code, int(os.environ.get("WORLD_SIZE", "1")), time.perf_counter() - started))
        leave_process(code)
    else:
        code, problem = _launched(config, overrides or (), processes, resume, log)
        tell(outcome(resolved, code, processes, time.perf_counter() - started, problem))
        if code:
            raise typer.Exit(code)


def _launched(
    config: Path, overrides: Sequence[str], processes: int, resume: str, log: TextIO
) -> tuple[int, str | None]:
    """Exit code of the whole run, and what went wrong: as a rank says, else as the launcher's end tells."""
    from piflow.training.errors import TrainingError
    from piflow.training.launch import launch_training

    problems: list[str] = []

    def on_line(line: str) -> None:
        print(line, file=log, flush=True)
        if line.startswith(SAID_BY_RANKS):
            problems.append(line.removeprefix(SAID_BY_RANKS))

    try:
        launch_training(config, overrides, processes, resume=resume, on_line=on_line)
    except TrainingError as error:  # its last lines were printed already
        problem = str(error).partition(" Its last lines")[0]
        print(f"piflow: {problem}", file=sys.stderr)
        return error.exit_code, [problem, *problems][-1]
    return 0, None


def outcome(
    config: TrainConfig, exit_code: int, processes: int, seconds: float, problem: str | None = None
) -> dict[str, Any]:
    """What a run has come to, for JSON.

    `state` is "finished", "stopped" by SIGINT or SIGTERM with everything saved, or "failed". `iteration` and `loss` are
    those of the newest checkpoint, which the same command goes on from. `student` is None unless the run has finished.
    """
    from piflow.commands.facts import loss_of

    checkpoint, manifest = newest_checkpoint(config)
    stopped = exit_code - 128 in (signal.SIGINT, signal.SIGTERM)
    return {
        "state": "stopped" if stopped else "failed" if exit_code else "finished",
        "exit_code": exit_code,
        "problem": problem,
        "output_dir": str(config.output_dir),
        "student": None if exit_code else str(config.output_dir / "student"),
        "checkpoint": checkpoint and str(checkpoint),
        "iteration": manifest.get("iteration", 0),
        "iterations": config.iterations,
        "loss": loss_of(manifest),
        "processes": processes,
        "seconds": round(seconds, 2),
    }


def newest_checkpoint(config: TrainConfig) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint that the run's pointer names, and its manifest; (None, {}) where there is none yet."""
    from piflow.json_files import read_json_object
    from piflow.training.checkpoint_folder import POINTER
    from piflow.training.manifest import MANIFEST
    from piflow.training.storage import is_url

    place = config.directories.checkpoints  # a URL's are here too
    folder = config.output_dir / "checkpoints" if place is None or is_url(place) else Path(place)
    with contextlib.suppress(OSError, ValueError):
        path = folder / (folder / POINTER).read_text().strip()
        return path, read_json_object(path / MANIFEST)
    return None, {}


def planned_facts(config: TrainConfig, processes: int) -> dict[str, Any]:
    """What a dry run prints, for JSON: in bytes, and of each process."""
    from piflow.train import planned

    counts, plan = planned(config, processes)
    each, in_turn = config.batch_size_per_rank, config.accumulation(processes)
    return {
        "state": "dry run",
        "output_dir": str(config.output_dir),
        "processes": processes,
        "parameters": counts,
        "batch": {"size": each * processes * in_turn, "of_each_process": each, "in_turn": in_turn},
        "bytes": {item.name: item.bytes for item in plan.items},
        "peak": plan.peak,
        "config": config.model_dump(mode="json"),
    }
