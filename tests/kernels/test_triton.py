"""The Triton kernels under the interpreter against float64 arithmetic of the textbook formula, gradients included.

Uninitialised memory is poisoned in the interpreting process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import piflow_kernels as pk
from piflow_kernels.configs import LARGEST_WINDOW, gm_form
from piflow_kernels.gm import launch as gm_launch
from tests.kernels.interpreter import Interpreter
from tests.kernels.problems import (
    DX_LEAVES,
    EPS32,
    GM_LEAVES,
    dx_problem,
    extreme_problem,
    gm_problem,
    in_double,
    in_single,
    values_and_gradients,
)

pytest.importorskip("triton")

pytestmark = pytest.mark.slow  # test_numerics runs every operator in fewer shapes


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as interpreter:
        yield interpreter


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


# K, C, spatial axes, substeps, dtype of the network output
GM_CASES = [
    (8, 16, (5, 3), 6, torch.bfloat16),
    (8, 16, (5, 3), 1, torch.float32),
    (8, 64, (3,), 2, torch.float16),
    (32, 4, (4, 4), 3, torch.float16),
    (3, 5, (7,), 2, torch.float32),
    (1, 1, (1,), 1, torch.float32),
    (1, 4, (3,), 4, torch.bfloat16),
    (16, 16, (13, 11), 4, torch.bfloat16),
    (9, 5, (11,), 5, torch.float32),
    (64, 3, (2, 3, 4), 1, torch.float32),
    (5, 40, (4, 3), 2, torch.float32),
    (12, 33, (3, 2), 6, torch.float32),
    (64, 128, (5, 5), 2, torch.bfloat16),
]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_cases_cover_every_form(direction: Any) -> None:
    """Backward also short windows, whose states stay in registers, and longer ones."""
    cases = {(gm_form(k, c, n, direction), min(n, LARGEST_WINDOW + 1)) for k, c, _, n, _ in GM_CASES}
    if direction == "forward":
        assert {form for form, _ in cases} == {"gram", "channel", "streamed"}
    else:
        assert {("gram", 1), ("gram", 2), ("gram", 5)} <= cases
        assert {("streamed", n) for n in range(1, LARGEST_WINDOW + 2)} <= cases


@pytest.mark.parametrize(("k", "c", "spatial", "n_steps", "dtype"), GM_CASES)
def test_gm_rollout(
    interpreter: Interpreter, k: int, c: int, spatial: tuple[int, ...], n_steps: int, dtype: torch.dtype
) -> None:
    problem = in_single(gm_problem(k=k, c=c, spatial=spatial, n_steps=n_steps), dtype)
    assert_as_good_as_the_textbook(interpreter, "gm_rollout", problem, GM_LEAVES, n_steps)


@pytest.mark.parametrize(("k", "c", "spatial", "n_steps", "dtype"), GM_CASES)
def test_gm_mean_velocity_loss(
    interpreter: Interpreter, k: int, c: int, spatial: tuple[int, ...], n_steps: int, dtype: torch.dtype
) -> None:
    """With temperature, dropped components (of one sample all) and a sample that asks for the local velocity."""
    problem = in_single(gm_problem(k=k, c=c, spatial=spatial, n_steps=n_steps), dtype)
    problem["target"] = 0.5 * problem["x_start"].flip(0)
    keep = torch.stack([torch.arange(k) % 3 != 1, torch.zeros(k, dtype=torch.bool)])
    kwargs: dict[str, Any] = {"local": torch.tensor([False, True]), "temperature": 0.5, "keep": keep}
    leaves = [*GM_LEAVES, "target"]
    assert_as_good_as_the_textbook(interpreter, "gm_mean_velocity_loss", problem, leaves, n_steps, **kwargs)


def test_gm_mean_velocity(interpreter: Interpreter) -> None:
    problem = in_single(gm_problem(k=4, c=5, spatial=(5, 3)))
    kwargs: dict[str, Any] = {"local": torch.tensor([True, False]), "temperature": 0.5}
    assert_as_good_as_the_textbook(interpreter, "gm_mean_velocity", problem, GM_LEAVES, 6, **kwargs)


def test_more_substeps_than_one_scan_of_coefficients_takes(interpreter: Interpreter) -> None:
    """Of the policies; and samples of one batch with different numbers of substeps."""
    n_steps = 2 * gm_launch.COEFFICIENT_CHUNK + 5
    problem = in_single(gm_problem(k=2, c=2, spatial=(2,), n_steps=n_steps))
    problem["sigmas"][1, n_steps // 3 :] = problem["sigmas"][1, n_steps // 3]
    assert_as_good_as_the_textbook(interpreter, "gm_rollout", problem, GM_LEAVES, n_steps)
    grid = in_single(dx_problem(c=2, spatial=(2,), n_steps=n_steps))
    for mode in ("grid", "polynomial"):
        assert_as_good_as_the_textbook(interpreter, "dx_rollout", grid, DX_LEAVES, n_steps, mode=mode)


def test_a_single_level_is_a_rollout_of_no_substeps(interpreter: Interpreter) -> None:
    for operator, problem, leaves in (
        ("gm_rollout", in_single(gm_problem()), GM_LEAVES),
        ("dx_rollout", in_single(dx_problem()), DX_LEAVES),
    ):
        problem["sigmas"] = problem["sigmas"][:, :1]
        value, start_bar, *_ = interpreter(operator, problem, leaves)
        torch.testing.assert_close(value, problem["x_start"], rtol=0, atol=1e-6)
        assert start_bar.isfinite().all()


def test_memory_of_the_backward_pass() -> None:
    """Windows of up to four substeps take at most a quarter of the inputs besides the gradients, in bfloat16."""
    shapes = [(k, c) for k in (1, 2, 3, 8, 9, 16, 32, 64) for c in (1, 4, 16, 17, 64, 128)]
    for k, c in shapes:
        inputs = 2 * k * c + 2 * k + 2 * 4 * c
        for n_steps in range(1, 5):
            kept = 4 * gm_launch.history_values(gm_form(k, c, n_steps, "backward"), k, c, n_steps)
            assert kept <= inputs / 4, (k, c, n_steps)
    assert gm_launch.history_values("gram", 8, 16, 128) == 8 * 126


def narrow(problem: dict[str, Any]) -> dict[str, Any]:
    """Components close to each other, as networks predict them; the textbook's own gradients stay accurate there."""
    return {**problem, "means": 0.3 * problem["means"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sigma", [0.0, 1e-4, 0.3, 0.99, 1.0])
def test_gm_velocity(interpreter: Interpreter, sigma: float, dtype: torch.dtype) -> None:
    """Down to sigma 0, and above sigma_src, where the posterior's denominator is clamped."""
    problem = narrow(gm_problem(batch=1, k=5, c=4))
    problem["x_t"] = problem.pop("x_start")
    del problem["sigmas"]
    problem |= {"sigma_t": torch.tensor([sigma]), "sigma_src": torch.tensor([0.5])}
    leaves = ["x_t", *GM_LEAVES[1:]]
    assert_as_good_as_the_textbook(interpreter, "gm_velocity", in_single(problem, dtype), leaves, 1)


@pytest.mark.parametrize("logstd", [-8.0, 2.0])
def test_extreme_standard_deviations(interpreter: Interpreter, logstd: float) -> None:
    single, bound, expected = extreme_problem(logstd)
    assert (interpreter("gm_rollout", single, ["x_start"])[0] - expected).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "c"), [(8, 16), (12, 5), (9, 33)])
