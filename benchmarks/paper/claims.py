"""The paper's claims, and what the stored results say of each: holds, does not hold, or not decided."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from benchmarks.paper.cells import TEACHER, Cell, Method, dx, gm, meanflow, shortcut
from benchmarks.paper.explanations import EXPLANATIONS
from benchmarks.paper.results import DATA, ENDPOINT, FRECHET, Results, shown

Verdict = Literal["holds", "does not hold", "not decided"]

BESIDE = {ENDPOINT: "endpoint MSE", DATA: "Fréchet to data"}
"""Metrics by which the same comparisons are made once more, without deciding a verdict."""

STANDARD_ERRORS = 2.0
"""Half the width of the interval that is believed around a difference."""

EXACT_FACTOR = 1.1
"""What counts where the spread between seeds is of no account."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison: its values over seeds; `exact` where the spread between seeds is of no account; the
    method whose spread it has otherwise.
    """

    name: str
    values: Sequence[float]
    exact: bool = False
    method: Method | None = None

    def __str__(self) -> str:
        text = shown(self.values)
        return f"{self.name} {text.removesuffix(' (n=1)') if self.exact else text}"

    def error(self, results: Results, metric: str) -> float:
        """Standard error of the mean logarithm."""
        return 0.0 if self.exact else results.spread(metric, self.method) / math.sqrt(len(self.values))


@dataclass(frozen=True)
class Contrast:
    """`below`: left is smaller than right. `not above`: left is no larger, up to `tolerance` as a factor.
    `near 1`: left, a ratio, is 1 up to `tolerance` as a factor.
    """

    left: Side
    relation: Literal["below", "not above", "near 1"]
    right: Side | None = None
    metric: str = FRECHET
    tolerance: float = 1.25

    def verdict(self, results: Results) -> Verdict:
        """Holds or not where all that the interval allows is on one side of the bounds; else it is not decided."""
        low, high = self._interval(results)
        exact = self.left.exact and self.right is not None and self.right.exact
        margin = math.log(EXACT_FACTOR) if exact else 0.0
        bounds = (-margin, margin) if self.relation == "below" else (math.log(self.tolerance),) * 2
        if high < bounds[0]:
            return "holds"
        return "does not hold" if low > bounds[1] else "not decided"

    def _interval(self, results: Results) -> tuple[float, float]:
        """Of log(left / right), or of |log left|: two standard errors either way; the range over seeds where both sides
        are exact.
        """
        error = STANDARD_ERRORS * self.left.error(results, self.metric)
        if self.right is None:
            off = abs(_log_mean(self.left.values))
            return off - error, off + error
        if self.left.exact and self.right.exact:
            differences = [_log(left) - _log(right) for left, right in zip(self.left.values, self.right.values)]
            return min(differences), max(differences)
        error = math.hypot(error, STANDARD_ERRORS * self.right.error(results, self.metric))
        difference = _log_mean(self.left.values) - _log_mean(self.right.values)
        return difference - error, difference + error

    def __str__(self) -> str:
        if self.right is None:
            return f"{self.left}, expected 1 within {100 * (self.tolerance - 1):.0f} %"
        allowance = f" by more than {100 * (self.tolerance - 1):.0f} %" if self.relation == "not above" else ""
        return f"{self.left} {self.relation} {self.right}{allowance}"


@dataclass(frozen=True)
class Claim:
    """What is said of pi-Flow, in our words, and by whom; the comparisons by a metric that would show it on the digits.

    metric: the only one that it is about; None where it is judged by Fréchet distance, and by the others beside.
    """

    id: str
    statement: str
    source: str
    contrasts: Callable[[Results, str], Iterator[Contrast]]
    metric: str | None = None


@dataclass(frozen=True)
class Judgement:
    """A claim with the comparisons that could be made, and how many could not for want of cells; `why` was written for
    this verdict, or is None. beside: the verdicts by other metrics.
    """

    claim: Claim
    verdict: Verdict
    contrasts: tuple[tuple[Contrast, Verdict], ...]
    missing: int
    why: str | None
    beside: dict[str, Verdict]


def judge(claim: Claim, results: Results) -> Judgement:
    """Does not hold if any comparison goes the other way, holds if all that are possible go its way, else undecided."""
    metric = claim.metric or FRECHET
    wanted = list(claim.contrasts(results, metric))
    pairs = tuple((contrast, contrast.verdict(results)) for contrast in wanted if _possible(contrast))
    verdict = _together(pairs)
    beside: dict[str, Verdict] = {}
    for other in () if claim.metric else BESIDE:
        contrasts = [contrast for contrast in claim.contrasts(results, other) if _possible(contrast)]
        beside[other] = _together(tuple((contrast, contrast.verdict(results)) for contrast in contrasts))
    why = EXPLANATIONS.get((claim.id, verdict))
    return Judgement(claim, verdict, pairs, len(wanted) - len(pairs), why, beside)


def judge_all(results: Results) -> list[Judgement]:
    """All claims in the order of the text."""
    return [judge(claim, results) for claim in CLAIMS]


def _possible(contrast: Contrast) -> bool:
    return bool(contrast.left.values and (contrast.right is None or contrast.right.values))


def _together(pairs: Sequence[tuple[Contrast, Verdict]]) -> Verdict:
    verdicts = {verdict for _, verdict in pairs}
    if "does not hold" in verdicts:
        return "does not hold"
    return "holds" if verdicts == {"holds"} else "not decided"


def _log(value: float) -> float:
    return math.log(max(value, 1e-12))


def _log_mean(values: Sequence[float]) -> float:
    return sum(map(_log, values)) / len(values)


def _student(results: Results, cell: Cell, metric: str, nfe: int | None = None) -> Side:
    steps = f", {nfe} NFE" if nfe is not None and cell.method == "meanflow" else ""
    return Side(cell.label + steps, results.values(cell, metric, nfe), method=cell.method)


def _teacher(results: Results, steps: int, metric: str) -> Side:
    name = f"teacher, {steps} Euler step{'s' * (steps > 1)}"
    return Side(name, results.values(TEACHER, metric, steps), exact=True)


def _sampled(results: Results, cell: Cell, study: str, key: str, at: float, how: str, metric: str) -> Side:
    return Side(f"{cell.label}, {how}", results.studied(cell, study, key, at, metric), exact=True)


def _below(results: Results, metric: str, *cells: Cell) -> Iterator[Contrast]:
    """Each cell below the next that is there; at least one comparison."""
    sides = [_student(results, cell, metric) for cell in cells]
    there = [side for side in sides if side.values]
    sides = there if len(there) > 1 else sides[:2]
    for left, right in pairwise(sides):
        yield Contrast(left, "below", right, metric)


def _few_steps(results: Results, metric: str) -> Iterator[Contrast]:
    for nfe in (1, 2, 4):
        yield Contrast(_student(results, gm(8, nfe), metric), "below", _teacher(results, 2 * nfe, metric), metric)


def _more_steps(results: Results, metric: str) -> Iterator[Contrast]:
    yield from _below(results, metric, gm(8, 4), gm(8, 2), gm(8, 1))


def _components(results: Results, metric: str) -> Iterator[Contrast]:
    yield from _below(results, metric, gm(32), gm(8), gm(4), gm(1))


def _ahead(results: Results, metric: str, nfe: int, other: Side) -> Contrast:
    return Contrast(_student(results, gm(8, nfe), metric), "below", other, metric)


def _gm_over_dx(results: Results, metric: str) -> Iterator[Contrast]:
    for nfe in (1, 2, 4):
        for size in (5, 10, 20):
            yield _ahead(results, metric, nfe, _student(results, dx(size, nfe), metric))


def _shortcut(results: Results, metric: str) -> Iterator[Contrast]:
    for nfe in (1, 2, 4):
        yield _ahead(results, metric, nfe, _student(results, shortcut(nfe), metric))


def _meanflow(results: Results, metric: str) -> Iterator[Contrast]:
    for nfe in (1, 2, 4):
        yield _ahead(results, metric, nfe, _student(results, meanflow(), metric, nfe))


def _diversity(results: Results, metric: str) -> Iterator[Contrast]:
    for nfe in (1, 2, 4):
        yield Contrast(_student(results, gm(8, nfe), metric), "near 1", metric=metric, tolerance=1.05)


def _data_free(results: Results, metric: str) -> Iterator[Contrast]:
    for nfe in (2, 4):
        free, based = (_student(results, cell, metric) for cell in (gm(8, nfe, data_free=True), gm(8, nfe)))
        yield Contrast(free, "not above", based, metric)


def _dropout(results: Results, metric: str) -> Iterator[Contrast]:
    for nfe in (1, 4):
        yield from _below(results, metric, gm(8, nfe), gm(8, nfe, dropout=0.0))


def _window(results: Results, metric: str) -> Iterator[Contrast]:
    for nfe in (1, 4):
        yield from _below(results, metric, gm(8, nfe, window=3), gm(8, nfe))


def _mixing(results: Results, metric: str) -> Iterator[Contrast]:
    for nfe in (1, 4):
        yield from _below(results, metric, gm(8, nfe, mixing=True), gm(8, nfe))


def _substeps(results: Results, metric: str) -> Iterator[Contrast]:
    for cell in (gm(8, 1), gm(8, 4), dx(10, 1), dx(10, 4)):
        few, trained, many = (
            _sampled(results, cell, "substeps", "substeps", n, f"{n} substeps", metric) for n in (8, 128, 512)
        )
        yield Contrast(trained, "below", few, metric)
        yield Contrast(trained, "not above", many, metric, tolerance=1.1)


def _temperature(results: Results, metric: str) -> Iterator[Contrast]:
    sharp, plain = (
        _sampled(results, gm(8, 4), "temperature", "temperature", t, f"T = {t:g}", metric) for t in (0.3, 1.0)
    )
    yield Contrast(sharp, "below", plain, metric)


def _elastic(results: Results, metric: str) -> Iterator[Contrast]:
    trained, *more = (_sampled(results, gm(8, 4), "elastic", "nfe", n, f"run at {n}", metric) for n in (4, 8, 16))
    for side in more:
        yield Contrast(side, "not above", trained, metric, tolerance=1.1)


def _toy(results: Results, metric: str) -> Iterator[Contrast]:
    found = results.first(Cell("toy"))
    fits = found["fits"] if found else {}
    names = [name for name in ("GM K=32", "GM K=8", "GM K=4", "GM K=1") if name in fits]
    sides = [Side(name, [fits[name][metric]], exact=True) for name in names]
    for left, right in pairwise(sides):
        yield Contrast(left, "below", right, metric)


def _checkerboard(results: Results, metric: str) -> Iterator[Contrast]:
    found = results.first(Cell("checkerboard"))
    if found is None:
        return
    student, teacher = (
        Side(name, [found["rows"][name][metric]], exact=True) for name in ("GM student, 1 NFE", "teacher, 4 steps")
    )
    yield Contrast(student, "below", teacher, metric)


ABSTRACT, EXPERIMENTS, RECIPES, README = "abstract", "experiments", "recipes", "authors' README"
"""Where a claim is from: the paper's abstract or experiments, a setting of the published recipes, the repository."""

