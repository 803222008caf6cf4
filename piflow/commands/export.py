"""`piflow export`: the student of a training, as a folder that this library and diffusers read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from piflow.commands.common import AsJson, json_object, progress, told


def export(
    ckpt: Annotated[Path, typer.Option(help="Checkpoint or output folder of a training, or a saved student's folder.")],
    out_dir: Annotated[Path, typer.Option(help="Folder to write, in the published format.")],
    ema: Annotated[
        bool,
        typer.Option(
            "--ema/--no-ema",
            help="The averaged weights, or the raw ones, which are pickled: --allow-pickle too.",
        ),
    ] = True,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickled files, of a run that you trust.")
    ] = False,
    policy_config: Annotated[
        str | None, typer.Option(help='JSON for the weights\' metadata, such as \'{"type": "GMFlow"}\'.')
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the student of a checkpoint as a folder that this library and diffusers read."""
    with told(), progress() as bars:
        bars.add_task(f"reading {ckpt}", total=None)
        from piflow.models.export import export_checkpoint

        policy = None if policy_config is None else json_object("--policy-config", policy_config)
        folder = export_checkpoint(
            ckpt, out_dir, ema=ema, allow_pickle=allow_pickle, policy_config=policy, overwrite=overwrite
        )
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "weights": "averaged" if ema else "raw"}))
    else:
        typer.echo(f"{'averaged' if ema else 'raw'} student written to {folder}")
