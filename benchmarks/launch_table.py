"""Measures the candidates of the launch table on the GPU at hand: `piflow_kernels.configs.FAMILIES` for its family.

    python -m benchmarks.launch_table [--write]

Each constant is tried on the shapes that it serves, the others as they are. --write puts the best ones into
piflow_kernels/configs.py, between the lines that mark the table; without it they are printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import piflow_kernels as pk
from benchmarks.shapes import DXShape, GMShape
from piflow_kernels import configs
from piflow_kernels.configs import FAMILIES, Family, family_of

GRAM, CHANNEL = GMShape(1, 8, 16, (128, 128), 37), GMShape(64, 32, 4, (32, 32), 128, shift=1.0)
STREAMED, WINDOW = GMShape(1, 32, 32, (64, 64), 8), GMShape(64, 32, 4, (32, 32), 3, shift=1.0)
DX = DXShape(1, 10, 16, (31, 60, 108), 13)

CANDIDATES: dict[str, tuple[tuple[Any, ...], GMShape | DXShape, bool]] = {
    "gram_warps": ((1, 2, 4, 8), GRAM, False),
    "gram_backward_warps": ((1, 2, 4, 8), dataclasses.replace(GRAM, n_steps=3), True),
    "channel_elements": ((32, 64, 128), CHANNEL, False),
    "streamed_elements": ((4, 8, 16), STREAMED, False),
    "streamed_backward_elements": ((4, 8), WINDOW, True),
    "dx_block": ((256, 512, 1024, 2048, 4096), DX, False),
    "dx_warps": ((2, 4, 8), DX, False),
}
"""Of each constant: the values to try, the shape to try them on, and whether its backward pass is what counts."""


def call_of(shape: GMShape | DXShape, backward: bool) -> Callable[[], Any]:
    problem: dict[str, Any] = dict(shape.problem(torch.bfloat16, "cuda"))
    operator = pk.gm_rollout if isinstance(shape, GMShape) else pk.dx_rollout
    if not backward:
        return lambda: operator(**problem)
    leaves = [problem["means"].requires_grad_(), problem["logweights"].requires_grad_()]
    cotangent = torch.randn_like(problem["x_start"])
    return lambda: torch.autograd.grad(operator(**problem), leaves, cotangent)


def search() -> dict[str, Any]:
    """Median milliseconds of every candidate, and the family's constants with the best of each."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    name = family_of(torch.device("cuda", torch.cuda.current_device()))
    best = FAMILIES[name]
    timings: dict[str, dict[Any, float]] = {}
    for constant, (values, shape, backward) in CANDIDATES.items():
        call = call_of(shape, backward)
        timings[constant] = {}
        for value in values:
            FAMILIES[name] = dataclasses.replace(best, **{constant: value})
            try:
                timings[constant][value] = do_bench(call, return_mode="median")
            except OutOfResources as error:  # a candidate that this GPU cannot launch
                print(f"{constant}={value}: {error}")
        best = dataclasses.replace(best, **{constant: min(timings[constant], key=timings[constant].__getitem__)})
        FAMILIES[name] = best
        print(constant, timings[constant])
    print(f'    "{name}": {line(best)},')
    return {"family": name, "timings_ms": timings, "constants": dataclasses.asdict(best)}


def line(family: Family) -> str:
    """As it stands in the table: what differs from the default."""
    default = Family()
    changed = {n: v for n, v in dataclasses.asdict(family).items() if v != getattr(default, n)}
    return f"Family({', '.join(f'{n}={v!r}' for n, v in changed.items())})"


def rewritten(source: str, name: str, family: Family) -> str:
    """The text of configs.py with one row of the table replaced."""
    row = re.compile(rf'^    "{re.escape(name)}": Family\(.*\),$', re.MULTILINE)
    if len(row.findall(source)) != 1:
        raise ValueError(f"{configs.__file__}: expected one row {name!r} in FAMILIES, found {len(row.findall(source))}")
    return row.sub(lambda _: f'    "{name}": {line(family)},', source)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.launch_table", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--write", action="store_true", help="put the result into piflow_kernels/configs.py")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("the table is measured on a GPU, and none is to be seen")
    result = search()
    if options.write:
        path = Path(configs.__file__)
        path.write_text(rewritten(path.read_text(), result["family"], Family(**result["constants"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
