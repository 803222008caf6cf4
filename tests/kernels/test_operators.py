"""The fast path against the textbook reference: values, gradients, shapes, extremes, errors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import piflow_kernels as pk
from piflow_kernels.gm import torch_path
from piflow_kernels.gm.torch_path import gram_space_is_cheaper
from tests.kernels.problems import (
    DX_LEAVES,
    EPS32,
    GM_LEAVES,
    assert_matches,
    dx_problem,
    extreme_problem,
    gm_problem,
    values_and_gradients,
)


def as_velocity(problem: dict[str, Any]) -> dict[str, Any]:
    problem = dict(problem)
    problem["x_t"], problem["sigma_t"] = problem.pop("x_start"), problem.pop("sigmas")[:, 2]
    return problem


SHAPES = [
    (1, 1, (1,)),
    (1, 4, (7,)),
    (3, 4, (3, 5)),
    (8, 16, (5, 3)),
    (32, 4, (4, 4)),
    (5, 3, (2, 3, 4)),
    (2, 9, (17, 1)),
]


def operator_cases() -> list[Any]:
    local = torch.tensor([True, False])
    return [
        pytest.param("rollout", {}, id="rollout"),
        pytest.param("rollout", {"temperature": 0.3}, id="rollout-temperature"),
        pytest.param("mean_velocity", {}, id="mean"),
        pytest.param("mean_velocity", {"local": local}, id="mean-local"),
        pytest.param("mean_velocity_loss", {"local": local}, id="loss-local"),
        pytest.param("velocity", {}, id="velocity"),
    ]


def prepare(problem: dict[str, Any], leaves: list[str], name: str) -> tuple[dict[str, Any], list[str]]:
    if name == "velocity":
        return as_velocity(problem), ["x_t", *leaves[1:]]
    if name == "mean_velocity_loss":
        target = torch.randn(problem["x_src"].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        return {**problem, "target": target.to(problem["x_src"])}, [*leaves, "target"]
    return problem, leaves


@pytest.mark.parametrize(("name", "kwargs"), operator_cases())
@pytest.mark.parametrize(("k", "c", "spatial"), SHAPES)
@pytest.mark.parametrize("n_steps", [1, 2, 9])
def test_gm_fast_path_in_float64(
    name: str, kwargs: dict[str, Any], k: int, c: int, spatial: tuple[int, ...], n_steps: int
) -> None:
    if name == "velocity" and n_steps < 3:
        n_steps = 3
    problem, leaves = prepare(gm_problem(k=k, c=c, spatial=spatial, n_steps=n_steps), GM_LEAVES, name)
    operator = getattr(pk, f"gm_{name}")
    expected = values_and_gradients(operator, problem, leaves, backend="reference", **kwargs)
    assert_matches(values_and_gradients(operator, problem, leaves, backend="torch", **kwargs), expected, 1e-10)


@pytest.mark.parametrize(("name", "kwargs"), [case for case in operator_cases() if "temperature" not in case.id])
@pytest.mark.parametrize("mode", ["grid", "polynomial"])
@pytest.mark.parametrize("n_grid", [1, 2, 10])
def test_dx_fast_path_in_float64(name: str, kwargs: dict[str, Any], mode: str, n_grid: int) -> None:
    problem, leaves = prepare(dx_problem(n_grid=n_grid), DX_LEAVES, name)
    operator = getattr(pk, f"dx_{name}")
    expected = values_and_gradients(operator, problem, leaves, backend="reference", mode=mode, **kwargs)
    assert_matches(
        values_and_gradients(operator, problem, leaves, backend="torch", mode=mode, **kwargs), expected, 1e-10
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "c", "spatial"), SHAPES)
def test_gm_fast_path_in_float32(k: int, c: int, spatial: tuple[int, ...], dtype: torch.dtype) -> None:
    """Network outputs as a network gives them, against float64 arithmetic on the same values.

    Where the rollout itself magnifies rounding, the textbook's own float32 error is the measure.
    """
    n_steps = 12
    problem = gm_problem(k=k, c=c, spatial=spatial, n_steps=n_steps)
    for name in ("means", "logweights"):
        problem[name] = problem[name].to(dtype)
    single = {**problem, "x_start": problem["x_start"].float(), "x_src": problem["x_src"].float()}
    exact = {**problem, "x_start": single["x_start"].double(), "x_src": single["x_src"].double()}
    exact = {name: value.double() for name, value in exact.items()}
    actual = values_and_gradients(pk.gm_rollout, single, GM_LEAVES)
    expected = values_and_gradients(pk.gm_rollout, exact, GM_LEAVES, backend="reference")
    assert actual[0].dtype == torch.float32
    assert [grad.dtype for grad in actual[3:]] == [dtype, torch.float64, dtype]
    textbook = values_and_gradients(pk.gm_rollout, single, GM_LEAVES, backend="reference")
    for i, (a, e, t) in enumerate(zip(actual, expected, textbook, strict=True)):
        rounding = EPS32 * n_steps**0.5 if i == 0 else max(torch.finfo(a.dtype).eps, 5e-6 * n_steps**0.5)
        scale = e.abs().max()
        for norm in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()):
            assert norm(a.double() - e) <= max(2 * norm(t.double() - e), rounding * scale)


@pytest.mark.parametrize("logstd", [-8.0, 2.0])
def test_gm_extreme_standard_deviations(logstd: float) -> None:
    """Whole rollouts from sigma 1 to 0, with a step that does nothing: finite, and as close as float32 allows."""
    single, bound, expected = extreme_problem(logstd)
    assert (pk.gm_rollout(**single, backend="torch") - expected).abs().max() <= bound


@pytest.mark.parametrize("sigma", [0.0, 1e-4, 0.99])
def test_gm_velocity_anywhere(sigma: float) -> None:
    """Finite at sigma 0 and right above sigma_src, where the posterior's denominator is clamped."""
    problem = as_velocity(gm_problem(batch=1, k=5, c=4))
    problem |= {"sigma_t": torch.tensor([sigma]).double(), "sigma_src": torch.tensor([0.5]).double()}
    leaves = ["x_t", *GM_LEAVES[1:]]
    actual = values_and_gradients(pk.gm_velocity, problem, leaves)
    assert all(value.isfinite().all() for value in actual)
    expected = values_and_gradients(pk.gm_velocity, problem, leaves, backend="reference")
    if (
        sigma == 0.0
    ):  # the textbook's own gradient of logstds is cancellation noise there: 5e-10 beside a true value of 3e-5
        assert (actual.pop(4) - expected.pop(4)).abs().max() < 1e-9
    assert_matches(actual, expected, 1e-8)


