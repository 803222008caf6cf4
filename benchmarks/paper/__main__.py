"""`python -m benchmarks.paper core|full|report`; see the package."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.paper.cells import SEEDS, Budget, core_cells, full_cells
from benchmarks.paper.measure import Protocol
from benchmarks.paper.runner import run_cells, run_task
from benchmarks.paper.store import Store, collect, command_line, other_run, read_json, write_json

RESULTS = Path("benchmarks/results/paper.json")
DOCS = Path("docs")


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["cell"]:  # how the runner starts its processes
        run_task(words[1])
        return 0
    arguments = _parser().parse_args(words)
    store = Store(arguments.out, Protocol(num_samples=arguments.samples))
    if arguments.job == "report":
        return _report(arguments.json, arguments.docs)
    budget = Budget(arguments.iterations, arguments.batch_size)
    if (earlier := read_json(arguments.json)) and (why := other_run(earlier, store.protocol, budget)):
        print(f"{arguments.json}: its results {why}; name other places with --json and --docs.", file=sys.stderr)
        return 2
    every = full_cells(budget, arguments.seeds)
    cells = core_cells(budget) if arguments.job == "core" else every
    if arguments.only:
        cells = [c for c in cells if c.method == "teacher" or any(word in c.name for word in arguments.only)]
    try:
        failed = run_cells(cells, store, _command(arguments), processes=arguments.processes, minutes=arguments.minutes)
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here: cells that are done are kept.", file=sys.stderr)
        return 130
    finally:
        write_json(arguments.json, collect(store, every, read_json(arguments.json)))
    print(f"results in {arguments.json}")
    return 1 if failed else _report(arguments.json, arguments.docs)


def _report(file: Path, docs: Path) -> int:
    from benchmarks.paper.report import write_report

    results = read_json(file)
    if results is None:
        print(f"{file} holds no results: run `python -m benchmarks.paper core` first.", file=sys.stderr)
        return 1
    try:
        print(f"report in {write_report(results, docs)}")
    except ValueError as error:
        print(f"{file}: {error}", file=sys.stderr)
        return 1
    return 0


def _command(arguments: argparse.Namespace) -> str:
    """What anybody types for the same results, without this machine's folders."""
    parser, words = _parser(), [arguments.job]
    for name in ("iterations", "batch_size", "samples"):
        if (value := getattr(arguments, name)) != parser.get_default(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return command_line(words)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description="The paper in small.")
    parser.add_argument("job", choices=("core", "full", "report"))
    parser.add_argument("--out", type=Path, default=Path("outputs/paper"), help="cache of cells (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=RESULTS, help="all results (default: %(default)s)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of paper.md and images (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="cells at a time (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="begin no cell after so long (default: run to the end)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="cells whose name has one of these in it")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of `full`, the first is 0")
    parser.add_argument("--iterations", type=int, default=Budget.iterations, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=Budget.batch_size, help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=Protocol.num_samples, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
