"""What sub-commands share: options, errors as one message, progress on a terminal, numbers as people write them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for machines.")]
Device = Annotated[str | None, typer.Option(help="Such as cuda:0 or cpu. By default a GPU, if there is one.")]


class UsageError(ValueError):
    """Options or arguments that cannot be used, as the exit code says."""

    exit_code = 2


@contextmanager
def told() -> Iterator[None]:
    """Errors that are the person's to mend end the command with one message, and not with a traceback.

    A reader of the output that has gone away is no such error.
    """
    try:
        yield
    except (BrokenPipeError, ModuleNotFoundError, typer.Exit):  # an Exit is a RuntimeError that has been told
        raise
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if isinstance(error, RuntimeError) and not hasattr(error, "exit_code"):
            raise
        print(f"piflow: {error}", file=sys.stderr)
        raise typer.Exit(getattr(error, "exit_code", 1)) from error


def json_object(option: str, text: str) -> dict[str, Any]:
    """What an option holds as JSON. Raises UsageError that names the option."""
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UsageError(f"{option}: expected a JSON object, got {text}")
    return content


def whole_numbers(option: str, words: list[str]) -> list[int]:
    """["0-3", "7,9"] -> [0, 1, 2, 3, 7, 9]. Raises UsageError that names the option."""
    numbers: list[int] = []
    for part in ",".join(words).split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)) or int(last or first) < int(first):
            raise UsageError(f"{option}: expected whole numbers such as 3, 1,4 or 0-9, got {part!r}")
        if int(last or first) - int(first) >= 100_000:
            raise UsageError(f"{option}: {part} are more numbers than can be meant")
        if int(last or first) >= 2**64:
            raise UsageError(f"{option}: expected numbers below 2^64, got {part}")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def usable_device(device: str | None) -> str:
    """The device itself, or by default a GPU, if there is one. Raises UsageError for one that torch has not here."""
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    return device


@contextmanager
def progress(shown: bool = True) -> Iterator[Progress]:
    """Bars on stderr while there is something to wait for; nothing where that is no terminal, or not to be `shown`.

    A task without a total is a spinner.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    class Count(MofNCompleteColumn):
        def render(self, task: Any) -> Any:
            return super().render(task) if task.total else ""

    console = Console(stderr=True)
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), Count(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True) as bars:
        yield bars


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """The notes and bars of the libraries that load models stay away; afterwards they speak as before."""
    import diffusers
    import huggingface_hub
    import transformers

    with ExitStack() as stack:
        hub = huggingface_hub.logging  # a line for each time that it tries to reach a server
        stack.callback(hub.set_verbosity, hub.get_verbosity())
        hub.set_verbosity_error()
        for log in (diffusers.utils.logging, transformers.utils.logging):
            stack.callback(log.set_verbosity, log.get_verbosity())
            log.set_verbosity_error()
            if log.is_progress_bar_enabled():
                stack.callback(log.enable_progress_bar)
                log.disable_progress_bar()
        yield
