"""The `piflow` command where only the operators are installed: `doctor` and `--version` work, all else says why not."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import redirect_stdout

import piflow


def main(arguments: list[str], missing: str | None) -> int:
    """The exit code of `piflow ARGUMENTS` without the package `missing`."""
    if arguments == ["--version"]:
        print(f"piflow {piflow.__version__}")
        return 0
    if arguments not in (["doctor"], ["doctor", "--json"]):
        print(
            f"piflow: the command needs the package {missing}, the operators do not: pip install 'piflow[diffusers]'. "
            "Until then `piflow doctor [--json]` tells what is here and what is missing.",
            file=sys.stderr,
        )
        return 1
    from piflow.commands.diagnosis import as_lines, available_devices, diagnose

    with redirect_stdout(sys.stderr):
        report = diagnose(available_devices())
    try:
        print(json.dumps(report, indent=1) if "--json" in arguments else "\n".join(as_lines(report)), flush=True)
    except BrokenPipeError:  # the reader has gone away, as `head` does; Python would flush, and fail, once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return 0 if report["ok"] else 1
