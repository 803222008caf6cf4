"""Every benchmark against its peers, with time, peak memory, floors and correctness in one run.

    python -m benchmarks.run [--suite kernels|policies|pipeline|training|all] [--device cpu|cuda] [--json FILE]

kernels: operators at the shapes of the models. policies: what samplers, schedulers and trainers call. training: the
policy's forward and backward pass in a step of imitation distillation. pipeline: whole calls. Each case runs in a
process of its own with bounded memory, so that one that fails is a row that says so. Without --json the result of all
suites goes to benchmarks/results/run_<device>.json, of which `python -m benchmarks.report` makes tables and plots; that
of a part of them to outputs/benchmarks, so that it replaces nothing (`python -m benchmarks.report --table FILE`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.measure import Row, Settings, measure_case
from benchmarks.memory import limit_memory
from benchmarks.operations import REFERENCE, Builder, Operation, cases
from benchmarks.report import markdown
from benchmarks.roofline import Rates, Work, measure_rates
from benchmarks.shapes import FULL_DEPTH

SUITES = ("kernels", "policies", "training", "pipeline")
RESULTS, PARTIAL = Path(__file__).parent / "results", Path(__file__).parents[1] / "outputs" / "benchmarks"
MEMORY_SHARE = 0.8
"""Of the memory available when a case starts: what beyond it is "out of memory" on the CPU."""
TRAINING_LONGEST = 25.0
"""`Settings.longest` of the suite that is about large batches."""
CASE_SECONDS = 900
"""After which a case is given up."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: list[str] | None = None) -> int:
    options = parsed(argv)
    if options.one:
        run_case(options)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no GPU here", file=sys.stderr)
        return 2
    started, suites = time.perf_counter(), SUITES if options.suite == "all" else (options.suite,)
    rates = measure_rates(options.device, *((1 << 24, 256, 0.05) if options.tiny else ()))
    settings: dict[str, Any] = dataclasses.asdict(settings_of(suites[0], options))
    settings["longest"] = {suite: settings_of(suite, options).longest for suite in suites}
    content: dict[str, Any] = {
        "machine": machine(), "rates": dataclasses.asdict(rates), "settings": settings,
        "dtype": options.dtype, "tiny": options.tiny, "memory_share": MEMORY_SHARE,
        "load_average": {"before": load()}, "rows": [],
    }  # fmt: skip
    file = options.json or default_file(options)
    file.parent.mkdir(parents=True, exist_ok=True)
    for suite, name in listed(suites, options):
        begin = time.perf_counter()
        rows = finished(isolated(suite, name, options), rates)
        content["rows"] += rows
        content["load_average"]["after"] = load()
        content["wall_seconds"] = time.perf_counter() - started
        file.write_text(json.dumps(content, indent=1) + "\n")
        print(f"{suite} {name}: {time.perf_counter() - begin:.0f} s", flush=True)
        print(markdown(rows), end="\n\n", flush=True)
    print(f"{content.get('wall_seconds', 0):.0f} s in all; stored in {file}")
    return 0


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--suite", choices=(*SUITES, "all"), default="all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where results go")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="only these, such as qwen-image-1024")
    parser.add_argument("--dtype", choices=DTYPES, help="of network outputs (default: float32, on a GPU bfloat16)")
    parser.add_argument("--seconds", type=float, default=1.0, help="to time a candidate for (default: %(default)s)")
    parser.add_argument(
        "--longest", type=float, metavar="SECONDS",
        help="that the textbook's first call may take: of a larger batch a part is run (default: "
        f"{Settings.longest:g}, for training {TRAINING_LONGEST:g})",
    )  # fmt: skip
    parser.add_argument("--least-rounds", type=int, default=3, help="of each candidate (default: %(default)s)")
    parser.add_argument("--candidates", nargs="+", metavar="NAME", help="only these beside the textbook, such as ours")
    parser.add_argument("--tiny", action="store_true", help="a few pixels of each shape: whether all of it works")
    parser.add_argument("--one", nargs=2, metavar=("SUITE", "CASE"), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=json.loads, default={}, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    return options


def default_file(options: argparse.Namespace) -> Path:
    whole = options.suite == "all" and not (options.cases or options.candidates or options.tiny)
    return (RESULTS if whole else PARTIAL) / f"run_{options.device}.json"


def listed(suites: tuple[str, ...], options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Names of what is to be run. Raises SystemExit where --cases names nothing there is."""
    names = {suite: case_names(suite, options) for suite in suites}
    known = {name for each in names.values() for name in each}
    unknown = sorted(set(options.cases or ()) - known)
    if unknown:
        sys.exit(f"--cases: {', '.join(unknown)}: expected some of {', '.join(sorted(known))}")
    for suite, each in names.items():
        yield from ((suite, name) for name in each if not options.cases or name in options.cases)


def case_names(suite: str, options: argparse.Namespace) -> list[str]:
    if suite == "pipeline":
        return list(FULL_DEPTH)
    return [case.name for case in cases(suite, options.device, DTYPES[options.dtype])]


# ---------------------------------------------------------------------------------------------------------------------
# A case, in a process of its own


def isolated(suite: str, name: str, options: argparse.Namespace) -> list[Row]:
    """The rows of a case. Where its process dies, it starts again without the candidate that it died of."""
    skip: dict[str, Row] = {}
    while True:
        with tempfile.TemporaryDirectory() as folder:
            rows_file = Path(folder) / "rows.jsonl"
            reason = outcome(command(suite, name, options, rows_file, skip))
            lines = [json.loads(line) for line in rows_file.read_text().splitlines()] if rows_file.exists() else []
        last: Row = next((line for line in reversed(lines) if "doing" in line), {"doing": ""})
        if not reason or not (doing := last["doing"]) or doing in skip:
            rows = [line for line in lines if "doing" not in line]
            if reason:
                rows.append({"suite": suite, "case": name, "candidate": "all", "status": "died", "note": reason})
            return rows
        skip[doing] = last.get("row", {"status": "died", "note": reason})


def command(suite: str, name: str, options: argparse.Namespace, rows: Path, skip: dict[str, Row]) -> list[str]:
    """What runs one case."""
    words = [sys.executable, "-m", "benchmarks.run", "--one", suite, name, "--rows", str(rows)]
    words += [f"--{key}={getattr(options, key)}" for key in ("device", "dtype", "seconds")]
    words += [f"--least-rounds={options.least_rounds}", f"--skip={json.dumps(skip)}"]
    words += [f"--longest={options.longest}"] if options.longest else []
    words += ["--tiny"] if options.tiny else []
    return [*words, "--candidates", *options.candidates] if options.candidates else words


def outcome(words: list[str]) -> str:
    """Runs a case; why it ended early, or "" where it did not."""
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # no pool of workers that outlives it
    try:
        code = subprocess.run(words, env=environment, timeout=CASE_SECONDS, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"did not end within {CASE_SECONDS} s"
    if code < 0:
        return f"its process was killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    return f"its process ended with {code}" if code else ""


def settings_of(suite: str, options: argparse.Namespace) -> Settings:
    longest = options.longest or (TRAINING_LONGEST if suite == "training" else Settings.longest)
    return Settings(options.device, options.seconds, longest, options.least_rounds)


def run_case(options: argparse.Namespace) -> None:
    """In the process of a case: writes a line for each row, and for each candidate that is about to be tried."""
    suite, name = options.one
    if options.device == "cpu":
        limit_memory(MEMORY_SHARE)
    with options.rows.open("a") as lines:

        def write(row: Row) -> None:
            lines.write(json.dumps(row) + "\n")
            lines.flush()

        if suite == "pipeline":
            from benchmarks.pipeline import pipeline_case  # all of diffusers, which no other suite waits for

            case, parts = pipeline_case(name, options.device, options.tiny)
            for part in parts:
                write(part)
        else:
            found = cases(suite, options.device, DTYPES[options.dtype], options.tiny)
            case = next(case for case in found if case.name == name)
        only = {REFERENCE, *options.candidates} if options.candidates else None
        case = dataclasses.replace(case, builders=tuple(chosen(build, only) for build in case.builders))

        def doing(key: str, row: Row | None = None) -> None:
            write({"doing": key} | ({} if row is None else {"row": row}))

        for row in measure_case(case, settings_of(suite, options), options.skip, doing):
            write(row)


def chosen(build: Builder, only: set[str] | None) -> Builder:
    """The same operation with the candidates that were asked for."""

    def built(batch: int) -> Operation:
        operation = build(batch)
        found = {name: run for name, run in operation.candidates.items() if only is None or name in only}
        return dataclasses.replace(operation, candidates=found)

    return built


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def finished(rows: list[Row], rates: Rates) -> list[Row]:
    """With floors, multiples of them, and speed-ups over the textbook; both only where the result is right."""
    textbook = {key(row): row["ms"]["p50"] for row in rows if row["candidate"] == REFERENCE and "ms" in row}
    for row in rows:
        if "work" in row:
            row["floor_ms"] = rates.floor_ms(Work(**row["work"]))
        if row["status"] != "ok" or "ms" not in row:
            row.pop("ms", None)
            continue
        if "floor_ms" in row:
            row["multiple_of_floor"] = row["ms"]["p50"] / row["floor_ms"]
        if row["candidate"] != REFERENCE and key(row) in textbook:
            row["speedup"] = textbook[key(row)] / row["ms"]["p50"]
    return rows


def key(row: Row) -> tuple[Any, ...]:
    """What rows share that are compared."""
    return tuple(row.get(name) for name in ("suite", "case", "operation", "pass", "batch", "dtype", "device"))


def load() -> float:
    return round(os.getloadavg()[0], 2)


if __name__ == "__main__":
    sys.exit(main())