def test_gradcheck() -> None:
    """Against finite differences, so that reference and fast path cannot be wrong together."""
    gm = gm_problem(k=3, c=2, spatial=(2,), n_steps=3)
    local = torch.tensor([True, False])
    target = torch.randn_like(gm["x_src"])

    def gm_operators(
        x_start: Tensor, x_src: Tensor, means: Tensor, logstds: Tensor, logweights: Tensor
    ) -> tuple[Tensor, ...]:
        args = (gm["sigmas"], x_src, gm["sigma_src"], means, logstds, logweights)
        return (
            pk.gm_rollout(x_start, *args, temperature=0.5, keep=torch.tensor([[True, False, True], [True] * 3])),
            pk.gm_mean_velocity(x_start, *args, local=local),
            pk.gm_mean_velocity_loss(x_start, *args, target, local=local),
            pk.gm_velocity(x_start, gm["sigmas"][:, 1], *args[1:]),
        )

    assert torch.autograd.gradcheck(gm_operators, [gm[name].clone().requires_grad_() for name in GM_LEAVES])
    dx = dx_problem(n_grid=3, c=2, spatial=(2,), n_steps=3)

    def dx_operators(x_start: Tensor, x_src: Tensor, grid: Tensor) -> tuple[Tensor, ...]:
        args = (x_src, dx["sigma_src"], grid, dx["segment_size"], dx["shift"])
        return (
            pk.dx_rollout(x_start, dx["sigmas"], *args),
            pk.dx_mean_velocity(x_start, dx["sigmas"], *args, local=local),
            pk.dx_mean_velocity_loss(x_start, dx["sigmas"], *args, target[:, :2], mode="polynomial"),
            pk.dx_velocity(x_start, dx["sigmas"][:, 1], *args),
        )

    assert torch.autograd.gradcheck(dx_operators, [dx[name].clone().requires_grad_() for name in DX_LEAVES])


