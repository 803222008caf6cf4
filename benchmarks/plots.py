"""Plots of a stored run: time and peak memory of every candidate, with floors."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

SOURCE = "Source"
"""Text entry of the PNG: digest of the file that it shows."""

STYLES = {
    "reference": ("#555555", "o"), "reference, torch.compile": ("#e69f00", "s"),
    "reference, checkpointed": ("#cc79a7", "v"), "reference, CUDA graph": ("#f0e442", "D"),
    "diffusers": ("#d55e00", "^"), "ours": ("#0072b2", "o"), "ours, inductor": ("#009e73", "o"),
    "ours, CUDA graph": ("#56b4e9", "D"),
}  # fmt: skip
"""Colours that the colour-blind can tell apart."""
SUITES = ("kernels", "policies", "training", "pipeline")


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def draw(content: dict[str, Any], image: Path, source: Path) -> None:
    """Dots for the median, bars from the 20th to the 80th percentile, a tick for the floor; peak memory beside it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = grouped(content["rows"])
    figure = Figure(figsize=(13, 1.8 + 0.34 * len(groups)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    time, memory = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": (3, 2)})
    handles = {}
    for place, rows in enumerate(groups.values()):
        present = [row["candidate"] for row in rows]
        for row in rows:
            colour, marker = STYLES.get(row["candidate"], ("#000000", "x"))
            y = place + 0.5 * (present.index(row["candidate"]) / max(len(present) - 1, 1) - 0.5)
            low, middle, high = (row["ms"][name] for name in ("p20", "p50", "p80"))
            spread = [[middle - low], [high - middle]]
            style = {"color": colour, "marker": marker, "markersize": 5, "linestyle": "none"}
            handles[row["candidate"]] = time.errorbar([middle], [y], xerr=spread, elinewidth=1.2, **style)
            if row.get("peak_bytes"):
                memory.plot([row["peak_bytes"] / 1e6], [y], **style)
        floors = [row["floor_ms"] for row in rows if "floor_ms" in row]
        if floors:
            handles["floor"] = time.plot([floors[0]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1.5)[0]
    time.set_yticks(range(len(groups)), [": ".join((name[0], " ".join(name[1:]))) for name in groups], fontsize=8)
    time.set_ylim(len(groups) - 0.4, -0.6)
    for axes in (time, memory):
        for place in range(0, len(groups), 2):
            axes.axhspan(place - 0.5, place + 0.5, color="#f2f2f2", zorder=0)
    for axes, title in ((time, "time of a call, ms"), (memory, "peak memory beyond the inputs, MB")):
        axes.set_xscale("log")
        axes.set_title(title, fontsize=10)
        axes.grid(True, axis="x", alpha=0.3)
        axes.tick_params(axis="x", labelsize=8)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=5, fontsize=9, frameon=False)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, metadata={SOURCE: digest(source), "Software": None})


def case_of(row: dict[str, Any]) -> str:
    """The case, and which part of its batch was run."""
    batch, whole = row.get("batch"), row.get("batch_of_model")
    return row["case"] if batch == whole else f"{row['case']} ({batch} of {whole} samples)"


def grouped(rows: list[dict[str, Any]]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """Rows with times by (suite, case, operation, pass), passes on their own of those that train left to the tables."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for suite in SUITES:
        for row in rows:
            shown = row.get("suite") == suite and "ms" in row and row["status"] == "ok"
            if shown and row["pass"] in ("forward", "both") and row["rounds"] > 1:
                groups.setdefault((suite, case_of(row), row["operation"], row["pass"]), []).append(row)
    return groups
