"""Tables and plots of stored results, and the pages that show them: no figure in them is typed by hand.

    python -m benchmarks.report [--check] [--table FILE] [PAGE ...]

A page (README.md and docs/benchmarks.md by default) marks what is made anew:

    <!-- generated: NAME from benchmarks/results/FILE.json -->
    <!-- end -->

NAME is a function of BLOCKS. A file that is not there yet makes a block that says so. --check changes nothing and ends
with 1 where a page is not what its files make of it; --table prints the tables of a file of `benchmarks.run`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.plots import case_of, draw

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/benchmarks.md")
BLOCK = re.compile(
    r"(?P<begin>^<!-- generated: (?P<name>[\w-]+) from (?P<file>\S+) -->\n)(?P<body>.*?)(?P<end>^<!-- end -->$)",
    re.MULTILINE | re.DOTALL,
)

Content = dict[str, Any]
Row = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Tables of `benchmarks.run`

COLUMNS = (
    "case",
    "operation",
    "pass",
    "candidate",
    "p20 ms",
    "ms",
    "p80 ms",
    "peak MB",
    "x floor",
    "speed-up",
    "error",
    "calls",
    "",
)


def markdown(rows: Iterable[Row]) -> str:
    """A row for each candidate, under one that says what the operation cannot do without and how long that takes."""
    lines = [table_line(COLUMNS), "|---|---|---|---|" + "---:|" * 8 + "---|"]
    group = None
    for row in rows:
        here = tuple(row.get(name) for name in ("suite", "case", "operation", "pass"))
        if here != group:
            lines += floor_line(row)
            group = here
        lines.append(table_line(row_cells(row)))
    return "\n".join(lines)


def table_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def head_cells(row: Row) -> list[str]:
    case = case_of(row) if "case" in row else ""
    return [case, f"`{row['operation']}`" if "operation" in row else "", str(row.get("pass", ""))]


def floor_line(row: Row) -> list[str]:
    if "floor_ms" not in row:
        return []
    work = row["work"]
    needs = f"{work['bytes'] / 1e6:.3g} MB, {work['multiply_adds'] / 1e9:.3g} G multiply-adds"
    needs += f", {work['exponentials'] / 1e9:.3g} G exponentials" if work["exponentials"] else ""
    described = f"network output {row['network_output']} {row['dtype']}, {row['substeps']:g} substeps; {needs}"
    return [table_line([*head_cells(row), "*floor*", "", digits(row["floor_ms"]), "", "", "1", "", "", "", described])]


def row_cells(row: Row) -> list[str]:
    """Times, multiples and speed-ups stand only where the result is right; one call has no percentiles."""
    right = row["status"] == "ok"
    ms = row.get("ms", {}) if right else {}
    calls = row.get("rounds", 0) if ms else 0
    times = [digits(ms.get(name)) if calls > 1 or name == "p50" else "" for name in ("p20", "p50", "p80")]
    peak = digits(row["peak_bytes"] / 1e6) if right and row.get("peak_bytes") is not None and calls != 1 else ""
    multiple, speedup = (digits(row.get(name)) if right else "" for name in ("multiple_of_floor", "speedup"))
    error = f"{row['error']:.1e}" if "error" in row else ""
    said = "; ".join(text for text in ("" if right else f"**{row['status']}**", row.get("note", "")) if text)
    figures = [*times, peak, multiple, speedup, error, str(calls or "")]
    return [*head_cells(row), row["candidate"], *figures, said.replace("|", "/")]


def digits(value: float | None) -> str:
    """Three significant digits, none of them an exponent."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def suite_table(suite: str) -> Callable[[Content], str]:
    return lambda content: markdown(row for row in content["rows"] if row.get("suite") == suite)