def test_blocks_cover_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """More pixels than one block holds, along any axis and over samples, in both spaces."""
    monkeypatch.setattr(torch_path, "BLOCK_ELEMENTS", 1 << 10)
    for k, c, spatial in ((8, 16, (7, 6)), (16, 2, (3, 19)), (2, 3, (20, 3, 5)), (2, 3, (2, 3, 50)), (4, 4, (3,))):
        problem = gm_problem(batch=3, k=k, c=c, spatial=spatial, n_steps=4)
        assert len(list(torch_path.regions(3, spatial, k * max(k, c)))) > (1 if len(spatial) > 1 else 0)
        expected = values_and_gradients(pk.gm_rollout, problem, GM_LEAVES, backend="reference")
        assert_matches(values_and_gradients(pk.gm_rollout, problem, GM_LEAVES), expected, 1e-9)
    assert gram_space_is_cheaper(8, 16, 37)
    assert not gram_space_is_cheaper(8, 16, 1)
    assert not gram_space_is_cheaper(32, 4, 128)


@pytest.mark.parametrize("operator", ["gm_rollout", "gm_mean_velocity"])
def test_packed_layout_equals_spatial(operator: str) -> None:
    """Token layout (B, T, K, C p) with channel index c p + sub-pixel."""
    b, t, k, c, p = 2, 6, 3, 4, 4
    problem = gm_problem(b, k, c, spatial=(t, p))
    packed = {
        **problem,
        "means": problem["means"].permute(0, 3, 1, 2, 4).flatten(3),
        "logweights": problem["logweights"][:, :, 0].permute(0, 2, 1, 3),
        **{name: problem[name].permute(0, 2, 1, 3).flatten(2) for name in ("x_start", "x_src")},
    }
    expected = values_and_gradients(getattr(pk, operator), problem, ["x_start", "means", "logweights"])
    actual = values_and_gradients(getattr(pk, operator), packed, ["x_start", "means", "logweights"], layout="packed")
    torch.testing.assert_close(actual[0].unflatten(-1, (c, p)).permute(0, 2, 1, 3), expected[0])
    for backend in ("reference", "torch"):
        result = getattr(pk, operator)(**packed, layout="packed", backend=backend)
        torch.testing.assert_close(result, actual[0])
        assert result.is_contiguous()


def test_packed_dx_equals_spatial() -> None:
    problem = dx_problem(spatial=(3, 2, 4))
    expected = pk.dx_rollout(**problem)
    packed = {**problem, "grid": problem["grid"].movedim((1, 2), (-2, -1))}
    packed |= {name: problem[name].movedim(1, -1) for name in ("x_start", "x_src")}
    for backend in ("reference", "torch"):
        torch.testing.assert_close(pk.dx_rollout(**packed, layout="packed", backend=backend).movedim(-1, 1), expected)


def test_strided_and_expanded_inputs() -> None:
    problem = gm_problem(k=4, c=3, spatial=(6, 5))
    expected = pk.gm_rollout(**problem)
    channels_last = {**problem}
    for name in ("x_start", "x_src"):
        channels_last[name] = problem[name].to(memory_format=torch.channels_last)
    channels_last["means"] = problem["means"].movedim(1, -1).contiguous().movedim(-1, 1)
    torch.testing.assert_close(pk.gm_rollout(**channels_last), expected)
    one = {name: value[:1] for name, value in problem.items()}
    shared = {name: value.expand(3, *value.shape[1:]) for name, value in one.items()}
    torch.testing.assert_close(pk.gm_rollout(**shared), pk.gm_rollout(**one).expand(3, -1, -1, -1))


def test_scalar_forms() -> None:
    """Noise levels and standard deviations as floats, 0-d, (1,), (B,), (B, 1, 1, 1); levels as (N + 1,), (1, N + 1)."""
    problem = gm_problem(batch=2)
    problem |= {"sigma_src": torch.tensor([0.9, 0.9]), "logstds": torch.tensor([-1.0, -1.0])}
    problem["sigmas"] = problem["sigmas"][1:].expand(2, -1)
    expected = pk.gm_rollout(**problem)
    forms = [
        {"sigma_src": torch.tensor(0.9), "logstds": -1.0},
        {"sigma_src": torch.tensor([0.9]), "logstds": torch.full((2, 1, 1, 1), -1.0)},
        {"sigmas": problem["sigmas"][0]},
        {"sigmas": problem["sigmas"][:1], "logstds": torch.full((2, 1, 1, 1, 1), -1.0)},
    ]
    for form in forms:
        torch.testing.assert_close(pk.gm_rollout(**{**problem, **form}), expected)


