"""The paper's claims, and what the stored results say of each: holds, does not hold, or not decided."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from benchmarks.paper.cells import TEACHER, Cell, dx, gm, meanflow, shortcut
from benchmarks.paper.explanations import EXPLANATIONS
from benchmarks.paper.results import ENDPOINT, FRECHET, Results, mean_and_spread, shown

Verdict = Literal["holds", "does not hold", "not decided"]

STANDARD_ERRORS = 2.0
"""A difference counts from so many standard errors on."""

EXACT_FACTOR = 1.1
"""What counts where nothing varies between seeds, or where the same students are sampled in two ways."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison: its values over seeds; `exact` where the spread between seeds is of no account."""

    name: str
    values: Sequence[float]
    exact: bool = False

    def __str__(self) -> str:
        return f"{self.name} {shown(self.values) if not self.exact else shown(self.values).partition(' (')[0]}"


@dataclass(frozen=True)
class Contrast:
    """`below`: left is smaller than right. `not above`: left is no larger, up to `tolerance` as a factor.
    `near 1`: left, a ratio, is 1 up to `tolerance`.
    """

    left: Side
    relation: Literal["below", "not above", "near 1"]
    right: Side | None = None
    metric: str = FRECHET
    tolerance: float = 1.25

    def verdict(self, results: Results) -> Verdict:
        """Decided where the difference of the logarithms exceeds two standard errors between seeds."""
        if self.relation == "near 1":
            mean, spread = mean_and_spread(self.left.values)
            off = abs(mean - 1)
            if off <= self.tolerance - 1:
                return "holds"
            error = spread / math.sqrt(len(self.left.values))
            return "does not hold" if off > self.tolerance - 1 + STANDARD_ERRORS * error else "not decided"
        assert self.right is not None
        difference = _log_mean(self.left) - _log_mean(self.right)
        threshold = self._threshold(results)
        if self.relation == "below":
            if abs(difference) <= threshold:
                return "not decided"
            return "holds" if difference < 0 else "does not hold"
        if difference <= math.log(self.tolerance):
            return "holds"
        return "does not hold" if difference > threshold else "not decided"

    def _threshold(self, results: Results) -> float:
        assert self.right is not None
        counts = [len(side.values) for side in (self.left, self.right) if not side.exact]
        if not counts:
            return math.log(EXACT_FACTOR)
        return STANDARD_ERRORS * results.spread(self.metric) * math.sqrt(sum(1 / count for count in counts))

    def __str__(self) -> str:
        if self.right is None:
            return f"{self.left}, expected 1 within {100 * (self.tolerance - 1):.0f} %"
        return f"{self.left} {self.relation} {self.right}"


@dataclass(frozen=True)
class Claim:
    """What the paper says, in our words, and the comparisons that would show it on the digits."""

    id: str
    statement: str
    contrasts: Callable[[Results], Iterator[Contrast]]


@dataclass(frozen=True)
class Judgement:
    """A claim with the comparisons that could be made, and how many could not for want of cells; `why` was written for
    this verdict, or is None.
    """

    claim: Claim
    verdict: Verdict
    contrasts: tuple[tuple[Contrast, Verdict], ...]
    missing: int
    why: str | None


def judge(claim: Claim, results: Results) -> Judgement:
    """Does not hold if any comparison goes the other way, holds if all go its way, else it is not decided."""
    wanted = list(claim.contrasts(results))
    possible = [c for c in wanted if c.left.values and (c.right is None or c.right.values)]
    pairs = tuple((contrast, contrast.verdict(results)) for contrast in possible)
    verdicts = {verdict for _, verdict in pairs}
    verdict: Verdict = "not decided"
    if "does not hold" in verdicts:
        verdict = "does not hold"
    elif verdicts == {"holds"}:
        verdict = "holds"
    return Judgement(claim, verdict, pairs, len(wanted) - len(pairs), EXPLANATIONS.get((claim.id, verdict)))


def judge_all(results: Results) -> list[Judgement]:
    """All claims in the order of the text."""
    return [judge(claim, results) for claim in CLAIMS]


def _log_mean(side: Side) -> float:
    return sum(math.log(max(value, 1e-12)) for value in side.values) / len(side.values)


def _student(results: Results, cell: Cell, nfe: int | None = None, metric: str = FRECHET) -> Side:
    steps = f", {nfe} NFE" if nfe is not None and cell.method == "meanflow" else ""
    return Side(cell.label + steps, results.values(cell, metric, nfe))


def _teacher(results: Results, steps: int, metric: str = FRECHET) -> Side:
    return Side(f"teacher, {steps} Euler steps", results.values(TEACHER, metric, steps), exact=True)


def _sampled(results: Results, cell: Cell, study: str, key: str, at: float, how: str) -> Side:
    return Side(f"{cell.label}, {how}", results.studied(cell, study, key, at), exact=True)


def _below(results: Results, *cells: Cell, metric: str = FRECHET) -> Iterator[Contrast]:
    """Each cell below the next that is there; at least one comparison."""
    sides = [_student(results, cell, metric=metric) for cell in cells]
    there = [side for side in sides if side.values]
    sides = there if len(there) > 1 else sides[:2]
    for left, right in pairwise(sides):
        yield Contrast(left, "below", right, metric)


