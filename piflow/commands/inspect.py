"""`piflow inspect`: what an adapter, student, checkpoint, training, pipeline or picture is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from piflow.commands.common import AsJson, progress, told


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Safetensors file; folder of an adapter, student, checkpoint, training, pipeline or cache; picture.",
        ),
    ],
    verify: Annotated[bool, typer.Option("--verify", help="Also compare the hashes of a checkpoint's files.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell what a file is: policy, K or N, base model, trained NFE, LoRA, sizes, precision.

    Only headers and JSON are read, so that it is quick for files of any size; nothing is unpickled or run. The exit
    code is 1 for what is damaged, pickled or none of this library's business.
    """
    with told(), progress() as bars:
        bars.add_task(f"reading {path}", total=None)
        from piflow.commands.facts import facts_of

        facts = facts_of(path, verify)
    typer.echo(json.dumps(facts, indent=1) if as_json else "\n".join(as_lines(facts)))
    if False in (facts.get("whole"), facts.get("newest_checkpoint", {}).get("whole")):
        raise typer.Exit(1)


def as_lines(facts: dict[str, Any], indent: str = "") -> Iterator[str]:
    """The facts for people: one a line, those of a part indented."""
    width = max(len(key) for key in facts) + 2
    for key, value in facts.items():
        label = f"{indent}{key.replace('_', ' '):<{width}}"
        if isinstance(value, dict) and ("kind" in value or key == "settings"):
            yield f"{indent}{key.replace('_', ' ')}"
            yield from as_lines(value, indent + "    ")
        elif value is None and key in ("trained_nfe", "components", "grid_points"):
            yield f"{label}not stated"
        elif value not in (None, {}):
            yield f"{label}{_said(value, key)}"


def _said(value: Any, key: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "bytes":
        return f"{value / 1e9:.2f} GB" if value >= 1e7 else f"{value / 1e6:.2f} MB"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict) and key == "targets":
        return ", ".join(f"{path} ({count})" for path, count in value.items())
    if isinstance(value, dict):
        parts = ((name.replace("_", " "), item) for name, item in value.items() if item is not None)
        return ", ".join(f"{name} {_said(item, name)}" for name, item in parts)
    if isinstance(value, list | tuple):
        return ", ".join(_said(item, key) for item in value) or "none"
    return str(value)