def conditions(content: Content) -> str:
    """The machine, how fast it was found to be, and how busy it was."""
    facts, rates, load = content["machine"], content["rates"], content["load_average"]
    processor = facts["gpu"] if facts["gpu"] != "none" else f"{facts['processor']}, {facts['cores']} cores"
    versions = ", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "triton", "diffusers"))
    minutes = f"{content['wall_seconds'] / 60:.0f} minutes"
    busy = f"load average {load['before']} before, {load['after']} after"
    speeds = (
        f"Floors from {rates['bytes'] / 1e9:.3g} GB/s, {rates['multiply_adds'] / 1e9:.3g} G float32 multiply-adds/s "
        f"and {rates['exponentials'] / 1e9:.3g} G exponentials/s ({rates['probe']})."
    )
    return f"{processor}; {versions}; {facts['threads']} threads; {minutes}, {busy}.\n{speeds}"


HEADLINES = (
    ("kernels", "qwen-image-1024", "gm_rollout", "forward"),
    ("kernels", "flux-2-1024", "gm_rollout", "forward"),
    ("kernels", "imagenet-256-batch-512", "gm_rollout", "forward"),
    ("policies", "kandinsky-6-pro", "PiflowScheduler.step", "forward"),
    ("training", "imagenet-256-batch-64", "GMFlowPolicy.mean_velocity_loss", "both"),
    ("training", "imagenet-256-batch-512", "GMFlowPolicy.mean_velocity_loss", "both"),
    ("training", "imagenet-256-batch-64", "imitation_segment", "both"),
)
"""Suite, case, operation and pass of the README's rows."""


def headline(content: Content) -> str:
    """The few rows of the README: eager textbook, the fastest that is not ours, and ours; time and peak memory."""
    facts, file = content["machine"], content["file"]
    processor = facts["gpu"] if facts["gpu"] != "none" else f"{facts['processor']}, {facts['threads']} threads"
    lines = [
        f"{processor}, torch {facts['torch']} (stored in [{file}]({file})): median and peak memory of a call;",
        "ratios of ours by default and, where it is another, of ours at its fastest.",
        "",
        "| | textbook, eager | fastest other | ours | ours at its fastest | against textbook | against fastest other |",
        "|---|" + "---:|" * 6,
    ]
    for headline in HEADLINES:
        rows = [
            row
            for row in content["rows"]
            if tuple(row.get(name) for name in ("suite", "case", "operation", "pass")) == headline
            and row["status"] == "ok"
        ]
        found = {row["candidate"]: row for row in rows}
        mine = [row for name, row in found.items() if name.startswith("ours")]
        others = [row for name, row in found.items() if not name.startswith("ours") and name != "reference"]
        best, other = (min(each, key=median, default=None) for each in (mine, others))
        label = (
            f"{case_of(rows[0])}, `{headline[2]}`, {PASSES[headline[3]]}" if rows else f"{headline[1]}: nothing right"
        )
        cells = [label, brief(found.get("reference")), brief(other, named=True), brief(found.get("ours"))]
        cells += [brief(best, named=True)]
        cells += [" to ".join(dict.fromkeys(ratio(peer, row) for row in (found.get("ours"), best)))
                  for peer in (found.get("reference"), other)]  # fmt: skip
        lines.append(table_line(cells))
    return "\n".join(lines)


PASSES = {"forward": "forward", "both": "forward and backward"}


def median(row: Row) -> float:
    return row["ms"]["p50"]


def brief(row: Row | None, named: bool = False) -> str:
    if row is None:
        return "—"
    peak = f", {digits(row['peak_bytes'] / 1e6)} MB" if row.get("peak_bytes") else ""
    name = row["candidate"].removeprefix("reference, ").removeprefix("ours, ")
    return f"{digits(median(row))} ms{peak}" + (f" ({name})" if named else "")


def ratio(peer: Row | None, ours: Row | None) -> str:
    return "—" if peer is None or ours is None else digits(median(peer) / median(ours))


# ---------------------------------------------------------------------------------------------------------------------
# Blocks of other files