def _few_steps(results: Results) -> Iterator[Contrast]:
    yield Contrast(_student(results, gm(8)), "below", _teacher(results, 4))
    yield Contrast(_student(results, gm(8, 2)), "below", _teacher(results, 4))
    yield Contrast(_student(results, gm(8, 4)), "below", _teacher(results, 8))


def _more_steps(results: Results) -> Iterator[Contrast]:
    yield from _below(results, gm(8, 4), gm(8, 2), gm(8, 1))


def _components(results: Results) -> Iterator[Contrast]:
    yield from _below(results, gm(32), gm(8), gm(4), gm(1))


def _gm_over_dx(results: Results) -> Iterator[Contrast]:
    for nfe in (1, 2, 4):
        for size in (5, 10, 20):
            yield Contrast(_student(results, gm(8, nfe)), "below", _student(results, dx(size, nfe)))


def _shortcut(results: Results) -> Iterator[Contrast]:
    for nfe in (1, 2, 4):
        yield Contrast(_student(results, gm(8, nfe)), "below", _student(results, shortcut(nfe)))


def _meanflow(results: Results) -> Iterator[Contrast]:
    for nfe in (1, 2, 4):
        yield Contrast(_student(results, gm(8, nfe)), "below", _student(results, meanflow(), nfe))


def _diversity(results: Results) -> Iterator[Contrast]:
    for nfe in (1, 2, 4):
        side = _student(results, gm(8, nfe), metric="diversity")
        yield Contrast(side, "near 1", metric="diversity", tolerance=1.05)


def _data_free(results: Results) -> Iterator[Contrast]:
    for nfe in (2, 4):
        free, based = (_student(results, cell) for cell in (gm(8, nfe, data_free=True), gm(8, nfe)))
        yield Contrast(free, "not above", based)


def _dropout(results: Results) -> Iterator[Contrast]:
    for nfe in (1, 4):
        yield from _below(results, gm(8, nfe), gm(8, nfe, dropout=0.0))


def _window(results: Results) -> Iterator[Contrast]:
    for nfe in (1, 4):
        yield from _below(results, gm(8, nfe, window=3), gm(8, nfe))


def _mixing(results: Results) -> Iterator[Contrast]:
    for nfe in (1, 4):
        yield from _below(results, gm(8, nfe, mixing=True), gm(8, nfe))


def _substeps(results: Results) -> Iterator[Contrast]:
    for cell in (gm(8, 1), gm(8, 4)):
        few, trained, many = (
            _sampled(results, cell, "substeps", "substeps", n, f"{n} substeps") for n in (8, 128, 512)
        )
        yield Contrast(trained, "below", few)
        yield Contrast(trained, "not above", many, tolerance=1.1)


def _temperature(results: Results) -> Iterator[Contrast]:
    sharp, plain = (_sampled(results, gm(8, 4), "temperature", "temperature", t, f"T = {t:g}") for t in (0.3, 1.0))
    yield Contrast(sharp, "below", plain)


def _elastic(results: Results) -> Iterator[Contrast]:
    trained, *more = (_sampled(results, gm(8, 4), "elastic", "nfe", n, f"run at {n}") for n in (4, 8, 16))
    for side in more:
        yield Contrast(side, "not above", trained, tolerance=1.1)


def _toy(results: Results) -> Iterator[Contrast]:
    found = results.first(Cell("toy"))
    fits = found["fits"] if found else {}
    names = [name for name in ("GM K=32", "GM K=8", "GM K=4", "GM K=1") if name in fits]
    sides = [Side(name, [fits[name]["velocity_error"]], exact=True) for name in names]
    for left, right in pairwise(sides):
        yield Contrast(left, "below", right, "velocity_error")


def _checkerboard(results: Results) -> Iterator[Contrast]:
    found = results.first(Cell("checkerboard"))
    if found is None:
        return
    student, teacher = (
        Side(name, [found["rows"][name][ENDPOINT]], exact=True) for name in ("GM student, 1 NFE", "teacher, 4 steps")
    )
    yield Contrast(student, "below", teacher, ENDPOINT)


CLAIMS: tuple[Claim, ...] = (
    Claim("few_steps", "A student beats its teacher run with at least twice as many Euler steps.", _few_steps),
    Claim("more_steps", "More network evaluations make a better student.", _more_steps),
    Claim("components", "More mixture components make a better one-step student.", _components),
    Claim("gm_over_dx", "The GM policy is ahead of the DX policy.", _gm_over_dx),
    Claim("shortcut", "Imitating a policy is ahead of regressing the segment's end directly.", _shortcut),
    Claim("meanflow", "It is ahead of MeanFlow with the same network and budget.", _meanflow),
    Claim("diversity", "Students keep the teacher's diversity.", _diversity),
    Claim("data_free", "Training without data is about as good as training with it.", _data_free),
    Claim("dropout", "Dropping components of the policy that is rolled out helps.", _dropout),
    Claim("window", "Averaging the velocity over a micro-window helps.", _window),
    Claim("mixing", "Mixing the teacher into the trajectory, less and less, helps.", _mixing),
    Claim("substeps", "Substeps are worth having, and 128 of them are enough.", _substeps),
    Claim("temperature", "A temperature below 1 helps with few steps.", _temperature),
    Claim("elastic", "A student trained for 4 steps may be run with up to 16.", _elastic),
    Claim("toy", "A static mixture follows a teacher's trajectory, the better the more components it has.", _toy),
    Claim("checkerboard", "One evaluation of a GM policy does what several teacher steps do, in 2D.", _checkerboard),
)
