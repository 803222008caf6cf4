"""Problems for the operators, and how results are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import piflow_kernels as pk

GM_LEAVES = ["x_start", "x_src", "means", "logstds", "logweights"]
DX_LEAVES = ["x_start", "x_src", "grid"]

EPS32 = 4e-7
"""Rounding of one float32 substep, with room."""


def gm_problem(
    batch: int = 2,
    k: int = 3,
    c: int = 4,
    spatial: tuple[int, ...] = (3, 5),
    n_steps: int = 6,
    dtype: torch.dtype = torch.float64,
    logstd: float = -1.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    sigma_src = torch.linspace(1.0, 0.6, batch, dtype=torch.float64)
    levels = torch.linspace(1, 0, n_steps + 1, dtype=torch.float64)
    end = 0.1 * torch.arange(batch, dtype=torch.float64)
    x_src = draw(batch, c, *spatial)
    return {
        "x_start": x_src + 0.1 * draw(batch, c, *spatial),
        "sigmas": end[:, None] + (0.95 * sigma_src - end)[:, None] * levels,
        "x_src": x_src,
        "sigma_src": sigma_src,
        "means": draw(batch, k, c, *spatial),
        "logstds": logstd + 0.3 * draw(batch),
        "logweights": draw(batch, k, 1, *spatial),
    }


def dx_problem(
    batch: int = 2,
    n_grid: int = 4,
    c: int = 3,
    spatial: tuple[int, ...] = (3, 5),
    n_steps: int = 6,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    problem: dict[str, Any] = gm_problem(batch, n_grid, c, spatial, n_steps, dtype)
    problem["grid"] = problem.pop("means")
    del problem["logstds"], problem["logweights"]
    return {**problem, "segment_size": torch.linspace(0.9, 0.5, batch), "shift": 3.2}


def in_single(
    problem: dict[str, Any], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """States and scalars in float32, network outputs in `dtype`."""
    network = ("means", "logweights", "grid")
    return {
        name: value.to(device, dtype if name in network else torch.float32) if isinstance(value, Tensor) else value
        for name, value in problem.items()
    }


def in_double(problem: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in problem.items()}


def values_and_gradients(
    operator: Callable[..., Tensor], problem: dict[str, Any], names: list[str], **kwargs: Any
) -> list[Tensor]:
    leaves = {name: problem[name].clone().requires_grad_() for name in names}
    result = operator(**{**problem, **leaves}, **kwargs)
    cotangent = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(result)
    return [result.detach(), *torch.autograd.grad((result * cotangent).sum(), list(leaves.values()))]


def assert_matches(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """On the maximum and, three times tighter, on the RMS."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        error = (a.double() - e.double()).abs()
        assert error.max() <= tolerance * e.abs().max() + 1e-300
        assert error.square().mean().sqrt() <= tolerance / 3 * e.abs().max() + 1e-300


def extreme_problem(logstd: float) -> tuple[dict[str, Tensor], float, Tensor]:
    """A rollout from sigma 1 to 0 in float32, how far it may be off, and the float64 result."""
    problem = gm_problem(k=8, c=16, spatial=(4, 3), n_steps=16, logstd=logstd)
    problem["sigmas"] = torch.linspace(1, 0, 17).expand(2, 17).clone().double()
    problem["sigmas"][1, 8:] = problem["sigmas"][1, 8]
    problem["sigma_src"] = torch.ones(2, dtype=torch.float64)
    single = {name: value.float() for name, value in problem.items()}
    expected = pk.gm_rollout(**{name: value.double() for name, value in single.items()}, backend="reference")
    textbook = pk.gm_rollout(**single, backend="reference")
    rounding = EPS32 * 16**0.5 * expected.abs().max().item()
    return single, max(2 * (textbook - expected).abs().max().item(), rounding), expected