@pytest.mark.parametrize("logstd", [-8.0, 2.0])
def test_gradients_at_extreme_standard_deviations(
    interpreter: Interpreter, logstd: float, k: int, c: int, dtype: torch.dtype
) -> None:
    problem = in_single(narrow(gm_problem(k=k, c=c, spatial=(4, 3), n_steps=3, logstd=logstd)), dtype)
    assert_as_good_as_the_textbook(interpreter, "gm_mean_velocity", problem, GM_LEAVES, 3)


@pytest.mark.parametrize(("k", "c", "spatial"), [(1, 1, (1,)), (8, 16, (1,)), (12, 5, (3,)), (9, 33, (2,))])
def test_a_window_that_stands_still(interpreter: Interpreter, k: int, c: int, spatial: tuple[int, ...]) -> None:
    """Equal levels: the state stays, and its mean velocity is the velocity there."""
    problem = in_single(narrow(gm_problem(k=k, c=c, spatial=spatial, n_steps=3)))
    problem["sigmas"] = problem["sigmas"][:, :1].expand(-1, 4)
    assert_as_good_as_the_textbook(interpreter, "gm_rollout", problem, GM_LEAVES, 3)
    assert_as_good_as_the_textbook(interpreter, "gm_mean_velocity", problem, GM_LEAVES, 3)