OPERATORS = (
    ("GM (1, 8, 16, 128, 128), 37 substeps", "textbook formula, eager", "test_gm_rollout[qwen-image-1024-torch]"),
    ('the same, `backend="inductor"`', "textbook formula, eager", "test_gm_rollout[qwen-image-1024-inductor]"),
    ("GM (16, 32, 4, 32, 32), 128 substeps", "textbook formula, eager", "test_gm_rollout[imagenet-256-batch-16-torch]"),
    ('the same, `backend="inductor"`', "textbook formula, eager", "test_gm_rollout[imagenet-256-batch-16-inductor]"),
    (
        "GM mean velocity with gradients, first shape, 3 substeps", "autograd of the formula",
        "test_gm_window_with_gradients[qwen-image-1024-gm_mean_velocity]",
    ),
    (
        "the same, second shape", "autograd of the formula",
        "test_gm_window_with_gradients[imagenet-256-batch-16-gm_mean_velocity]",
    ),
    (
        "GM rollout with gradients, 3 substeps, first shape", "autograd of the formula",
        "test_gm_window_with_gradients[qwen-image-1024-gm_rollout]",
    ),
    (
        "the same, second shape", "autograd of the formula",
        "test_gm_window_with_gradients[imagenet-256-batch-16-gm_rollout]",
    ),
    (
        "DX 8 x 60 x 108, 16 channels, grid 10, 13 substeps", "diffusers' `PiflowScheduler.step`",
        "test_dx_rollout_kandinsky_6[operator]",
    ),
    (
        "the same through `FusedPiflowScheduler.step`", "diffusers' `PiflowScheduler.step`",
        "test_dx_rollout_kandinsky_6[scheduler]",
    ),
)  # fmt: skip
"""Rows of the README's table: what, against what, and the test of `make bench` that measures it."""


def operators(content: Content) -> str:
    """Fused operators against their peers, of a file of pytest-benchmark."""
    found = {each["name"]: each["extra_info"] for each in content["benchmarks"]}
    processor, any_of_them = content["machine_info"]["cpu"], next(iter(found.values()))
    lines = [
        f"Measured on {processor['brand_raw']}, {any_of_them['threads']} threads, torch {any_of_them['torch']} "
        f"(`make bench`, stored in `{content['file']}`),",
        "the fused operator and its peer taking turns, results checked against float64:",
        "",
    ]
    lines += ["| rollout | peer | peer | ours | ratio |", "|---|---|---:|---:|---:|"]
    for label, peer, name in OPERATORS:
        info = found[name]
        ours, theirs = (f"{info[of]['p50']:.1f} ms" for of in ("ours_ms", "peer_ms"))
        lines.append(f"| {label} | {peer} | {theirs} | {ours} | {info['speedup']:.1f} |")
    return "\n".join(lines)


def digits_demo(content: Content) -> str:
    """What `make demo` prints at its end, and how long it took."""
    minutes, seconds = divmod(round(content["wall_seconds"]), 60)
    widths = (23, 4, 6, 8, 8, 9, 9, 8)
    heads = [
        ("", "", "", "Fréchet", "Fréchet", "", "endpoint", "samples"),
        ("sampler", "NFE", "evals", "teacher", "data", "accuracy", "MSE", "per s"),
    ]
    rows = [
        (
            row["name"], str(row["nfe"]), str(row["network_evaluations"]), f"{row['frechet_to_teacher']:.3f}",
            f"{row['frechet_to_data']:.2f}", f"{row['accuracy']:.3f}", f"{row['endpoint_mse']:.4f}",
            f"{row['samples_per_second']:.0f}",
        )
        for row in content["rows"]
    ]  # fmt: skip

    def line(cells: tuple[str, ...]) -> str:
        return (cells[0].ljust(widths[0]) + "".join(c.rjust(w) for c, w in zip(cells[1:], widths[1:]))).rstrip()

    table = [*map(line, heads), "─" * sum(widths), *map(line, rows), ""]
    table += [
        f"{'met' if bar['passed'] else 'MISSED':6} {bar['name']}: {bar['value']:.4g} against {bar['bound']:.4g}"
        for bar in content["bars"]
    ]
    cores = f"{content['machine']['cores']} CPU cores"
    said = (
        f"It took {minutes}:{seconds:02d} minutes on {cores} ([stored]({content['file']})), set-up apart, and printed:"
    )
    return "\n".join([said, "", *(f"    {line}".rstrip() for line in table)])


