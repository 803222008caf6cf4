"""The stored results as the report reads them: values over seeds, by cell and metric."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.paper.cells import Budget, Cell, Method
from benchmarks.paper.store import cell_of

FRECHET, ENDPOINT, DATA = "frechet_to_teacher", "endpoint_mse", "frechet_to_data"

ASSUMED_SPREAD = 0.18
"""Of the logarithm of a metric between seeds, as long as no cell was repeated."""

ENOUGH_REPEATS = 5
"""From which on the cells of one method have a spread of their own."""


class Results:
    """What benchmarks/results/paper.json holds; cells are looked up whatever their budget and seed."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document, self.protocol = document, document["protocol"]
        self.cells = [(cell_of(result), result) for result in document["cells"]]

    def of(self, cell: Cell) -> list[dict[str, Any]]:
        """The results of this cell, one per seed."""
        return [result for other, result in self.cells if anonymous(other) == anonymous(cell)]

    def first(self, cell: Cell) -> dict[str, Any] | None:
        """The result with the lowest seed, or None."""
        found = self.of(cell)
        return min(found, key=lambda result: result["settings"]["seed"]) if found else None

    def values(self, cell: Cell, metric: str = FRECHET, nfe: int | None = None) -> list[float]:
        """A metric at `nfe` steps (default: those it was trained for), one value per seed."""
        rows = (result["measures"].get(str(cell.nfe if nfe is None else nfe)) for result in self.of(cell))
        return [row[metric] for row in rows if row is not None and metric in row]

    def studied(self, cell: Cell, study: str, key: str, at: float, metric: str = FRECHET) -> list[float]:
        """A metric where a setting was varied at sampling, one value per seed."""
        rows = (row for result in self.of(cell) for row in result.get("studies", {}).get(study, ()))
        return [row[metric] for row in rows if row[key] == at]

    def students(self) -> list[Cell]:
        """The students of digits that are there, seed 0 standing for all seeds, in the order of the document."""
        kinds = ("gm", "dx", "shortcut", "meanflow")
        return list(dict.fromkeys(cell.variant for cell, _ in self.cells if cell.method in kinds))

    def spread(self, metric: str, method: Method | None = None) -> float:
        """Standard deviation of log(metric) between seeds, pooled over the cells of a method that were repeated; over
        those of all methods where there are too few.
        """
        squares, freedom = 0.0, 0
        for cell in self.students():
            if method not in (None, cell.method):
                continue
            for nfe in cell.sampled_nfes:
                logs = [math.log(max(value, 1e-12)) for value in self.values(cell, metric, nfe)]
                mean = sum(logs) / max(len(logs), 1)
                squares += sum((value - mean) ** 2 for value in logs)
                freedom += max(len(logs) - 1, 0)
        if method is not None and freedom < ENOUGH_REPEATS:
            return self.spread(metric)
        return math.sqrt(squares / freedom) if freedom else ASSUMED_SPREAD


def anonymous(cell: Cell) -> Cell:
    """The cell without seed and budget."""
    return replace(cell, seed=0, budget=Budget())


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter 0 for one value."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))


def shown(values: Sequence[float], digits: int = 3) -> str:
    """ "2.34 ± 0.12 (n=3)", "2.34 (n=1)", or a dash for no values."""
    if not values:
        return "-"
    mean, spread = mean_and_spread(values)
    text = f"{significant(mean, digits)}"
    return f"{text} ± {significant(spread, 2)} (n={len(values)})" if len(values) > 1 else f"{text} (n=1)"


def significant(value: float, digits: int) -> str:
    """So many significant digits, without an exponent."""
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded value: 0.9999 has that of 1.00
    return f"{value:.{max(digits - 1 - exponent, 0)}f}"


def machines(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The different machines of a document."""
    seen: list[dict[str, Any]] = []
    for result in document["cells"]:
        if result["machine"] not in seen:
            seen.append(result["machine"])
            yield result["machine"]
