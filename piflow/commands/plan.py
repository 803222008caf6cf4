"""`piflow plan`: whether a training fits, before it is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from piflow.commands.common import progress, told

if TYPE_CHECKING:
    from piflow.training.plan import Plan


def plan(
    config: Annotated[Path, typer.Argument(help="Configuration of the training.")],
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")],
    gpu_memory: Annotated[float, typer.Option(min=0.001, max=10_000, help="Memory of each, in GB (1e9 bytes).")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="a.b=c: other values than the file's. A teacher whose files are not there has the size that its "
            "class has by default; `teacher.path=null teacher.random={num_layers: 30}` gives it another."
        ),
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=16, help="Height and width in pixels of a text-to-image model (default 1024).")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of its prompts.")] = 256,
    bandwidth: Annotated[float, typer.Option(min=0.001, help="GB/s that a GPU receives from the others.")] = 300,
    tflops: Annotated[float, typer.Option(min=0.001, help="TFLOP/s that a GPU reaches.")] = 400,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, in bytes and seconds.")] = False,
) -> None:
    """Memory of each GPU by item, traffic and compute of an iteration, and what to change where it does not fit.

    Then it ends with exit code 1.
    """
    with told(), progress() as bars:
        bars.add_task("planning", total=None)
        from piflow.training.config import load_config
        from piflow.training.plan import memory_plan

        planned = memory_plan(
            load_config(config, overrides or ()),
            gpus,
            1e9 * gpu_memory,
            pixels=size,
            prompt_tokens=prompt_tokens,
            bandwidth=1e9 * bandwidth,
            compute=1e12 * tflops,
        )
    if as_json:
        typer.echo(json.dumps(planned.to_dict(), indent=1))
    else:
        show(planned)
    if not planned.fits:
        raise typer.Exit(1)


def show(plan: Plan) -> None:
    """Print a plan."""
    from rich.console import Console
    from rich.table import Table

    console, counts = Console(highlight=False), plan.counts
    gpus = f"{plan.num_gpus} GPU{'s' if plan.num_gpus > 1 else ''} of {plan.gpu_memory / 1e9:g} GB"
    table = Table("item", "", title=f"Memory of each of {gpus}", title_justify="left")
    table.add_column("GB", justify="right")
    table.columns[1].header = "what it is"
    for item in plan.items:
        table.add_row(item.name, item.what, f"{item.bytes / 1e9:.2f}", end_section=item is plan.items[-1])
    table.add_row("peak", "sum", f"{plan.peak / 1e9:.2f}")
    table.add_row("needed", "with what the GPU keeps for itself, and holes", f"{plan.needed / 1e9:.2f}")
    console.print(table)
    console.print(f"{counts.base:,} parameters frozen, {counts.trainable:,} trained")
    if plan.note:
        console.print(plan.note)
    console.print(
        f"An iteration: {amount(plan.flops / 1e12)} TFLOP ({duration(plan.compute_seconds)}) and "
        f"{amount(plan.traffic / 1e9)} GB received ({duration(plan.traffic_seconds)}) by each GPU."
    )
    if plan.traffic_seconds > plan.compute_seconds:
        console.print(
            "Traffic takes longer than compute: a larger batch_size_per_rank, or weights that stay where they fit "
            "(zero.param_persistence_threshold), or fewer GPUs would use them better."
        )
    if plan.fits:
        console.print("It fits.")
        return
    console.print(f"It does not fit: {(plan.needed - plan.gpu_memory) / 1e9:.2f} GB are missing. What helps:")
    for change in plan.changes:
        console.print(f"  - {change}")
    if not any(change.endswith(", fits") for change in plan.changes):
        console.print("  - nothing that this plan knows is enough: take larger GPUs")


def amount(number: float) -> str:
    """Four digits, or whole thousands."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def duration(seconds: float) -> str:
    """In the unit that one would say it in."""
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1000 * seconds:.3g} ms"
