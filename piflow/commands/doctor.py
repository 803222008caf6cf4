"""`piflow doctor`: what is installed, what will run on which device, and whether it computes the right numbers."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from typing import Any

import typer

from piflow.commands.common import AsJson, progress


def doctor(as_json: AsJson = False) -> None:
    """Check this machine: packages, devices, and the operators against the float64 textbook.

    It ends with exit code 1 if an operator is wrong or an installed version clashes; extras that are not installed are
    listed, and no fault.
    """
    with redirect_stdout(sys.stderr), progress() as bars:  # whatever a library prints, stdout holds the report alone
        task = bars.add_task("looking around", total=None)
        from piflow.commands.diagnosis import as_lines, available_devices, diagnose
        from piflow.commands.self_test import number_of_cases

        devices = available_devices()
        bars.update(task, description="testing the operators", total=number_of_cases(devices))

        def on_case(case: dict[str, Any]) -> None:
            bars.advance(task)

        report = diagnose(devices, on_case)
    typer.echo(json.dumps(report, indent=1) if as_json else "\n".join(as_lines(report)))
    if not report["ok"]:
        raise typer.Exit(1)