def test_zero_size_inputs() -> None:
    for empty in ({"batch": 0}, {"spatial": (0, 4)}):
        problem = gm_problem(**empty)
        assert pk.gm_rollout(**problem).shape == problem["x_src"].shape
        leaf = problem["means"].requires_grad_()
        pk.gm_rollout(**{**problem, "means": leaf}).sum().backward()
        assert leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("name", ["gm_mean_velocity_loss", "dx_mean_velocity_loss"])
def test_a_loss_over_no_pixels_is_a_mean_of_nothing(name: str) -> None:
    make = gm_problem if name.startswith("gm") else dx_problem
    problem: dict[str, Any] = make(spatial=(0, 4))
    loss, textbook = (getattr(pk, name)(**problem, target=problem["x_src"], backend=b) for b in ("torch", "reference"))
    torch.testing.assert_close(loss, textbook, equal_nan=True)
    assert loss.isnan().all()


@pytest.mark.parametrize("name", ["gm_rollout", "dx_rollout"])
def test_vmap_over_nothing(name: str) -> None:
    problem, leaf = (gm_problem(), "means") if name.startswith("gm") else (dx_problem(), "grid")
    none = problem[leaf].new_empty(0, *problem[leaf].shape)
    result = torch.func.vmap(lambda value: getattr(pk, name)(**{**problem, leaf: value}))(none)
    assert result.shape == (0, *problem["x_src"].shape)


def test_inputs_stay_as_they_are_and_results_repeat() -> None:
    problem = gm_problem(k=8, c=16, spatial=(30, 31), n_steps=20, dtype=torch.float32)
    before = {name: value.clone() for name, value in problem.items()}
    first = values_and_gradients(pk.gm_rollout, problem, GM_LEAVES)
    second = values_and_gradients(pk.gm_rollout, problem, GM_LEAVES)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(problem[name], before[name]) for name in problem)


def test_a_step_that_does_nothing_changes_nothing() -> None:
    problem = gm_problem(k=4, c=8)
    padded = {**problem, "sigmas": torch.cat([problem["sigmas"], problem["sigmas"][:, -1:].expand(-1, 3)], dim=1)}
    torch.testing.assert_close(pk.gm_rollout(**padded), pk.gm_rollout(**problem), rtol=1e-12, atol=1e-12)
    still = {**problem, "sigmas": problem["sigmas"][:, :1].expand(-1, 4)}
    torch.testing.assert_close(pk.gm_rollout(**still), problem["x_start"], rtol=1e-12, atol=1e-12)


def test_all_components_dropped_keeps_all() -> None:
    problem = gm_problem()
    none = torch.zeros(2, 3, dtype=torch.bool)
    torch.testing.assert_close(pk.gm_rollout(**problem, keep=none), pk.gm_rollout(**problem))


@pytest.mark.parametrize("name", ["gm_rollout", "dx_rollout", "gm_mean_velocity_loss"])
def test_torch_compile_fullgraph(name: str) -> None:
    problem = gm_problem(dtype=torch.float32) if name.startswith("gm") else dx_problem(dtype=torch.float32)
    leaf = "means" if name.startswith("gm") else "grid"
    if name.endswith("loss"):
        problem["target"] = problem["x_src"] + 1

    def run(x: Tensor, levels: Tensor) -> Tensor:
        return getattr(pk, name)(**{**problem, leaf: x, "sigmas": levels}) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = problem[leaf].requires_grad_()
    for levels in (problem["sigmas"], problem["sigmas"] * 0.9):
        expected, actual = run(x, levels), compiled(x, levels)
        torch.testing.assert_close(actual, expected)
        (expected_grad,) = torch.autograd.grad(expected.sum(), x)
        torch.testing.assert_close(torch.autograd.grad(actual.sum(), x)[0], expected_grad)


