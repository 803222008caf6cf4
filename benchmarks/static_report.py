"""The ahead-of-time gate: what every kernel that the launch rule can choose costs, read without a GPU.

    python -m benchmarks.static_report [--json FILE] [--arch 80 90 100]

Compiles each specialisation for each architecture (minutes at first, seconds when nothing changed), prints a table and,
with --json, stores it. Ends with 1 where a kernel spills, keeps local memory, computes in float64 per pixel, or
where a forward substep takes more than 1.35 times the multiply-adds that its algebra needs (docs/collapses.md).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.specialisations import Specialisation, specialisations
from benchmarks.static_analysis import MULTIPROCESSORS, AnalysisError, KernelFacts, analyse_all, failures

COLUMNS = {
    "kernel": ("kernel", 22), "layout": ("layout", 8), "dtype": ("dtype", 5), "K": ("K", 3), "C": ("C", 4),
    "N": ("N", 3), "arch": ("sm", 4), "registers": ("registers", 9), "spill_bytes": ("spill", 6),
    "shared_bytes": ("shared", 6), "occupancy": ("occupancy", 9), "fma_per_substep": ("fma", 7),
    "fma_ratio": ("/ needed", 8), "mufu_per_substep": ("mufu", 6), "instructions_total": ("instructions", 12),
}  # fmt: skip
"""Key of an entry: title and width in the table."""


def row(specialisation: Specialisation, facts: KernelFacts) -> dict[str, Any]:
    """An entry of the report. fma and mufu: per pixel and substep; of a DX kernel, per element of its one pass."""
    s = specialisation
    return {
        "op": s.op, "policy": s.policy, "direction": s.direction, "space": s.space, "layout": s.layout,
        "dtype": s.dtype, "K": s.k, "C": s.c, "arch": facts.capability, "registers": facts.registers,
        "spill_bytes": facts.spill_bytes, "stack_bytes": facts.stack_bytes, "shared_bytes": facts.shared_bytes,
        "occupancy": facts.occupancy, "fma_per_substep": facts.fma_per_substep,
        "mufu_per_substep": facts.mufu_per_substep, "instructions_total": facts.instructions_total,
        "N": s.n_steps, "kernel": facts.kernel, "num_warps": s.num_warps, "block": s.block,
        "fp_fusion": s.fp_fusion,
        "ffma_per_substep": facts.ffma_per_substep, "fmul_per_substep": facts.fmul_per_substep,
        "fadd_per_substep": facts.fadd_per_substep, "local_instructions": facts.local_instructions,
        "float64_instructions": facts.float64_instructions, "fma_needed": s.needed,
        "fma_ratio": round(facts.fma_per_substep / s.needed, 4) if s.needed and facts.fma_per_substep else None,
        "failures": failures(facts, s.needed),
    }  # fmt: skip


def shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return str(value).removesuffix("_kernel")


def line(cells: Sequence[str]) -> str:
    widths = [width for _, width in COLUMNS.values()]
    return " ".join(
        cell.ljust(width) if i < 3 else cell.rjust(width) for i, (cell, width) in enumerate(zip(cells, widths))
    )


def name_of(entry: dict[str, Any]) -> str:
    sizes = " ".join(f"{name}={entry[name]}" for name in ("K", "C", "N"))
    fusion = "" if entry["fp_fusion"] else " without fp fusion"
    return f"{entry['kernel']} {entry['layout']} {entry['dtype']} {sizes} sm_{entry['arch']}{fusion}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static_report", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the report here")
    parser.add_argument("--arch", type=int, nargs="+", choices=list(MULTIPROCESSORS), default=list(MULTIPROCESSORS))
    options = parser.parse_args(arguments)

    begin = time.perf_counter()
    pairs = [(each, arch) for arch in options.arch for each in specialisations(arch)]
    print(line([title for title, _ in COLUMNS.values()]))
    entries, failing = [], []
    for (specialisation, _), facts in zip(pairs, analyse_all([each.request(arch) for each, arch in pairs])):
        if isinstance(facts, AnalysisError):
            failing.append(str(facts))
            continue
        entries.append(row(specialisation, facts))
        failing += [f"{name_of(entries[-1])}: {failure}" for failure in entries[-1]["failures"]]
        print(line([shown(entries[-1][key]) for key in COLUMNS]), flush=True)
    if options.json is not None:
        lines = ",\n".join(json.dumps(entry) for entry in entries)  # a kernel to a line, so that changes can be read
        options.json.write_text(f'{{"kernels": [\n{lines}\n]}}\n')
    print(f"{len(entries)} kernels in {time.perf_counter() - begin:.0f} s, {len(failing)} failures", *failing, sep="\n")
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
