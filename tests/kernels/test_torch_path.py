"""The CPU implementations beneath the operators, called directly: temperature, dropout, fused loss, blocks, layouts.

The textbook reference with autograd is what they must agree with; `test_operators.py` covers the operators above.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from piflow_kernels.dx import reference as dx_reference
from piflow_kernels.dx import torch_path as dx_path
from piflow_kernels.dx.coefficients import dx_coefficients
from piflow_kernels.gm import reference as gm_reference
from piflow_kernels.gm import torch_path as gm_path
from piflow_kernels.gm.coefficients import Coefficients, gm_coefficients, variance_of
from piflow_kernels.substeps import substeps
from tests.kernels.problems import EPS32, assert_matches, dx_problem, gm_problem

EPS = 1e-6
STATES = ["x_start", "x_src", "means", "logweights"]


def gm_inputs(problem: dict[str, Tensor], temperature: float) -> tuple[list[Tensor], Coefficients]:
    variance = temperature * variance_of(problem["logstds"].double(), problem["sigma_src"])
    steps = (*substeps(problem["sigmas"]), None)
    return [problem[name] for name in STATES], gm_coefficients(*steps, problem["sigma_src"], variance, EPS)


def gm_fused(problem: dict[str, Tensor], grad: Tensor, temperature: float, **options: Any) -> list[Tensor]:
    """Value, adjoints of the states and network outputs, and of the target where there is one."""
    inputs, coefficients = gm_inputs(problem, temperature)
    value = gm_path.gm_integrate(*inputs, coefficients, temperature=temperature, **options)
    bars = gm_path.gm_integrate_backward(grad, *inputs, coefficients, temperature=temperature, **options)
    adjoints = [bars.x_start, bars.x_src, bars.means, bars.logweights]
    return [value, *adjoints] + ([] if bars.target is None else [bars.target])


def gm_textbook(
    problem: dict[str, Tensor], grad: Tensor, temperature: float, keep: Tensor | None, target: Tensor | None
) -> list[Tensor]:
    leaves = {name: problem[name].clone().requires_grad_() for name in STATES}
    logweights = leaves["logweights"] / temperature
    if keep is not None:
        logweights = logweights.masked_fill(~keep.reshape(*keep.shape, *[1] * (logweights.dim() - 2)), -torch.inf)
    logstds = problem["logstds"] + 0.5 * torch.log(torch.tensor(temperature, dtype=torch.float64))
    rest = (leaves["x_src"], problem["sigma_src"], leaves["means"], logstds, logweights, EPS)
    value = gm_reference.gm_rollout(leaves["x_start"], problem["sigmas"], *rest)
    wanted = list(leaves.values())
    if target is not None:
        target = target.clone().requires_grad_()
        value = (value - target).square().flatten(1).mean(1)
        wanted.append(target)
    return [value.detach(), *torch.autograd.grad(value, wanted, grad)]


def cotangent(shape: torch.Size | tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


KEEP = torch.tensor([[True, False, True, False, True, True, False, True], [False] * 7 + [True]])


@pytest.mark.parametrize("n_steps", [1, 3, 20])  # channel space, channel space, Gram space
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("loss", [False, True])
@pytest.mark.parametrize("slice_elements", [1, 100, 1 << 20])
def test_gm_options_in_float64(
    n_steps: int, temperature: float, dropout: bool, loss: bool, slice_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Temperature, dropout and loss together, with products summed in thin, medium and whole slices."""
    monkeypatch.setattr(gm_path, "SLICE_ELEMENTS", slice_elements)
    monkeypatch.setattr(gm_path, "BLOCK_ELEMENTS", 1 << 9)
    problem = gm_problem(k=8, c=6, spatial=(3, 5), n_steps=n_steps)
    keep = KEEP if dropout else None
    target = cotangent(problem["x_src"].shape).roll(1) if loss else None
    grad = cotangent((2,) if loss else problem["x_src"].shape)
    actual = gm_fused(problem, grad, temperature, keep=keep, target=target)
    assert_matches(actual, gm_textbook(problem, grad, temperature, keep, target), 1e-10)
    if dropout:
        assert bool((actual[4].flatten(2)[~KEEP] == 0).all())


@pytest.mark.parametrize(("k", "c"), [(1, 3), (5, 7), (8, 16), (32, 4)])
@pytest.mark.parametrize("loss", [False, True])
def test_gm_in_float32(k: int, c: int, loss: bool) -> None:
    problem = gm_problem(k=k, c=c, spatial=(9, 8), n_steps=12)
    target = cotangent(problem["x_src"].shape) if loss else None
    grad = cotangent((2,) if loss else problem["x_src"].shape)
    exact = gm_textbook(problem, grad, 1.0, None, target)
    single = {name: value.float() if name in STATES else value for name, value in problem.items()}
    options = {} if target is None else {"target": target.float()}
    actual = gm_fused(single, grad.float(), 1.0, **options)
    textbook = gm_textbook(single, grad.float(), 1.0, None, options.get("target"))
    for i, (a, e, t) in enumerate(zip(actual, exact, textbook, strict=True)):
        assert a.dtype == torch.float32
        rounding = (EPS32 if i == 0 else 5e-6) * 12**0.5 * e.abs().max()
        for norm in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()):
            assert norm(a.double() - e) <= max(2 * norm(t.double() - e), rounding)


@pytest.mark.parametrize("n_steps", [3, 30])
def test_gm_logits_far_apart(n_steps: int) -> None:
    """Weights that would be denormal numbers, and logweights of -inf, count as zero."""
    problem = gm_problem(k=8, c=4, n_steps=n_steps)
    problem["logweights"] = problem["logweights"] * 60
    problem["logweights"][:, ::3] = -torch.inf
    grad = cotangent(problem["x_src"].shape)
    assert_matches(gm_fused(problem, grad, 1.0), gm_textbook(problem, grad, 1.0, None, None), 1e-10)


