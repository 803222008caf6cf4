"""The pictures of the report, drawn from stored results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.paper.cells import CHECKERBOARD, NFES, TEACHER, TOY, Cell, dx, gm, meanflow, shortcut
from benchmarks.paper.measure import unpacked
from benchmarks.paper.results import ENDPOINT, FRECHET, Results, mean_and_spread

FAMILIES: dict[str, tuple[str, list[Cell], str]] = {
    "GM K=32": ("#0b4f8a", [gm(32, nfe) for nfe in (1, 2, 4)], "s"),
    "GM K=8": ("#1f8ad1", [gm(8, nfe) for nfe in (1, 2, 4)], "o"),
    "GM K=1": ("#8cc5ee", [gm(1, nfe) for nfe in (1, 2, 4)], "v"),
    "DX N=10": ("#e0813b", [dx(10, nfe) for nfe in (1, 2, 4)], "D"),
    "shortcut": ("#6a9a3c", [shortcut(nfe) for nfe in (1, 2, 4)], "^"),
    "MeanFlow": ("#a25ab3", [meanflow()] * 3, "P"),
}
"""Colour, the cells at 1, 2 and 4 NFE, marker."""

TEACHER_COLOUR = "#444444"


def draw_all(results: Results, folder: Path) -> list[str]:
    """Write every picture that the results can fill; returns the file names."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw in (
        ("quality", draw_quality), ("convergence", draw_convergence), ("studies", draw_studies),
        ("trajectories", draw_trajectories), ("samples", draw_samples), ("toy", draw_toy),
        ("checkerboard", draw_checkerboard),
    ):  # fmt: skip
        figure = draw(results)
        if figure is not None:
            FigureCanvasAgg(figure)
            figure.savefig(folder / f"paper_{name}.png", dpi=100)
            drawn.append(f"paper_{name}.png")
    return drawn


def _axes(width: float, height: float, columns: int, rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _clean(axis: Any, title: str, x: str = "", y: str = "") -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, which="major", alpha=0.25)


def _legend(axis: Any, **options: Any) -> None:
    """What has a name, if anything has."""
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=8, frameon=False, **options)


def _log_values(axis: Any) -> None:
    """A logarithmic axis with numbers that one can read."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _steps_axis(axis: Any, steps: Sequence[float]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(steps), [f"{step:g}" for step in steps])
    axis.xaxis.set_minor_locator(NullLocator())


def draw_quality(results: Results) -> Figure | None:
    """Quality against NFE: students, baselines, teacher with Euler steps."""
    figure, axes = _axes(10, 4.2, 2)
    for axis, metric, title in zip(axes[0], (FRECHET, ENDPOINT), ("Fréchet distance to teacher", "endpoint MSE")):
        steps = results.protocol["teacher_steps"]
        teacher = [results.values(TEACHER, metric, n)[0] for n in steps]
        axis.plot(steps, teacher, color=TEACHER_COLOUR, marker=".", linestyle="--", label="teacher, Euler")
        for name, (colour, cells, marker) in FAMILIES.items():
            values = [results.values(cell, metric, nfe) for nfe, cell in zip(NFES, cells)]
            if not any(values):
                continue
            mean = [mean_and_spread(v)[0] if v else math.nan for v in values]
            spread = [mean_and_spread(v)[1] if len(v) > 1 else math.nan for v in values]
            axis.errorbar(NFES, mean, yerr=spread, color=colour, marker=marker, capsize=3, label=name)
            single = [m if len(v) == 1 else math.nan for m, v in zip(mean, values)]
            axis.plot(NFES, single, color=colour, marker=marker, markerfacecolor="white", linestyle="", zorder=3)
        _log_values(axis)
        _steps_axis(axis, steps)
        _clean(axis, title, "network evaluations (teacher: Euler steps)")
    _legend(axes[0, 0])
    return figure


def draw_convergence(results: Results) -> Figure | None:
    """Quality of the averaged student over the iterations, seed 0."""
    figure, axes = _axes(10, 3.8, 2)
    one = {name: (colour, cells[0]) for name, (colour, cells, _) in FAMILIES.items()}
    four = {name: (colour, cells[2]) for name, (colour, cells, _) in FAMILIES.items() if name != "MeanFlow"}
    four["GM K=8, data-free"] = ("#0f9d8a", gm(8, 4, data_free=True))
    for axis, cells, title in zip(axes[0], (one, four), ("1 NFE", "4 NFE")):
        for name, (colour, cell) in cells.items():
            found = results.first(cell)
            if found is not None:
                rows = found["convergence"]
                axis.plot(
                    [r["iteration"] for r in rows], [r[FRECHET] for r in rows], color=colour, marker=".", label=name
                )
        _log_values(axis)
        _clean(axis, f"Fréchet distance to teacher, {title}", "iterations")
        _legend(axis)
    return figure


def draw_studies(results: Results) -> Figure | None:
    """What is varied at sampling: substeps, temperature, elastic NFE."""
    panels = (
        ("substeps", "substeps", [gm(8, 1), dx(10, 1), gm(8, 4), dx(10, 4)], "substeps of the rollout"),
        ("temperature", "temperature", [gm(8, 4)], "temperature"),
        ("elastic", "nfe", [gm(8, 4), dx(10, 4)], "evaluations at sampling, trained at 4"),
    )
    figure, axes = _axes(12, 3.8, 3)
    colours = {gm(8, 1): "#1f8ad1", gm(8, 4): "#0b4f8a", dx(10, 1): "#e0813b", dx(10, 4): "#a34f12"}
    for axis, (study, key, cells, title) in zip(axes[0], panels):
        for cell in cells:
            rows = [row for result in results.of(cell) for row in result.get("studies", {}).get(study, ())]
            levels = sorted({row[key] for row in rows})
            values = [mean_and_spread(results.studied(cell, study, key, level)) for level in levels]
            if levels:
                means, spreads = [m for m, _ in values], [s for _, s in values]
                axis.errorbar(
                    levels, means, yerr=spreads, color=colours[cell], marker="o", ms=4, capsize=3, label=cell.label
                )
        if study == "elastic":
            steps = [n for n in results.protocol["teacher_steps"] if n >= 4]
            teacher = [results.values(TEACHER, FRECHET, n)[0] for n in steps]
            axis.plot(steps, teacher, color=TEACHER_COLOUR, marker=".", linestyle="--", label="teacher, Euler")
        if study != "temperature":
            _steps_axis(axis, results.protocol["substeps"] if study == "substeps" else (4, 8, 16))
        _log_values(axis)
        _clean(axis, title, y="Fréchet distance to teacher" if study == "substeps" else "")
        _legend(axis, **({"loc": "upper right", "bbox_to_anchor": (1, 0.85)} if study == "substeps" else {}))
    return figure


def draw_trajectories(results: Results) -> Figure | None:
    """Student and teacher from one noise each, in the plane in which the teacher's path bends."""
    shown = [cell for cell in (gm(1), gm(8), gm(32), dx(10), gm(8, 4)) if results.first(cell)]
    if not shown:
        return None
    count = results.protocol["trajectories"]
    figure, axes = _axes(2.4 * len(shown), 1.7 * count + 0.5, len(shown), count, sharex=True, sharey="row")
    for column, cell in enumerate(shown):
        found = results.first(cell)
        assert found is not None
        for row, paths in enumerate(found["trajectories"]):
            axis = axes[row, column]
            for name, colour, style in (("teacher", TEACHER_COLOUR, "--"), ("student", "#1f8ad1", "-")):
                x, y = np.array(paths[name]).T
                axis.plot(x, y, color=colour, linestyle=style, label=name)
                axis.plot(x[-1], y[-1], color=colour, marker="o", markersize=4)
            _clean(axis, cell.label if row == 0 else "")
    _legend(axes[0, 0])
    figure.supxlabel("along the chord from noise to the teacher's endpoint", fontsize=9)
    figure.supylabel("across, where the teacher bends most", fontsize=9)
    return figure


