"""Verdicts by code: made-up results, and what the rules must say of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.paper.cells import TEACHER, Cell, dx, gm, meanflow, shortcut
from benchmarks.paper.claims import CLAIMS, Contrast, Side, judge
from benchmarks.paper.explanations import EXPLANATIONS
from benchmarks.paper.results import Results, shown


def made_up(values: dict[Cell, list[float]], teacher: dict[int, float] | None = None) -> Results:
    """Results in which each cell has these Fréchet distances, one per seed, at its own number of steps."""
    rows: list[dict[str, Any]] = []
    for cell, per_seed in values.items():
        for seed, value in enumerate(per_seed):
            measures = {str(nfe): {"frechet_to_teacher": value, "diversity": value} for nfe in cell.sampled_nfes}
            rows.append({"id": f"{cell.id}{seed}", "settings": replace(cell, seed=seed).settings, "measures": measures})
    measures = {str(n): {"frechet_to_teacher": value} for n, value in (teacher or {}).items()}
    rows.append({"id": "t", "settings": TEACHER.settings, "measures": measures})
    return Results({"protocol": {}, "cells": rows})


def verdict_of(claim_id: str, results: Results) -> str:
    return judge(next(claim for claim in CLAIMS if claim.id == claim_id), results).verdict


def test_verdicts_follow_the_numbers() -> None:
    gms, dxs = [1.0, 1.1, 0.9], [2.0, 2.1, 1.9]
    assert verdict_of("gm_over_dx", made_up({gm(8): gms, dx(10): dxs})) == "holds"
    assert verdict_of("gm_over_dx", made_up({gm(8): dxs, dx(10): gms})) == "does not hold"
    assert verdict_of("gm_over_dx", made_up({gm(8): gms, dx(10): [1.05, 0.95, 1.0]})) == "not decided"
    assert verdict_of("gm_over_dx", made_up({gm(8): gms})) == "not decided"


def test_one_contrary_comparison_is_enough() -> None:
    values = {gm(1): [4.0, 4.1], gm(8): [2.0, 2.1], gm(32): [3.0, 3.1]}
    judgement = judge(next(claim for claim in CLAIMS if claim.id == "components"), made_up(values))
    assert [verdict for _, verdict in judgement.contrasts] == ["does not hold", "holds"]
    assert judgement.verdict == "does not hold"


def test_single_seeds_need_a_large_difference() -> None:
    assert verdict_of("gm_over_dx", made_up({gm(8): [1.0], dx(10): [1.5]})) == "not decided"
    assert verdict_of("gm_over_dx", made_up({gm(8): [1.0], dx(10): [1.8]})) == "holds"


def test_the_spread_is_pooled_over_repeated_cells() -> None:
    results = made_up({gm(8): [1.0, math.e], dx(10): [2.0, 2.0], gm(1): [5.0]})
    assert results.spread("frechet_to_teacher") == pytest.approx(0.5)  # (0.5^2 + 0.5^2 + 0 + 0) / 2


def test_a_student_is_compared_with_the_teacher() -> None:
    students = {gm(8): [2.0, 2.1], gm(8, 2): [0.5, 0.55], gm(8, 4): [0.3, 0.33]}
    assert verdict_of("few_steps", made_up(students, {2: 9.0, 4: 3.0, 8: 1.0})) == "holds"
    assert verdict_of("few_steps", made_up(students, {2: 1.0, 4: 1.0, 8: 1.0})) == "does not hold"


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [([0.98, 1.02], "holds"), ([0.7, 0.71], "does not hold"), ([0.8, 1.08], "not decided")],
)
def test_diversity_is_near_the_teachers(ratios: list[float], verdict: str) -> None:
    assert verdict_of("diversity", made_up({gm(8): ratios})) == verdict


def test_not_above_allows_its_tolerance() -> None:
    results = made_up({gm(8): [1.0, 1.02, 0.98]})
    base = Side("b", [1.0, 1.0, 1.0])
    verdicts = [Contrast(Side("a", [v] * 3), "not above", base).verdict(results) for v in (0.5, 1.2, 1.4)]
    assert verdicts == ["holds", "holds", "does not hold"]


def test_no_worse_must_be_certain() -> None:
    """The same means hold with many seeds that agree, and are not decided with few that do not."""
    free = gm(8, 4, data_free=True)
    assert verdict_of("data_free", made_up({free: [1.0] * 3, gm(8, 4): [0.99, 1.0, 1.01]})) == "holds"
    assert verdict_of("data_free", made_up({free: [1.0], gm(8, 4): [0.7, 1.0, 1.4]})) == "not decided"


def test_every_seed_must_agree_where_the_same_students_are_sampled_in_two_ways() -> None:
    results = made_up({gm(8): [1.0, 1.0]})
    base = Side("b", [1.0, 2.0], exact=True)
    verdicts = [
        Contrast(Side("a", values, exact=True), "below", base).verdict(results)
        for values in ([0.8, 1.6], [0.8, 2.2], [0.8, 1.9], [1.3, 2.6])
    ]
    assert verdicts == ["holds", "not decided", "not decided", "does not hold"]


def test_a_method_has_a_spread_of_its_own_with_enough_repeats() -> None:
    few = {gm(8): [1.0, 1.0], meanflow(): [1.0, math.e]}
    results = made_up(few)
    assert results.spread("frechet_to_teacher", "gm") == results.spread("frechet_to_teacher") > 0
    results = made_up(few | {gm(size): [1.0] * 5 for size in (1, 32)})
    assert results.spread("frechet_to_teacher", "gm") == 0
    assert results.spread("frechet_to_teacher", "meanflow") == results.spread("frechet_to_teacher") > 0


def test_other_metrics_are_judged_beside() -> None:
    document = made_up({gm(8): [1.0, 1.0], shortcut(): [3.0, 3.0]}).document
    for result in document["cells"][:-1]:
        for row in result["measures"].values():
            row |= {"endpoint_mse": 1 / row["frechet_to_teacher"], "frechet_to_data": 2.0}
    judgement = judge(next(claim for claim in CLAIMS if claim.id == "shortcut"), Results(document))
    assert judgement.verdict == "holds"
    assert judgement.beside == {"endpoint_mse": "does not hold", "frechet_to_data": "not decided"}


def test_numbers_are_shown_with_spread_and_count() -> None:
    assert shown([1.0, 2.0, 3.0]) == "2.00 ± 1.0 (n=3)"
    assert shown([0.0123]) == "0.0123 (n=1)"
    assert shown([0.9996]) == "1.00 (n=1)"
    assert shown([]) == "-"


def test_explanations_belong_to_claims() -> None:
    assert {claim for claim, _ in EXPLANATIONS} <= {claim.id for claim in CLAIMS}
    assert {verdict for _, verdict in EXPLANATIONS} <= {"holds", "does not hold", "not decided"}