@pytest.mark.parametrize("spatial", [(40,), (2, 30), (30, 2), (2, 3, 20), (20, 1, 3)])
@pytest.mark.parametrize("n_steps", [2, 40])
def test_gm_blocks_and_strides(spatial: tuple[int, ...], n_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks over samples and any axis, of inputs laid out channels last: the same values, laid out as they came."""
    problem = gm_problem(batch=3, k=4, c=5, spatial=spatial, n_steps=n_steps)
    target = cotangent(problem["x_src"].shape)
    whole = gm_fused(problem, cotangent((3,)), 0.7, target=target)
    strided = {**problem, **{name: problem[name].movedim(1, -1).contiguous().movedim(-1, 1) for name in STATES}}
    for block in (1 << 7, 1 << 10):
        monkeypatch.setattr(gm_path, "BLOCK_ELEMENTS", block)
        actual = gm_fused(strided, cotangent((3,)), 0.7, target=target)
        assert_matches(actual, whole, 1e-12)
        for bar, name in zip(actual[1:], STATES):
            assert bar.stride() == torch.empty_like(strided[name]).stride()


def test_gm_repeats_bitwise_and_changes_no_input() -> None:
    problem = gm_problem(k=8, c=16, spatial=(20, 31), n_steps=3, dtype=torch.float32)
    before = {name: value.clone() for name, value in problem.items()}
    target, grad = cotangent(problem["x_src"].shape, torch.float32), cotangent((2,), torch.float32)
    first, second = (gm_fused(problem, grad, 0.5, keep=KEEP, target=target) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(problem[name], before[name]) for name in problem)


@pytest.mark.parametrize("empty", [{"batch": 0}, {"spatial": (0, 4)}])
def test_gm_of_nothing(empty: dict[str, Any]) -> None:
    problem = gm_problem(**empty)
    for options in ({}, {"target": problem["x_src"]}):
        grad = torch.zeros(len(problem["x_src"]) if options else problem["x_src"].shape, dtype=torch.float64)
        value, *bars = gm_fused(problem, grad, 1.0, **options)
        assert value.shape == grad.shape
        assert [bar.shape for bar in bars[:4]] == [problem[name].shape for name in STATES]


def dx_fused(problem: dict[str, Any], grad: Tensor, mode: str, target: Tensor | None) -> list[Tensor]:
    scalars = [torch.full((len(grad),), value, dtype=torch.float64) for value in (0.7, 3.2)]
    steps = (*substeps(problem["sigmas"]), None)
    coefficients = dx_coefficients(*steps, problem["sigma_src"], *scalars, problem["grid"].shape[1], mode, EPS)
    inputs = (problem["x_start"], problem["x_src"], problem["grid"], coefficients)
    value = dx_path.dx_integrate(*inputs, target=target)
    return [value, *(bar for bar in dx_path.dx_integrate_backward(grad, *inputs, target=target) if bar is not None)]


def dx_textbook(problem: dict[str, Any], grad: Tensor, mode: str, target: Tensor | None) -> list[Tensor]:
    scalars = [torch.full((len(grad),), value, dtype=torch.float64) for value in (0.7, 3.2)]
    leaves = [problem[name].clone().requires_grad_() for name in ("x_start", "x_src", "grid")]
    x_start, x_src, grid = leaves
    value = dx_reference.dx_rollout(x_start, problem["sigmas"], x_src, problem["sigma_src"], grid, *scalars, mode, EPS)
    if target is not None:
        leaves.append(target.clone().requires_grad_())
        value = (value - leaves[-1]).square().flatten(1).mean(1)
    return [value.detach(), *torch.autograd.grad(value, leaves, grad)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", ["grid", "polynomial"])
@pytest.mark.parametrize("loss", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 12])
def test_dx_in_float64(packed: bool, mode: str, loss: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dx_path, "CHUNK_TOKENS", chunk)
    problem = dx_problem(n_grid=5, c=6, spatial=(2, 3, 4))
    if packed:
        problem["grid"] = problem["grid"].permute(0, 3, 4, 5, 1, 2).contiguous().permute(0, 4, 5, 1, 2, 3)
        for name in ("x_start", "x_src"):
            problem[name] = problem[name].movedim(1, -1).contiguous().movedim(-1, 1)
    target = cotangent(problem["x_src"].shape).roll(1) if loss else None
    grad = cotangent((2,) if loss else problem["x_src"].shape)
    actual = dx_fused(problem, grad, mode, target)
    assert_matches(actual, dx_textbook(problem, grad, mode, target), 1e-10)
    if not loss:
        assert actual[0].stride() == problem["x_start"].stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dx_tokens_in_any_dtype(dtype: torch.dtype) -> None:
    problem = dx_problem(n_grid=10, c=16, spatial=(50,), dtype=torch.float32)
    problem["grid"] = problem["grid"].to(dtype)
    grad = cotangent(problem["x_src"].shape, torch.float32)
    expected = dx_fused({**problem, "grid": problem["grid"].float()}, grad, "grid", None)
    packed = {name: problem[name].movedim(1, -1).contiguous().movedim(-1, 1) for name in ("x_start", "x_src")}
    packed["grid"] = problem["grid"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    actual = dx_fused({**problem, **packed}, grad, "grid", None)
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-5)
    assert [bar.dtype for bar in actual[1:]] == [torch.float32, torch.float32, dtype]