def pipeline_share(content: Content) -> str:
    """The policy's part of a whole call's network time."""
    calls = content["pipelines"]
    size, nfe, cores = calls[0]["size"], calls[0]["nfe"], content["machine"]["cores"]
    shares = {call["model"]: f"{100 * call['policy_share_at_full_depth']:.2f} %" for call in calls}
    return (
        f"At {size} x {size} with {nfe} evaluations on {cores} CPU cores, the policy takes {shares['qwen-image']} of "
        f"the time of a full Qwen-Image network and {shares['flux']} of FLUX.1's\n"
        f"(`python -m benchmarks.pipeline`, stored in [{content['file']}]({content['file']}))."
    )


def plot(content: Content) -> str:
    """The plot of a run, drawn beside the page's other images."""
    image = f"images/bench_{content['settings']['device']}.png"
    return f"![Time and peak memory of every candidate]({image})"


BLOCKS: dict[str, Callable[[Content], str]] = {
    "operators": operators,
    "digits": digits_demo,
    "pipeline-share": pipeline_share,
    "headline": headline,
    "conditions": conditions,
    "plot": plot,
    **{f"suite-{suite}": suite_table(suite) for suite in ("kernels", "policies", "training", "pipeline")},
}


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def regenerated(page: str, root: Path = ROOT) -> str:
    """The page with each block made anew. Raises ValueError for a block or marker that is not known."""
    if page.count("<!-- generated:") != len(BLOCK.findall(page)):
        raise ValueError("a `<!-- generated: NAME from FILE -->` has no `<!-- end -->`, or is not alone on its line")

    def made(match: re.Match[str]) -> str:
        name, file = match["name"], match["file"]
        if name not in BLOCKS:
            raise ValueError(f"generated: {name}: expected one of {', '.join(BLOCKS)}")
        body = f"Not measured yet: {file} is not there."
        if (root / file).exists():
            body = BLOCKS[name](json.loads((root / file).read_text()) | {"file": file})
        return f"{match['begin']}\n{body}\n\n{match['end']}"

    return BLOCK.sub(made, page)


def plotted_files(page: str, root: Path = ROOT) -> dict[Path, Path]:
    """Images of the page's plots, and the stored results that they show."""
    plots = {}
    for match in BLOCK.finditer(page):
        if match["name"] == "plot" and (root / match["file"]).exists():
            device = json.loads((root / match["file"]).read_text())["settings"]["device"]
            plots[root / "docs" / "images" / f"bench_{device}.png"] = root / match["file"]
    return plots


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pages", nargs="*", type=Path, default=[ROOT / page for page in PAGES], metavar="PAGE")
    parser.add_argument("--check", action="store_true", help="only say which pages differ")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of a stored run")
    options = parser.parse_args(argv)
    if options.table:
        content = json.loads(options.table.read_text())
        print(conditions(content), markdown(content["rows"]), sep="\n\n")
        return 0
    differing = 0
    for page in options.pages:
        before = page.read_text()
        after = regenerated(before)
        if after == before:
            print(f"{page}: as it should be")
        elif options.check:
            print(f"{page}: differs from what its stored results make of it; run python -m benchmarks.report")
            differing += 1
        else:
            page.write_text(after)
            print(f"{page}: made anew")
        for image, stored in plotted_files(after).items():
            if not options.check:
                draw(json.loads(stored.read_text()), image, source=stored)
                print(f"{image}: drawn")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
