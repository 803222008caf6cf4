"""The `piflow` command. Each sub-command is one function of `piflow.commands`, which imports what it needs when called.

Exit codes: 0 done; 1 it could not be done, or the answer is no (`plan`: does not fit, `doctor`: not well, `demo`: a bar
is missed); 2 a command line or configuration that cannot be used; 3 a checkpoint that is missing or damaged; 128 + n
stopped by signal n, so 130 after Ctrl-C, and 141 where the reader of a pipe has gone away.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from inspect import getdoc
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError as missing:
    from piflow.commands.bare import main as bare_main

    sys.exit(bare_main(sys.argv[1:], missing.name))

import piflow
from piflow.commands.app import app as web_demo
from piflow.commands.cache import cache_latents, cache_prompts
from piflow.commands.demo import demo
from piflow.commands.doctor import doctor
from piflow.commands.evaluate import evaluate
from piflow.commands.export import export
from piflow.commands.inspect import inspect
from piflow.commands.plan import plan
from piflow.commands.sample import sample
from piflow.commands.train import train

IMAGES, STUDENTS, MACHINE = "Images", "Students", "Files and machine"
EXIT_CODES = "Exit codes: 0 done, 1 not done, 2 wrong usage or configuration, 3 bad checkpoint, 130 interrupted."

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")


def add(command: Callable[..., Any], panel: str, *examples: str) -> None:
    """Register a sub-command under its function's name, with command lines as examples below its help."""
    words = "Example" if len(examples) == 1 else "Examples"
    paragraphs = (getdoc(command) or "").split("\n\n")
    unwrapped = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    app.command(help=unwrapped, rich_help_panel=panel, epilog="\n\n".join([f"{words}:", *examples]))(command)


def show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"piflow {piflow.__version__}")
        raise typer.Exit


@app.callback(epilog=EXIT_CODES)
def of_all_commands(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """pi-Flow: few-step generation with policies (arXiv 2510.14974).

    `piflow COMMAND --help` explains a command and gives an example.
    """


add(
    sample,
    IMAGES,
    "piflow sample digits --class 0-9 --seed 0-3",
    "piflow sample Qwen/Qwen-Image --adapter Lakonik/pi-Qwen-Image --subfolder gmqwen_k8_piid_4step "
    "--prompt 'a bookshop window at dusk' --size 1664x928",
)
add(
    web_demo,
    IMAGES,
    "piflow app",
    "piflow app --flux black-forest-labs/FLUX.1-dev Lakonik/pi-FLUX.1/gmflux_k8_piid_4step",
)
add(demo, IMAGES, "piflow demo --out outputs/digits")
add(
    train,
    STUDENTS,
    "piflow train configs/digits/nfe4.yaml iterations=300 --processes 2",
    "piflow train configs/qwen_image/gm_4nfe_data_free.yaml --dry-run",
)
add(plan, STUDENTS, "piflow plan configs/qwen_image/gm_4nfe_data_free.yaml --gpus 8 --gpu-memory 80")
add(export, STUDENTS, "piflow export --ckpt outputs/train/qwen-image-gm-4nfe-data-free --out-dir my-adapter")
add(
    evaluate,
    STUDENTS,
    "piflow evaluate outputs/digits/nfe4/student --teacher digits:teacher --reference digits:data --features digits",
    "piflow evaluate samples.npz --reference VIRTUAL_imagenet256_labeled.npz --inception inception.pth",
)
add(cache_prompts, STUDENTS, "piflow cache-prompts prompts.txt --out data/prompts --model models/Qwen-Image")
add(cache_latents, STUDENTS, "piflow cache-latents images/ --out data/latents --vae models/Qwen-Image --size 512")
add(inspect, MACHINE, "piflow inspect my-adapter", "piflow inspect outputs/digits/nfe4 --json")
add(doctor, MACHINE, "piflow doctor --json")


def main() -> None:
    """Entry point of the `piflow` command."""
    try:
        app(prog_name="piflow")
    except ModuleNotFoundError as missing:
        from piflow.commands.diagnosis import extra_with

        extra = extra_with(missing.name or "")
        sys.exit(f"piflow: this needs the package {missing.name}: pip install 'piflow[{extra}]' has it.")
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # click and rich make 1 of it, which is an answer of `plan`
            sys.exit(128 + signal.SIGPIPE)
        raise
    except KeyboardInterrupt:  # before or after the command itself
        sys.exit(130)
    finally:
        _flush()


def _flush() -> None:
    """A reader that has gone away, as `head` does, is no error worth Python's words at the exit."""
    with contextlib.suppress(OSError):
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