def test_strided_and_expanded_inputs(interpreter: Interpreter) -> None:
    """Every second value of a wider tensor; one state, one mean and one set of logweights for all pixels."""
    problem = in_single(narrow(gm_problem(k=4, c=5, spatial=(4, 6))))
    grid = in_single(dx_problem(n_grid=4, c=5, spatial=(4, 6)))
    for leaf in ("x_start", "x_src", "means", "logweights"):
        for changed in (
            problem[leaf].repeat_interleave(2, dim=-1)[..., ::2],
            problem[leaf][..., :1, :1].expand_as(problem[leaf]),
        ):
            assert not changed.is_contiguous()
            given = {**problem, leaf: changed}
            assert_as_good_as_the_textbook(interpreter, "gm_rollout", given, GM_LEAVES, 6)
            if leaf.startswith("x"):
                assert_as_good_as_the_textbook(interpreter, "dx_rollout", {**grid, leaf: changed}, DX_LEAVES, 6)


@pytest.mark.parametrize("n_grid", [1, 4])
def test_dx_velocities_of_one_pixel_in_float16(interpreter: Interpreter, n_grid: int) -> None:
    problem = in_single(dx_problem(n_grid=n_grid, c=3, spatial=(1,)), torch.float16)
    local = torch.tensor([True, False])
    assert_as_good_as_the_textbook(interpreter, "dx_mean_velocity", problem, DX_LEAVES, 6, local=local)
    problem["x_t"], problem["sigma_t"] = problem.pop("x_start"), problem.pop("sigmas")[:, 2]
    assert_as_good_as_the_textbook(interpreter, "dx_velocity", problem, ["x_t", "x_src", "grid"], 1)


@pytest.mark.parametrize("mode", ["grid", "polynomial"])
@pytest.mark.parametrize("spatial", [(5,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
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
    packed = in_single({**packed, "target": 0.5 * packed["x_src"].flip(0)}, torch.bfloat16)
    leaves = [*GM_LEAVES, "target"]
    assert_as_good_as_the_textbook(interpreter, "gm_mean_velocity_loss", packed, leaves, 6, layout="packed")

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


LARGE = """
import torch
import piflow_kernels as pk

far, pixels = 2**31 + 8, 5  # the second component lies there; the memory between is never touched
store = torch.empty(far + pixels, dtype=torch.bfloat16)
network = store.as_strided((1, 2, 1, 1, pixels), (store.numel(), far, pixels, pixels, 1))
network.copy_(torch.randn(network.shape))
x, weights = torch.randn(1, 1, 1, pixels), torch.randn(1, 2, 1, 1, pixels)
levels = torch.tensor([0.9, 0.5, 0.2])
for backend in ("torch", "triton"):
    for run in (
        lambda v, b: pk.gm_rollout(x, levels, x, 1.0, v, -1.0, weights, backend=b),
        lambda v, b: pk.dx_rollout(x, levels, x, 1.0, v, 0.5, 3.0, backend=b),
    ):
        torch.testing.assert_close(run(network, backend), run(network.contiguous(), "reference"))
"""


def test_offsets_beyond_32_bits() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(pk.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", LARGE], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_layouts_that_no_three_axes_describe(interpreter: Interpreter) -> None:
    """Axes in an order that cannot be merged are copied, and results take the layout of x_start all the same."""
    axes = (0, 3, 1, 4, 2)
    problem = in_single(gm_problem(k=2, c=3, spatial=(2, 4, 5)))
    for name in ("x_start", "x_src"):
        problem[name] = problem[name].permute(axes).contiguous().permute(*(axes.index(i) for i in range(5)))
    assert_as_good_as_the_textbook(interpreter, "gm_rollout", problem, GM_LEAVES, 6)
    grid = in_single(dx_problem(spatial=(2, 4, 5)))
    for name in ("x_start", "x_src"):
        grid[name] = problem[name].clone(memory_format=torch.preserve_format)
    for operator in ("dx_rollout", "dx_mean_velocity_loss"):
        extra = {"target": grid["x_src"] + 1} if operator.endswith("loss") else {}
        assert_as_good_as_the_textbook(interpreter, operator, {**grid, **extra}, [*DX_LEAVES, *extra], 6)
