"""The compiled CPU path against the textbook reference; what is compiled, and how often."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import piflow_kernels as pk
from piflow_kernels.gm import inductor_path, torch_path
from tests.kernels.problems import EPS32, gm_problem

pytestmark = pytest.mark.slow

SHAPES = [(8, 16), (32, 4), (17, 17), (3, 5), (1, 1)]
"""Gram space, channel space unrolled and in loops, odd, least."""


def single(problem: dict[str, Any]) -> dict[str, Any]:
    return {name: value.float() for name, value in problem.items()}


def assert_as_good_as_the_reference(problem: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """At most twice the error of the float32 formula, or of one rounding in each substep."""
    operator = pk.gm_mean_velocity_loss if "target" in problem else pk.gm_rollout
    exact = operator(**{name: value.double() for name, value in problem.items()}, backend="reference", **kwargs)
    formula = operator(**problem, backend="reference", **kwargs).double()
    result = operator(**problem, backend="inductor", **kwargs)
    assert result.dtype == torch.float32
    assert result.shape == exact.shape
    rounding = EPS32 * max(problem["sigmas"].shape[-1] - 1, 1) ** 0.5 * exact.abs().max().item()
    assert (result - exact).abs().max() <= max(2 * (formula - exact).abs().max().item(), rounding)
    return result


@pytest.fixture
def compilations() -> Callable[[], int]:
    """How many graphs were compiled since the test began."""
    before = counters["stats"]["unique_graphs"]
    return lambda: counters["stats"]["unique_graphs"] - before


@pytest.mark.parametrize(("k", "c"), SHAPES)
def test_rollout(k: int, c: int) -> None:
    problem = single(gm_problem(k=k, c=c, spatial=(9, 13), n_steps=11))
    assert_as_good_as_the_reference(problem)
    assert_as_good_as_the_reference({**problem, "sigmas": problem["sigmas"][:, :1]})


def test_both_spaces_are_tested() -> None:
    assert [inductor_path.space(k, c, torch.get_num_threads()).gram for k, c in SHAPES[:3]] == [True, False, False]


@pytest.mark.parametrize("kwargs", [{"temperature": 0.3}, {"keep": [[True, False, True], [False, False, True]]}])
def test_temperature_and_keep(kwargs: dict[str, Any]) -> None:
    kwargs = {name: torch.tensor(value) if name == "keep" else value for name, value in kwargs.items()}
    assert_as_good_as_the_reference(single(gm_problem(k=3, c=5)), **kwargs)


def test_loss() -> None:
    problem = single(gm_problem(k=3, c=5))
    g = torch.Generator().manual_seed(3)
    problem["target"] = torch.randn(problem["x_src"].shape, generator=g)
    assert_as_good_as_the_reference(problem, local=torch.tensor([True, False]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_network_outputs(dtype: torch.dtype) -> None:
    problem = single(gm_problem(k=3, c=5))
    for name in ("means", "logweights"):
        problem[name] = problem[name].to(dtype)
    assert_as_good_as_the_reference(problem)


@pytest.mark.parametrize("logstd", [-8.0, 2.0])
@pytest.mark.parametrize(("k", "c"), [(8, 16), (32, 4)])
def test_extremes(k: int, c: int, logstd: float) -> None:
    """From sigma 1 to 0, and a sample that stops halfway."""
    problem = single(gm_problem(k=k, c=c, spatial=(4, 3), n_steps=16, logstd=logstd))
    problem["sigmas"] = torch.linspace(1, 0, 17).repeat(2, 1)
    problem["sigmas"][1, 8:] = problem["sigmas"][1, 8]
    problem["sigma_src"] = torch.ones(2)
    assert torch.isfinite(assert_as_good_as_the_reference(problem)).all()


def test_strided_inputs() -> None:
    problem = single(gm_problem(k=3, c=5, spatial=(6, 70)))
    plain = pk.gm_rollout(**problem, backend="inductor")
    for name in ("x_start", "x_src", "means", "logweights"):
        problem[name] = problem[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    torch.testing.assert_close(pk.gm_rollout(**problem, backend="inductor"), plain, rtol=0, atol=0)


def test_packed_layout() -> None:
    problem = single(gm_problem(k=3, c=5, spatial=(35, 4)))
    packed = dict(problem)
    for name in ("x_start", "x_src"):
        packed[name] = problem[name].permute(0, 2, 1, 3).flatten(2)
    packed["means"] = problem["means"].permute(0, 3, 1, 2, 4).flatten(3)
    packed["logweights"] = problem["logweights"][:, :, 0].permute(0, 2, 1, 3)
    result = pk.gm_rollout(**packed, layout="packed", backend="inductor")
    expected = pk.gm_rollout(**problem, backend="inductor")
    torch.testing.assert_close(result, expected.permute(0, 2, 1, 3).flatten(2), rtol=0, atol=0)


def test_blocks_of_pixels_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = single(gm_problem(batch=3, k=3, c=5, spatial=(23, 31)))
    whole = pk.gm_rollout(**problem, backend="inductor")
    monkeypatch.setattr(inductor_path, "LARGEST_BLOCK", 1 << 12)
    torch.testing.assert_close(pk.gm_rollout(**problem, backend="inductor"), whole, rtol=0, atol=0)


def test_nothing_in_nothing_out(compilations: Callable[[], int]) -> None:
    problem = single(gm_problem(k=7, c=11))
    empty = {name: value[:0] for name, value in problem.items()}
    assert pk.gm_rollout(**empty, backend="inductor").shape == (0, 11, 3, 5)
    empty = {**problem, **{name: problem[name][..., :0] for name in ("x_start", "x_src", "means", "logweights")}}
    assert pk.gm_rollout(**empty, backend="inductor").shape == (2, 11, 3, 0)
    assert compilations() == 0


def test_gradients_are_those_of_the_torch_path() -> None:
    problem = single(gm_problem(k=3, c=5))
    gradients = []
    for backend in ("inductor", "torch"):
        means = problem["means"].clone().requires_grad_()
        loss = pk.gm_rollout(**{**problem, "means": means}, backend=backend).square().sum()
        gradients.append(torch.autograd.grad(loss, means)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_compiles_once_for_all_sizes_and_levels(compilations: Callable[[], int]) -> None:
    inductor_path.space(3, 5, torch.get_num_threads())
    before = compilations()
    for batch, spatial, n_steps in (
        (1, (1,), 1),
        (1, (8, 8), 3),
        (2, (16, 8), 8),
        (5, (3, 4, 5), 37),
        (1, (97, 89), 4),
    ):
        problem = single(gm_problem(batch=batch, k=3, c=5, spatial=spatial, n_steps=n_steps, seed=n_steps))
        assert_as_good_as_the_reference(problem)
        with torch.no_grad():
            pk.gm_rollout(**problem, backend="inductor")
        with torch.inference_mode():
            pk.gm_rollout(**{name: value.clone() for name, value in problem.items()}, backend="inductor")
    assert compilations() == before


def test_inside_the_callers_own_compilation(compilations: Callable[[], int]) -> None:
    problem = single(gm_problem(k=3, c=5))
    expected = pk.gm_rollout(**problem, backend="inductor")
    before = compilations()
    call = torch.compile(lambda p: 2 * pk.gm_rollout(**p, backend="inductor"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(problem), 2 * expected, rtol=0, atol=0)
    assert compilations() == before + 1  # the caller's
    means_bar = torch.func.grad(lambda v: pk.gm_rollout(**{**problem, "means": v}, backend="inductor").sum())
    assert torch.isfinite(means_bar(problem["means"])).all()


def test_survives_a_reset_of_dynamo() -> None:
    problem = single(gm_problem(k=1, c=1, spatial=(150, 40)))
    expected = pk.gm_rollout(**problem, backend="inductor")
    torch._dynamo.reset()
    torch.testing.assert_close(pk.gm_rollout(**problem, backend="inductor"), expected, rtol=0, atol=0)
    assert_as_good_as_the_reference(single(gm_problem(k=1, c=1)))


def test_settings_of_the_process_stay() -> None:
    from torch._inductor import config

    before = config.save_config_portable()
    inductor_path.space.cache_clear()
    pk.gm_rollout(**single(gm_problem(k=1, c=1)), backend="inductor")
    assert config.save_config_portable() == before


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    with pytest.raises(RuntimeError, match=r"found no no-such-compiler; install a C\+\+ compiler"):
        pk.gm_rollout(**single(gm_problem(k=2, c=7)), backend="inductor")


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="backend: 'inductor'"):
        pk.gm_rollout(**gm_problem(k=3, c=5), backend="inductor")


def test_takes_what_the_torch_path_takes() -> None:
    ours, theirs = (inspect.signature(path.gm_integrate) for path in (inductor_path, torch_path))
    assert list(ours.parameters) == list(theirs.parameters)
