"""The ahead-of-time gate: everything that the launch rule can choose compiles without a GPU, and well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks import static_report
from piflow_kernels.configs import FAMILIES, gm_form, gm_launch_config

ARCHITECTURES = (80, 90, 100)


def test_the_form_is_one_that_fits() -> None:
    """One rule from (K, C, N) for each direction, never an error."""
    assert gm_form(8, 16, 37, "forward") == "gram"
    assert gm_form(8, 16, 1, "forward") == "channel"
    assert gm_form(32, 4, 128, "forward") == "channel"
    assert gm_form(8, 64, 1, "forward") == "gram"  # channel space would be cheaper, but does not fit
    assert gm_form(16, 16, 37, "forward") == "channel"
    assert gm_form(16, 64, 37, "forward") == "streamed"
    assert gm_form(8, 16, 3, "backward") == "gram"
    assert gm_form(8, 1, 3, "backward") == "streamed"  # what Gram space keeps would exceed a quarter of the inputs
    assert gm_form(32, 4, 3, "backward") == "streamed"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_shape_has_a_launch(family: str) -> None:
    """Powers of two that cover the channels, at least one warp, K from 1 to 64 and C from 1 to 128."""
    constants = FAMILIES[family]
    for k in range(1, 65):
        for c in range(1, 129):
            for n in (0, 1, 3, 4, 5, 128):
                for direction in ("forward", "backward"):
                    form = gm_form(k, c, n, direction)
                    config = gm_launch_config(form, direction, k, c, n, constants)
                    assert config.block & (config.block - 1) == 0 < config.block
                    assert 1 <= config.num_warps <= 8
                    assert config.constants.get("C_TILE", c) >= c
                    assert config.constants.get("K_TILE", k) >= k


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`python -m benchmarks.static_report`: it ends with 1 where the gate fails, and says what fails."""
    path: Path = tmp_path_factory.mktemp("report") / "static.json"
    assert static_report.main(["--json", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.mark.slow
def test_nothing_spills_and_no_float64_per_pixel(report: dict[str, Any]) -> None:
    assert len(report["kernels"]) > 300
    for kernel in report["kernels"]:
        assert kernel["failures"] == []
        assert kernel["spill_bytes"] == kernel["local_instructions"] == 0
        assert kernel["float64_instructions"] == 0 or "coefficients" in kernel["kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [(8, 16), (32, 4), (16, 16), (8, 64)])
def test_the_report_holds_what_it_promises(report: dict[str, Any], size: tuple[int, int]) -> None:
    """Both directions on every architecture; multiply-adds of a forward substep within 1.35 of the algebra's."""
    for arch in ARCHITECTURES:
        for direction in ("forward", "backward"):
            rows = [
                row for row in report["kernels"]
                if (row["K"], row["C"]) == size and row["arch"] == arch and row["direction"] == direction
                and row["policy"] == "gm" and row["op"] == "gm_rollout" and row["fp_fusion"]
            ]  # fmt: skip
            assert {row["layout"] for row in rows} >= {"spatial", "packed"}
            assert {row["dtype"] for row in rows} >= {"bf16", "fp32"}
            for row in rows:
                assert row["registers"] <= 255
                assert row["occupancy"] > 0
                assert min(row["instructions_total"], row["fma_per_substep"], row["mufu_per_substep"]) > 0
                if direction == "forward":
                    k, c = size
                    needed = (k * k if row["space"] == "gram" else 2 * k * c) + 8 * k
                    assert row["fma_per_substep"] <= 1.35 * needed