def draw_samples(results: Results) -> Figure | None:
    """The first two noises of every class through every sampler; none is picked."""
    teacher = results.first(TEACHER)
    assert teacher is not None
    reference = str(results.protocol["reference_steps"])
    lines = [
        (f"teacher, {n} step" + "s" * (n != "1"), teacher["samples"][n])
        for n in (reference, "4", "1")
        if n in teacher["samples"]
    ]
    for cell in (gm(8, 4), gm(32), gm(8), gm(1), dx(10), shortcut(), meanflow()):
        if (found := results.first(cell)) is not None:
            name = f"{cell.label}, 1 NFE" if cell.method == "meanflow" else cell.label
            lines.append((name, found["samples"][str(cell.nfe)]))
    figure = Figure(figsize=(10, 0.43 * len(lines)))
    axes = figure.subplots(len(lines), 1, squeeze=False)
    figure.subplots_adjust(left=0.16, right=0.995, bottom=0.01, top=0.99, hspace=0.05)
    for axis, (name, text) in zip(axes[:, 0], lines):
        tiles = np.pad(unpacked(text).numpy(), ((0, 0), (1, 1), (1, 1)), constant_values=-1)
        axis.imshow(np.concatenate(list(tiles), axis=1), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_axis_off()
        axis.text(-0.01, 0.5, name, transform=axis.transAxes, ha="right", va="center", fontsize=9)
    return figure


def draw_toy(results: Results) -> Figure | None:
    """Static policies fitted to one trajectory: endpoints, and the path of one pixel."""
    found = results.first(TOY)
    if found is None:
        return None
    names = ["teacher", *found["fits"]]
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[1, 2.2])
    upper, lower = parts
    for axis, name in zip(upper.subplots(1, len(names)), names):
        x_0 = found["teacher"] if name == "teacher" else found["fits"][name]["x_0"]
        axis.imshow(x_0, cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_axis_off()
        axis.set_title(name, fontsize=9)
    axis = lower.subplots()
    x = np.linspace(1, 0, len(found["pixel"]["teacher"]))
    colours = dict(zip(names, ["#444444", "#bcdcf5", "#8cc5ee", "#1f8ad1", "#0b4f8a", "#f2c29b", "#e0813b", "#a34f12"]))
    for name in names:
        style: dict[str, Any] = {"linestyle": "--", "linewidth": 2.5, "zorder": 3} if name == "teacher" else {}
        axis.plot(x, found["pixel"][name], color=colours[name], label=name, **style)
    axis.invert_xaxis()
    _clean(axis, "the pixel whose velocity varies most", "noise level", "value")
    _legend(axis, ncol=2)
    return figure


def draw_checkerboard(results: Results) -> Figure | None:
    """Points on the plane."""
    found = results.first(CHECKERBOARD)
    if found is None:
        return None
    figure, axes = _axes(2.2 * len(found["points"]), 2.6, len(found["points"]))
    for axis, (name, points) in zip(axes[0], found["points"].items()):
        x, y = np.array(points).T
        axis.scatter(x, y, s=1.5, color="#0b4f8a" if "student" in name else TEACHER_COLOUR, linewidths=0)
        axis.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), aspect="equal", xticks=(-2, 0, 2), yticks=(-2, 0, 2))
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
    return figure
