"""`piflow demo`: the digits, from the teacher to measured few-step students."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

import piflow
from piflow.commands.common import AsJson, told


def demo(
    out: Annotated[Path, typer.Option(help="Folder of students, report and pictures.")] = Path("outputs/digits"),
    configs: Annotated[
        list[Path] | None, typer.Option("--config", help="Training to run (repeatable). By default 1, 2 and 4 NFE.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Other value for every training (repeatable).")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Ranks of each training.")] = 2,
    num_samples: Annotated[int | None, typer.Option(min=2, help="Samples that are measured (default 2000).")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train anew what is finished; it is moved aside.")] = False,
    as_json: AsJson = False,
) -> None:
    """Distil a digits teacher into few-step students, sample, measure, and write a report with pictures.

    No download and no GPU: some minutes on two CPU cores. Finished students are kept, an interrupted run goes on. The
    exit code is 1 if a student misses its bar.
    """
    with told(), _how_to_go_on(fresh), redirect_stdout(sys.stderr if as_json else sys.stdout):
        from rich.console import Console

        from piflow.digits.demo import run_demo, show_report
        from piflow.digits.report import ReportSettings

        console = Console()
        report = run_demo(
            configs or default_configs(),
            out,
            overrides=overrides or (),
            num_processes=processes,
            num_samples=num_samples or ReportSettings.num_samples,
            fresh=fresh,
            console=console,
        )
        met = show_report(report, out, console)
    if as_json:
        typer.echo(json.dumps({**report, "folder": str(out)}))
    if not met:
        raise typer.Exit(1)


@contextmanager
def _how_to_go_on(fresh: bool) -> Iterator[None]:
    from piflow.training.errors import Interrupted

    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stop:
        again = f"run the same command again{' without --fresh' * fresh}"
        print(f"piflow: stopped. To go on, {again}: finished students are kept.", file=sys.stderr)
        raise typer.Exit(getattr(stop, "exit_code", 130)) from stop


def default_configs() -> list[Path]:
    """The configurations of the digits: those that an installed package brings along, or the checkout's."""
    package = Path(piflow.__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "digits").is_dir():
            return [folder / "digits" / f"nfe{nfe}.yaml" for nfe in (1, 2, 4)]
    raise ValueError("this installation lacks the configurations of the digits: give some with --config.")
