"""What the benchmarks measure with: turns, percentiles, floors, memory, and other ways to run the textbook."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.candidates import checkpointed, compiled, textbook
from benchmarks.correctness import judge
from benchmarks.memory import available_bytes, is_out_of_memory, peak_bytes
from benchmarks.operations import packed
from benchmarks.roofline import Rates, Work, measure_rates
from benchmarks.shapes import DX_SHAPES, GM_SHAPES, GMShape, dx_work, gm_backward_work, gm_work
from benchmarks.timing import in_turns, interleaved, milliseconds, rounds_within
from piflow_kernels import dx_rollout, gm_mean_velocity_loss, gm_rollout
from piflow_kernels.gm import reference as gm_reference
from tests.kernels.problems import DX_LEAVES, GM_LEAVES, dx_problem, gm_problem, values_and_gradients


def test_candidates_take_turns() -> None:
    order: list[str] = []
    seconds = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, rounds=2, warmup=1)
    assert "".join(order) == "abc" * 3
    assert {name: len(calls) for name, calls in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_slow_candidate_takes_part_in_evenly_spread_rounds() -> None:
    order: list[str] = []
    stages = {name: [lambda _, name=name: order.append(name)] for name in "ab"}
    calls = in_turns(stages, {"a": 6, "b": 2})
    assert "".join(order) == "aaabaaab"
    assert (len(calls["a"]), len(calls["b"])) == (6, 2)
    assert in_turns({}, {}) == {}


def test_stages_hand_on_their_results_and_are_timed_apart() -> None:
    seen: list[Any] = []
    stages = [lambda start: [start], lambda before: seen.append(before)]
    (call,) = in_turns({"a": stages}, {"a": 1})["a"]
    assert seen == [[None]]
    assert len(call) == 2


def test_percentiles() -> None:
    assert milliseconds([x * 1e-3 for x in range(11)]) == {"p20": 2.0, "p50": 5.0, "p80": 8.0}
    assert milliseconds([0.003, 0.001, 0.002]) == {"p20": 1.4, "p50": 2.0, "p80": 2.6}  # never beyond what was seen
    assert milliseconds([0.5]) == {"p20": 500.0, "p50": 500.0, "p80": 500.0}


def test_rounds() -> None:
    assert rounds_within(2.0, 0.1) == 20
    assert rounds_within(2.0, 100.0) == 3
    assert rounds_within(2.0, 0.0) == 40


def test_floor_is_the_largest_of_three() -> None:
    rates = Rates(bytes=1e9, multiply_adds=1e10, exponentials=1e8, probe="made up")
    assert rates.floor_ms(Work(bytes=5e6, multiply_adds=1e6, exponentials=1e4)) == pytest.approx(5.0)
    assert rates.floor_ms(Work(bytes=1e3, multiply_adds=7e7, exponentials=1e4)) == pytest.approx(7.0)
    assert rates.floor_ms(Work(bytes=1e3, multiply_adds=1e6, exponentials=3e5)) == pytest.approx(3.0)
    assert 2 * (Work(1, 2, 3) + Work(10, 20, 30)) == Work(22, 44, 66)


def test_work_of_a_backward_pass_by_hand() -> None:
    """FLUX.2: 16384 pixels, 8 x 33 values of two bytes read and written, states and cotangent of 32 floats."""
    shape = GM_SHAPES["flux-2-1024"]
    work, forward = gm_backward_work(shape, torch.bfloat16), gm_work(shape, torch.bfloat16)
    assert work.bytes == 16384 * (2 * 8 * 33 * 2 + 5 * 32 * 4)
    assert gm_backward_work(shape, torch.bfloat16, 2).bytes == 16384 * (2 * 8 * 33 * 2 + 2 * 32 * 4)
    assert dx_work(DX_SHAPES["kandinsky-6-pro"], torch.bfloat16, 2).bytes == 31 * 60 * 108 * 16 * (20 + 8)
    assert (work.multiply_adds, work.exponentials) == (2 * forward.multiply_adds, forward.exponentials)


def test_rates_are_measured() -> None:
    rates = measure_rates("cpu", copied_bytes=1 << 20, rows=128, seconds=0.01)
    assert min(rates.bytes, rates.multiply_adds, rates.exponentials) > 1e6
    assert "copy of 1 MiB; float32 matrix product of 128 rows" in rates.probe


def test_peak_memory_of_a_call() -> None:
    size = 64 << 20
    first, second = torch.ones(1 << 20), 3

    def three_at_once() -> Tensor:
        held = [torch.ones(size // 4) for _ in range(second)]
        return held[0][:1] + first[:1]

    three_at_once()
    assert peak_bytes(three_at_once) == pytest.approx(3 * size, rel=0.05)
    assert peak_bytes(lambda: None) < size / 20  # what the call before it took has been given back


LIMITED = """
import torch
from benchmarks.memory import is_out_of_memory, limit_memory
limit = limit_memory(0.25)
torch.ones(1 << 20)
try:
    torch.empty(2 * limit, dtype=torch.uint8)
