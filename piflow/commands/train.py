"""`piflow train`: what `deepspeed --module piflow.train` does, from one command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from piflow.commands.common import told


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
) -> None:
    """Distil a student. On several machines use the `deepspeed` launcher itself, with --module piflow.train."""
    with told():
        from piflow.training.config import load_config

        load_config(config, overrides or ())  # what cannot be used is said now, not after the launcher's seconds
    import torch

    from piflow.train import main

    processes = processes or max(torch.cuda.device_count(), 1)
    arguments = [str(config), *(overrides or ()), "--resume", resume]
    if dry_run:
        raise typer.Exit(main([*arguments, "--dry-run"], processes))
    if "RANK" in os.environ:  # a launcher started this process as one of its ranks
        from piflow.training.engine import leave_process

        leave_process(main(arguments))

    from piflow.training.errors import TrainingError
    from piflow.training.launch import launch_training

    try:
        launch_training(
            config,
            overrides or (),
            processes,
            resume=resume,
            on_line=lambda line: print(line, flush=True),
        )
    except TrainingError as error:  # its last lines were printed already
        print(f"piflow: {str(error).partition(' Its last lines')[0]}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