def test_opcheck() -> None:
    from piflow_kernels.dx import autograd as dx
    from piflow_kernels.gm import autograd as gm

    p = gm_problem(k=8, c=16, spatial=(4, 3), dtype=torch.float32)
    keep = torch.arange(16).reshape(2, 8) % 3 != 1
    network = (p["x_src"], p["sigma_src"], p["means"], p["logstds"], p["logweights"])
    for local, mask, target, min_delta in (
        (None, None, None, None),
        (torch.tensor([True, False]), keep, None, 1e-4),
        (torch.tensor([True, False]), keep, p["x_src"] + 1, 1e-4),
    ):
        args = (p["x_start"], p["sigmas"], local, *network, mask, target, 0.5, 1e-6, min_delta, "torch")
        torch.library.opcheck(gm.gm_integrate, (*args, False))
        grad = p["x_src"] if target is None else torch.ones(2)
        torch.library.opcheck(gm.gm_integrate_backward, (grad, *args))
    d = dx_problem(dtype=torch.float32)
    network = (d["x_src"], d["sigma_src"], d["grid"], d["segment_size"], torch.full((2,), 3.2))
    for target, min_delta in ((None, None), (None, 1e-4), (d["x_src"] + 1, 1e-4)):
        args = (d["x_start"], d["sigmas"], None, *network, target, "grid", 1e-4, min_delta, "torch")
        torch.library.opcheck(dx.dx_integrate, (*args, False))
        torch.library.opcheck(dx.dx_integrate_backward, (d["x_src"] if target is None else torch.ones(2), *args))