except RuntimeError as error:
    print(is_out_of_memory(error))
"""


def test_memory_is_limited() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "True\n"
    assert available_bytes() > 1 << 20
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("means: expected a tensor"))


@pytest.mark.parametrize("way", [textbook, checkpointed, lambda run: compiled(run, backend="aot_eager")])
@pytest.mark.parametrize(
    ("operator", "problem", "leaves"),
    [
        (gm_rollout, gm_problem(), GM_LEAVES),
        (gm_mean_velocity_loss, gm_problem() | {"target": torch.ones(2, 4, 3, 5, dtype=torch.float64)}, GM_LEAVES),
        (dx_rollout, dx_problem(), DX_LEAVES),
    ],
)
def test_other_ways_to_run_the_textbook_give_its_results(way: Any, operator: Any, problem: Any, leaves: Any) -> None:
    def reference(**problem: Any) -> Tensor:
        return operator(**problem, backend="reference")

    velocity = gm_reference.gm_velocity
    expected = values_and_gradients(reference, problem, leaves)
    torch.testing.assert_close(values_and_gradients(way(reference), problem, leaves), expected)
    assert gm_reference.gm_velocity is velocity  # as before


def test_the_textbook_has_its_network_output_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """On strided views of tokens it would be several times slower than anybody's own code."""
    shape = GMShape(2, 3, 5, (4, 6), 2, packed=True)
    tokens, seen = packed(shape, shape.problem(torch.float32)), []
    velocity = gm_reference.gm_velocity

    def noting(*arguments: Any) -> Tensor:
        seen.extend(each.is_contiguous() for each in arguments if isinstance(each, Tensor))
        return velocity(*arguments)

    monkeypatch.setattr(gm_reference, "gm_velocity", noting)
    result = textbook(lambda **problem: gm_rollout(**problem, layout="packed", backend="reference"))(**tokens)
    assert len(seen) == 2 * 7
    assert all(seen)
    torch.testing.assert_close(result, gm_rollout(**tokens, layout="packed"))


def test_tokens_hold_what_the_planes_hold() -> None:
    shape = GMShape(2, 3, 5, (4, 6), 4, packed=True)
    problem = shape.problem(torch.float32)
    tokens = packed(shape, problem)
    assert tokens["means"].shape == (2, 6, 3, 20)
    expected = gm_rollout(**problem).reshape(2, 5, 2, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 6, 20)
    torch.testing.assert_close(gm_rollout(**tokens, layout="packed"), expected)


def test_a_verdict_is_about_every_result() -> None:
    exact = [torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([4.0, 8.0], dtype=torch.float64)]
    near = [each.float() for each in exact]
    assert judge(["value", "means"], near, exact, near, 4).right
    off = [near[0], near[1] + torch.tensor([0.0, 8e-4])]
    verdict = judge(["value", "means"], off, exact, near, 4)
    assert not verdict.right
    name, error, bound = verdict.worst
    assert name.startswith("means")
    assert error > bound == pytest.approx(5e-6 * 2)
    lost = judge(["value", "means"], [near[0], near[1] * torch.nan], exact, near, 4)
    assert not lost.right
    assert lost.worst[0].startswith("means")
    with pytest.raises(ValueError, match=r"means: expected shape \(2,\), got \(1,\)"):
        judge(["value", "means"], [near[0], near[1][:1]], exact, near, 4)
