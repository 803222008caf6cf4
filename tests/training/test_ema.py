"""Karras momentum and the trajectory of an average against the recorded ones."""

from __future__ import annotations

import pytest
import torch

from piflow.training.ema import karras_momentum, update_average
from tests.golden_vectors import load_group

GROUP = load_group("g10_ema")


@pytest.mark.parametrize("case", [c for c in GROUP.cases if c.id.startswith("karras.g")], ids=lambda case: case.id)
def test_karras_momentum(case) -> None:
    gamma, start = case.scalars["gamma"], case.scalars["start_iter"]
    momentum = torch.tensor([karras_momentum(i, gamma, start) for i in range(120)], dtype=torch.float64)
    torch.testing.assert_close(momentum, case.outputs["momentum"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("case_id", ["run.start0.int1", "run.start10.int1"])
def test_trajectory(case_id: str) -> None:
    case = GROUP[case_id]
    shadow = [torch.zeros(5)]
    for i, (current, expected) in enumerate(zip(case.inputs["net_w"], case.outputs["ema_w"])):
        update_average(shadow, [current], karras_momentum(i, case.scalars["gamma"], case.scalars["start_iter"]))
        torch.testing.assert_close(shadow[0], expected, rtol=1e-6, atol=1e-7)