CLAIMS: tuple[Claim, ...] = (
    Claim("few_steps", "A GM student beats its teacher run with twice as many Euler steps.", ABSTRACT, _few_steps),
    Claim("more_steps", "More network evaluations make a better student.", EXPERIMENTS, _more_steps),
    Claim("components", "More mixture components make a better one-step student.", EXPERIMENTS, _components),
    Claim("gm_over_dx", "The GM policy is ahead of the DX policy.", EXPERIMENTS, _gm_over_dx),
    Claim("shortcut", "Imitating a policy is ahead of regressing the segment's end directly.", ABSTRACT, _shortcut),
    Claim("meanflow", "It is ahead of MeanFlow with the same network and budget.", ABSTRACT, _meanflow),
    Claim("diversity", "GM students keep the teacher's diversity.", ABSTRACT, _diversity, "diversity"),
    Claim("data_free", "Training without data is about as good as training with it.", EXPERIMENTS, _data_free),
    Claim("dropout", "Dropping components of the policy that is rolled out helps.", RECIPES, _dropout),
    Claim("window", "Averaging the velocity over a micro-window helps.", RECIPES, _window),
    Claim("mixing", "Mixing the teacher into the trajectory, less and less, helps.", RECIPES, _mixing),
    Claim("substeps", "Substeps are worth having, and 128 of them are enough.", RECIPES, _substeps),
    Claim("temperature", "A temperature below 1 helps with few steps.", RECIPES, _temperature),
    Claim("elastic", "A student trained for 4 steps may be run with up to 16.", README, _elastic),
    Claim(
        "toy", "A static mixture follows a teacher's trajectory, the better the more components it has.", README, _toy,
        "velocity_error",
    ),
    Claim(
        "checkerboard", "One evaluation of a GM policy does what several teacher steps do, in 2D.", "ours",
        _checkerboard, ENDPOINT,
    ),
)  # fmt: skip