@pytest.mark.parametrize("name", ["gm_rollout", "dx_mean_velocity_loss"])
def test_inductor_compiles_once_for_all_noise_levels_and_sizes(name: str) -> None:
    """torch.compile with its default backend: value and gradient, dynamic shapes, no recompilation by noise level."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    make, leaf = (gm_problem, "means") if name.startswith("gm") else (dx_problem, "grid")

    def run(problem: dict[str, Any], x: Tensor) -> Tensor:
        return getattr(pk, name)(**{**problem, leaf: x}).sin()

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    compiled_once = None
    for batch, size, levels in ((2, 5, 1.0), (2, 5, 0.9), (3, 5, 0.7), (5, 8, 0.8)):
        problem = make(batch=batch, spatial=(size, 3), dtype=torch.float32)
        problem["sigmas"] = problem["sigmas"] * levels
        if name.endswith("loss"):
            problem["target"] = problem["x_src"] + 1
        x = problem[leaf].clone().requires_grad_()
        expected, actual = run(problem, x), compiled(problem, x)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(*(torch.autograd.grad(value.sum(), x)[0] for value in (actual, expected)))
        compiled_once = compiled_once or counter.frame_count
        assert counter.frame_count == compiled_once


@pytest.mark.parametrize("name", ["gm_rollout", "dx_rollout"])
def test_one_tensor_as_both_states_compiles(name: str) -> None:
    make, leaf = (gm_problem, "means") if name.startswith("gm") else (dx_problem, "grid")
    problem = make(dtype=torch.float32)

    def run(x: Tensor, network: Tensor) -> Tensor:
        return getattr(pk, name)(**{**problem, "x_start": x, "x_src": x, leaf: network})

    leaves = [problem["x_src"].clone().requires_grad_(), problem[leaf].clone().requires_grad_()]
    actual, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves), run(*leaves)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(*(torch.autograd.grad(value.sum(), leaves) for value in (actual, expected))):
        torch.testing.assert_close(a, b)


def test_compiled_functional_gradients_are_never_silently_zero() -> None:
    problem = gm_problem(dtype=torch.float32)
    gradient = torch.func.grad(lambda means: pk.gm_rollout(**{**problem, "means": means}).square().sum())
    expected = gradient(problem["means"])
    try:
        actual = torch.compile(gradient, fullgraph=True, backend="aot_eager")(problem["means"])
    except RuntimeError:  # Dynamo may refuse
        return
    torch.testing.assert_close(actual, expected)


def test_forward_mode_is_refused() -> None:
    """Also without gradients, where a tangent would otherwise be dropped without a word."""
    problem = gm_problem()
    for grad_enabled in (True, False):
        with torch.set_grad_enabled(grad_enabled), torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(problem["means"], torch.ones_like(problem["means"]))
            with pytest.raises(RuntimeError, match="jvp"):
                pk.gm_rollout(**{**problem, "means": dual})


GM_ERRORS = [
    ({"means": torch.zeros(2, 3, 4)}, "means: expected"),
    ({"means": torch.zeros(2, 3, 4, 3, 5, dtype=torch.int64)}, "means: expected dtype"),
    ({"logweights": torch.zeros(2, 3, 3, 5)}, "logweights: expected"),
    ({"x_src": torch.zeros(2, 4, 3, 6)}, "x_src: expected shape"),
    ({"x_start": torch.zeros(1, 4, 3, 5)}, "x_start: expected shape"),
    ({"x_start": torch.zeros(2, 4, 3, 5, dtype=torch.bfloat16)}, "x_start: expected dtype"),
    ({"x_src": torch.zeros(2, 4, 3, 5, device="meta")}, "x_src: expected a tensor on cpu"),
    ({"logstds": torch.zeros(3)}, "logstds: expected one value per sample"),
    ({"sigma_src": torch.zeros(2, 2)}, "sigma_src: expected one value per sample"),
    ({"sigmas": torch.zeros(3, 4)}, "sigmas: expected"),
    ({"sigmas": torch.tensor([0.5, 0.7])}, "sigmas: expected non-increasing"),
    ({"sigmas": torch.tensor([0.9, 0.1])}, "sigmas: expected sigmas"),
    ({"sigmas": torch.tensor([0.5, float("nan")])}, "sigmas: expected noise levels within"),
    ({"sigmas": torch.tensor([0.5, -0.2])}, "sigmas: expected noise levels within"),
    ({"sigma_src": torch.tensor([0.5, 1.2])}, "sigma_src: expected noise levels within"),
    ({"sigmas": torch.tensor([1, 0])}, "sigmas: expected a floating-point tensor of noise levels, got torch.int64"),
    ({"sigma_src": None}, "sigma_src: expected a number or a tensor, got None"),
    ({"sigma_src": "1"}, "sigma_src: expected a number or a tensor, got '1'"),
    ({"means": None}, "means: expected a tensor, got NoneType"),
    ({"temperature": -1.0}, "temperature: expected"),
    ({"temperature": "auto"}, "temperature: expected a finite number, at least 0, got 'auto'"),
    ({"keep": torch.ones(2, 4, dtype=torch.bool)}, "keep: expected a bool tensor"),
    ({"keep": [True] * 3}, "keep: expected a bool tensor (2, 3), got list"),
    ({"eps": None}, "eps: expected a positive finite number, got None"),
    ({"layout": "tokens"}, "layout: expected one of"),
    ({"backend": "cuda"}, "backend: expected None or one of"),
    ({"backend": "triton"}, "backend: 'triton' cannot run here"),
    ({"eps": 0.0}, "eps: expected a positive"),
    ({"check": "yes"}, "check: expected True or False, got str"),
    ({"x_src": torch.zeros(2, 4, 3, 5).to_sparse()}, "x_src: expected a dense tensor, got a sparse_coo one"),
    ({"sigma_src": torch.zeros(2).to_sparse()}, "sigma_src: expected a dense tensor, got a sparse_coo one"),
]


@pytest.mark.parametrize(("change", "message"), GM_ERRORS)
def test_gm_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        pk.gm_rollout(**{**gm_problem(dtype=torch.float32), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "spline"}, "mode: expected one of"),
        ({"shift": 0.0}, "shift: expected a positive"),
        ({"shift": "3"}, "shift: expected a positive finite number, got '3'"),
        ({"segment_size": torch.tensor([0.5, -0.5])}, "segment_size: expected positive"),
        ({"grid": torch.zeros(2, 4)}, "grid: expected"),
        ({"x_start": torch.zeros(2, 3, 5, 5)}, "x_start: expected shape"),
        ({"backend": "triton"}, "backend: 'triton'"),
        ({"backend": "inductor"}, "backend: 'inductor' compiles GM operators only"),
    ],
)
def test_dx_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pk.dx_rollout(**{**dx_problem(dtype=torch.float32), **change})


def test_loss_and_window_errors_name_the_argument() -> None:
    problem = gm_problem(dtype=torch.float32)
    target = torch.zeros(2, 4, 3, 5)
    for change, message in (
        ({"means": None}, "means: expected a tensor"),
        ({"x_src": None}, "x_src: expected a tensor"),
        ({"target": target[:1]}, "target: expected shape"),
        ({"local": [True, False]}, "local: expected a bool tensor"),
        ({"min_delta": 0.0}, "min_delta: expected a positive"),
        ({"sigmas": torch.ones(1)}, "sigmas: expected sigmas"),
    ):
        with pytest.raises(ValueError, match=message):
            pk.gm_mean_velocity_loss(**{**problem, "target": target, **change})
    with pytest.raises(ValueError, match="grid: expected a tensor"):
        pk.dx_mean_velocity_loss(**{**dx_problem(), "grid": None, "target": torch.zeros(2, 3, 3, 5)})
    for target in (None, "x", 1.0):
        with pytest.raises(ValueError, match="target: expected a tensor"):
            pk.dx_mean_velocity_loss(**dx_problem(), target=target)
    with pytest.raises(ValueError, match="sigma_t: expected noise levels"):
        pk.gm_velocity(**as_velocity({**problem, "sigmas": torch.full((2, 3), 1.5)}))


FUNCTIONS = [
    pytest.param("gm_rollout", "means", id="gm_rollout"),
    pytest.param("gm_mean_velocity", "means", id="gm_mean_velocity"),
    pytest.param("dx_rollout", "grid", id="dx_rollout"),
]


def function_of(name: str, leaf: str) -> tuple[dict[str, Any], Any]:
    problem: dict[str, Any] = (gm_problem if name.startswith("gm") else dx_problem)(c=8, dtype=torch.float32)
    return problem, lambda value: getattr(pk, name)(**{**problem, leaf: value}).square().sum()


@pytest.mark.parametrize(("name", "leaf"), FUNCTIONS)
def test_autocast_changes_nothing(name: str, leaf: str) -> None:
    problem, _ = function_of(name, leaf)
    leaves = ["x_start", leaf]
    plain = values_and_gradients(getattr(pk, name), problem, leaves)
    with torch.autocast("cpu", torch.bfloat16):
        cast = values_and_gradients(getattr(pk, name), problem, leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize(("name", "leaf"), FUNCTIONS)
def test_torch_func(name: str, leaf: str) -> None:
    """grad, vmap and both; a second derivative raises instead of being silently zero."""
    problem, function = function_of(name, leaf)
    value = problem[leaf].clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(value), value)
    torch.testing.assert_close(torch.func.grad(function)(problem[leaf]), expected)
    many = torch.stack([problem[leaf], 0.5 * problem[leaf], 2 * problem[leaf]])
    torch.testing.assert_close(torch.func.vmap(function)(many), torch.stack([function(one) for one in many]))
    gradients = torch.func.vmap(torch.func.grad(function))(many)
    torch.testing.assert_close(gradients, torch.stack([torch.func.grad(function)(one) for one in many]))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.grad(lambda x: torch.func.grad(function)(x).sum())(problem[leaf])
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(torch.autograd.grad(function(value), value, create_graph=True)[0].sum(), value)


@pytest.mark.parametrize(("name", "leaf"), FUNCTIONS)
def test_export_and_checkpointing(name: str, leaf: str) -> None:
    problem, function = function_of(name, leaf)

    class Wrapper(torch.nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return getattr(pk, name)(**{**problem, leaf: value})

    exported = torch.export.export(Wrapper(), (problem[leaf],))
    torch.testing.assert_close(exported.module()(problem[leaf]), Wrapper()(problem[leaf]))
    value = problem[leaf].clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(value), value)
    checkpointed = torch.utils.checkpoint.checkpoint(function, value, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(checkpointed, value)[0], expected)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_results_never_alias_inputs(backend: str) -> None:
    for problem, operator in ((gm_problem(), pk.gm_rollout), (dx_problem(), pk.dx_rollout)):
        still = {**problem, "sigmas": problem["sigmas"][:, :1]}
        result = operator(**still, backend=backend)
        torch.testing.assert_close(result, problem["x_start"])
        assert result.data_ptr() != problem["x_start"].data_ptr()
