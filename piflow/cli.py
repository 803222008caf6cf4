"""The `piflow` command. Each sub-command is one function here, which imports what it needs when it is called."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError as missing:
    sys.exit(
        f"piflow: the command needs the package {missing.name}, the operators do not: pip install 'piflow[diffusers]'."
    )

from piflow.commands.cache import cache_latents, cache_prompts
from piflow.commands.plan import plan
from piflow.commands.train import train

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def piflow() -> None:
    """pi-Flow: few-step generation with policies (arXiv 2510.14974)."""


@app.command()
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
) -> None:
    """Write the student of a checkpoint as a folder that this library and diffusers read."""
    with told():
        from piflow.models.export import export_checkpoint

        policy = None if policy_config is None else json_object("--policy-config", policy_config)
        folder = export_checkpoint(
            ckpt, out_dir, ema=ema, allow_pickle=allow_pickle, policy_config=policy, overwrite=overwrite
        )
        typer.echo(f"{'averaged' if ema else 'raw'} student written to {folder}")


app.command()(cache_prompts)
app.command()(cache_latents)
app.command()(plan)
app.command()(train)


def json_object(option: str, text: str) -> dict[str, Any]:
    """What an option holds as JSON. Raises ValueError that names the option."""
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{option}: expected a JSON object, got {text}")
    return content


@contextmanager
def told() -> Iterator[None]:
    """Errors that are the person's to mend end the command with one message, and not with a traceback."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not hasattr(error, "exit_code"):
            raise
        print(f"piflow: {error}", file=sys.stderr)
        raise typer.Exit(getattr(error, "exit_code", 1)) from error


def main() -> None:
    """Entry point of the `piflow` command."""
    try:
        app()
    except ModuleNotFoundError as missing:
        sys.exit(
            f"piflow: this needs the package {missing.name}: pip install 'piflow[training]' has all that commands use."
        )


if __name__ == "__main__":
    main()
