"""Every path is as exact as docs/numerics.md says, regime by regime, and the page says what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.numerics import COMPONENTS, REGIMES, ROOT, Measurement, Regime, load, measure, rendered
from tests.kernels.interpreter import Interpreter

PAGE: Path = ROOT / "docs" / "numerics.md"


def case_id(regime: Regime) -> str:
    return f"{regime.operator}: {regime.name}"


def assert_within_bounds(measurements: list[Measurement]) -> None:
    for m in measurements:
        assert m.worst_share() <= 1, m


@pytest.mark.parametrize("regime", REGIMES, ids=case_id)
def test_pytorch_path(regime: Regime) -> None:
    for k in COMPONENTS:
        for n in regime.substeps:
            assert_within_bounds(list(measure(regime, k, n, None)))


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    pytest.importorskip("triton")
    with Interpreter() as interpreter:
        yield interpreter


@pytest.mark.parametrize("regime", REGIMES, ids=case_id)
def test_triton_path(interpreter: Interpreter, regime: Regime) -> None:
    """Few substeps, because the interpreter takes its time: the stored measurement has more."""
    for k, n in ((8, 2), (32, 1)):
        assert_within_bounds(list(measure(regime, k, min(n, regime.substeps[-1]), interpreter, batch=2)))


def test_stored_measurement_is_whole_and_within_bounds() -> None:
    stored = load()
    assert {(m.operator, m.regime, m.k, m.n) for m in stored} == {
        (regime.operator, regime.name, k, n) for regime in REGIMES for k in COMPONENTS for n in regime.substeps
    }
    assert all({"reference", "torch"} <= set(m.errors) for m in stored)
    assert any("triton" in m.errors and m.n > 3 for m in stored)
    assert_within_bounds(stored)


def test_page_shows_the_stored_measurement() -> None:
    assert PAGE.read_text() == rendered(PAGE.read_text(), load())
