"""The Triton kernels under the interpreter against float64 arithmetic of the textbook formula, gradients included.

Uninitialised memory is poisoned in the interpreting process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import piflow_kernels as pk
from piflow_kernels.launch import kernel_form
from tests.kernels.interpreter import Interpreter
from tests.kernels.problems import (
    DX_LEAVES,
    EPS32,
    GM_LEAVES,
    dx_problem,
    extreme_problem,
    gm_problem,
    values_and_gradients,
)

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as interpreter:
        yield interpreter


def in_single(problem: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """States in float32, network outputs in `dtype`."""
    network = ("means", "logweights", "grid")
    return {
        name: value.to(dtype if name in network else torch.float32) if isinstance(value, torch.Tensor) else value
        for name, value in problem.items()
    }


def in_double(problem: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in problem.items()}


def assert_as_good_as_the_textbook(
    interpreter: Interpreter, operator: str, problem: dict[str, Any], leaves: list[str], n_steps: int, **kwargs: Any
) -> None:
    """Within max(2 x the float32 textbook's error, rounding), in maximum and RMS, value and every gradient."""
    run = getattr(pk, operator)
    actual = interpreter(operator, problem, leaves, **kwargs)
    exact = values_and_gradients(run, in_double(problem), leaves, backend="reference", **kwargs)
    textbook = values_and_gradients(run, problem, leaves, backend="reference", **kwargs)
    for i, (a, e, t) in enumerate(zip(actual, exact, textbook, strict=True)):
        assert a.dtype == t.dtype
        assert a.shape == e.shape
        rounding = (EPS32 if i == 0 else max(torch.finfo(a.dtype).eps, 5e-6)) * max(n_steps, 1) ** 0.5
        for norm in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()):
            assert norm(a.double() - e) <= max(2 * norm(t.double() - e), rounding * norm(e))


GM_CASES = [
    (8, 16, (5, 3), 6, torch.bfloat16),
    (32, 4, (4, 4), 3, torch.float16),
    (3, 5, (7,), 2, torch.float32),
    (1, 1, (1,), 1, torch.float32),
    (1, 4, (3,), 4, torch.bfloat16),
    (16, 16, (3, 3), 4, torch.bfloat16),
    (64, 3, (2, 3, 4), 1, torch.float32),
    (5, 40, (4, 3), 2, torch.float32),
]


def test_the_cases_cover_every_form() -> None:
    assert {kernel_form(k, c, n) for k, c, _, n, _ in GM_CASES} == {"gram", "channel", "streamed"}


@pytest.mark.parametrize(("k", "c", "spatial", "n_steps", "dtype"), GM_CASES)
def test_gm_rollout(
    interpreter: Interpreter, k: int, c: int, spatial: tuple[int, ...], n_steps: int, dtype: torch.dtype
) -> None:
    problem = in_single(gm_problem(k=k, c=c, spatial=spatial, n_steps=n_steps), dtype)
    assert_as_good_as_the_textbook(interpreter, "gm_rollout", problem, GM_LEAVES, n_steps)


@pytest.mark.parametrize("operator", ["gm_mean_velocity", "gm_mean_velocity_loss"])
def test_gm_mean_velocity(interpreter: Interpreter, operator: str) -> None:
    """With temperature, dropped components and a sample that asks for the local velocity."""
    problem = in_single(gm_problem(k=4, c=5, spatial=(5, 3)))
    keep = torch.tensor([[True, False, True, True], [False] * 4])
    kwargs: dict[str, Any] = {"local": torch.tensor([True, False]), "temperature": 0.5, "keep": keep}
    if operator.endswith("loss"):
        kwargs["target"] = torch.ones(2, 5, 5, 3)
    assert_as_good_as_the_textbook(interpreter, operator, problem, GM_LEAVES, 6, **kwargs)


@pytest.mark.parametrize("sigma", [0.3, 0.99])
def test_gm_velocity(interpreter: Interpreter, sigma: float) -> None:
    """Also above sigma_src, where the posterior's denominator is clamped."""
    problem = gm_problem(batch=1, k=5, c=4)
    problem["x_t"] = problem.pop("x_start")
    del problem["sigmas"]
    problem |= {"sigma_t": torch.tensor([sigma]), "sigma_src": torch.tensor([0.5])}
    leaves = ["x_t", *GM_LEAVES[1:]]
    assert_as_good_as_the_textbook(interpreter, "gm_velocity", in_single(problem), leaves, 1)


@pytest.mark.parametrize("logstd", [-8.0, 2.0])
def test_extreme_standard_deviations(interpreter: Interpreter, logstd: float) -> None:
    single, bound, expected = extreme_problem(logstd)
    assert (interpreter("gm_rollout", single, ["x_start"])[0] - expected).abs().max() <= bound


@pytest.mark.parametrize("mode", ["grid", "polynomial"])
@pytest.mark.parametrize("spatial", [(5,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dx_rollout(interpreter: Interpreter, mode: str, spatial: tuple[int, ...], dtype: torch.dtype) -> None:
    problem = in_single(dx_problem(spatial=spatial), dtype)
    assert_as_good_as_the_textbook(interpreter, "dx_rollout", problem, DX_LEAVES, 6, mode=mode)


def test_packed_tokens_are_read_through_strides(interpreter: Interpreter) -> None:
    b, t, k, c, p = 2, 12, 4, 4, 4
    problem = in_single(gm_problem(b, k, c, spatial=(t, p)))
    packed = {
        **problem,
        "means": problem["means"].permute(0, 3, 1, 2, 4).flatten(3),
        "logweights": problem["logweights"][:, :, 0].permute(0, 2, 1, 3).contiguous(),
        **{name: problem[name].permute(0, 2, 1, 3).flatten(2) for name in ("x_start", "x_src")},
    }
    assert_as_good_as_the_textbook(interpreter, "gm_rollout", packed, GM_LEAVES, 6, layout="packed")

    grid = in_single(dx_problem(spatial=(3, 2, 4)))
    tokens = {**grid, "grid": grid["grid"].movedim((1, 2), (-2, -1)).contiguous()}
    tokens |= {name: grid[name].movedim(1, -1).contiguous() for name in ("x_start", "x_src")}
    assert_as_good_as_the_textbook(interpreter, "dx_rollout", tokens, DX_LEAVES, 6, layout="packed")


def test_zero_size_inputs(interpreter: Interpreter) -> None:
    for empty in ({"batch": 0}, {"spatial": (0, 4)}):
        for operator, problem, leaves in (
            ("gm_rollout", gm_problem(**empty), GM_LEAVES),
            ("dx_rollout", dx_problem(**empty), DX_LEAVES),
        ):
            value, *gradients = interpreter(operator, in_single(problem), leaves)
            assert value.shape == problem["x_src"].shape
            assert [gradient.shape for gradient in gradients] == [problem[name].shape for name in leaves]


def test_results_repeat_to_the_bit(interpreter: Interpreter) -> None:
    problem = in_single(gm_problem(k=8, c=16, spatial=(70, 61), n_steps=2))
    first, second = (interpreter("gm_rollout", problem, GM_LEAVES) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
