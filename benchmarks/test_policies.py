"""Fused policy rollouts against the textbook formula and against diffusers' PiflowScheduler, on the CPU.

    pytest benchmarks --benchmark-only

Each group has the peers beside the fused operators; the `extra_info` of ours also holds the peer timed in turns with
it, and the ratio of medians. Each benchmark checks the result against float64. No speed is asserted: these are
measurements.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.candidates import compiled
from benchmarks.shapes import GM_SHAPES
from benchmarks.timing import interleaved, keep_freed_memory, milliseconds
from piflow.noise_schedule import NoiseSchedule
from piflow.schedulers import FusedPiflowScheduler
from piflow_kernels import dx_rollout, gm_mean_velocity, gm_mean_velocity_loss, gm_rollout
from tests.kernels.problems import GM_LEAVES, in_double

keep_freed_memory()

Call = Callable[[], torch.Tensor]


def compare(benchmark: Any, ours: Call, peer: Call, exact: torch.Tensor) -> None:
    """Time both in turns, check the result, and put the figures where pytest-benchmark stores them.

    Ours must be within 1e-5 of float64 `exact`, or as close to it as the peer is.
    """
    with torch.no_grad():
        errors = {name: (call() - exact).abs().max().item() for name, call in (("ours", ours), ("peer", peer))}
        assert errors["ours"] <= max(1e-5, errors["peer"]), errors
        seconds = interleaved({"ours": ours, "peer": peer})
        benchmark.extra_info.update(
            ours_ms=milliseconds(seconds["ours"]),
            peer_ms=milliseconds(seconds["peer"]),
            max_error=errors,
            speedup=round(statistics.median(seconds["peer"]) / statistics.median(seconds["ours"]), 2),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            load_average=round(os.getloadavg()[0], 2),
        )
        benchmark.pedantic(ours, rounds=10, warmup_rounds=2)


def alone(benchmark: Any, call: Call, exact: torch.Tensor) -> None:
    """A peer, as a row of its own."""
    with torch.no_grad():
        assert (call() - exact).abs().max().item() <= 1e-3 * exact.abs().max().item()
        benchmark.pedantic(call, rounds=10, warmup_rounds=2)


NAMES = ["qwen-image-1024", "imagenet-256-batch-16"]


@pytest.mark.parametrize("backend", ["reference", "reference, torch.compile", "torch", "inductor"])
@pytest.mark.parametrize("name", NAMES)
def test_gm_rollout(benchmark: Any, name: str, backend: Any) -> None:
    benchmark.group = f"gm_rollout against the textbook formula, {name}"
    problem: dict[str, Any] = dict(GM_SHAPES[name].problem(torch.float32))
    exact = gm_rollout(**in_double(problem), backend="reference")

    def textbook(**problem: Any) -> torch.Tensor:
        return gm_rollout(**problem, backend="reference")

    if backend.startswith("reference"):
        peer = compiled(textbook) if "compile" in backend else textbook
        alone(benchmark, lambda: peer(**problem), exact)
    else:
        compare(benchmark, lambda: gm_rollout(**problem, backend=backend), lambda: textbook(**problem), exact)


OPERATORS = [gm_rollout, gm_mean_velocity, gm_mean_velocity_loss]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", NAMES)
def test_gm_window_with_gradients(benchmark: Any, name: str, operator: Any) -> None:
    compare(benchmark, *window(benchmark, name, operator))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", NAMES)
def test_gm_window_with_gradients_of_the_textbook(benchmark: Any, name: str, operator: Any) -> None:
    _, peer, exact = window(benchmark, name, operator)
    alone(benchmark, peer, exact)


def window(benchmark: Any, name: str, operator: Any) -> tuple[Call, Call, torch.Tensor]:
    """Ours, autograd of the textbook, and float64's: gradients of all five inputs, one after the other."""
    benchmark.group = f"{operator.__name__}, 3 substeps forward and backward, {name}"
    problem: dict[str, Any] = dict(dataclasses.replace(GM_SHAPES[name], n_steps=3).problem(torch.float32))
    if operator is gm_mean_velocity_loss:
        problem["target"] = 0.5 * problem["x_src"].flip(-1)

    def gradients(problem: dict[str, Any], backend: Any) -> torch.Tensor:
        leaves = {leaf: problem[leaf].clone().requires_grad_() for leaf in GM_LEAVES}
        with torch.enable_grad():
            result = operator(**{**problem, **leaves}, backend=backend)
            found = torch.autograd.grad(result.sum(), list(leaves.values()))
        return torch.cat([each.flatten() for each in found])

    exact = gradients(in_double(problem), "reference")
    return lambda: gradients(problem, None), lambda: gradients(problem, "reference"), exact


@pytest.mark.parametrize("client", ["diffusers", "operator", "scheduler"])
@pytest.mark.benchmark(group="DX rollout against diffusers' PiflowScheduler.step")
def test_dx_rollout_kandinsky_6(benchmark: Any, client: str) -> None:
    """(1, 8 x 60 x 108, 16 channels, grid 10), 13 substeps: the first of 10 steps at 128 substeps."""
    from diffusers import PiflowScheduler

    scheduler = PiflowScheduler(shift=5.0, n_grid=10)
    scheduler.set_timesteps(10)
    g = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 8, 60, 108, 16, generator=g)
    output = torch.randn(1, 8, 60, 108, 160, generator=g)

    def peer() -> torch.Tensor:
        scheduler.set_begin_index(0)
        scheduler._step_index = None
        return scheduler.step(output, scheduler.timesteps[0], sample).prev_sample

    raw_src, raw_dst = (float(scheduler._piflow_raw_timesteps[i]) for i in (0, 1))
    n_substeps = round((raw_src - raw_dst) * 128)
    assert n_substeps == 13
    sigmas = NoiseSchedule(5.0).sigma(torch.linspace(raw_src, raw_dst, n_substeps + 1, dtype=torch.float64))

    fused = FusedPiflowScheduler.from_config(scheduler.config)
    fused.set_timesteps(10)

    def step() -> torch.Tensor:
        fused.set_begin_index(0)
        fused._step_index = None
        return fused.step(output, fused.timesteps[0], sample).prev_sample

    def operator() -> torch.Tensor:
        grid = output.unflatten(-1, (10, 16))
        return dx_rollout(sample, sigmas, sample, 1.0, grid, raw_src - raw_dst, 5.0, eps=1e-6, layout="packed")

    grid = output.unflatten(-1, (10, 16)).double()
    exact = dx_rollout(
        sample.double(), sigmas, sample.double(), 1.0, grid, raw_src - raw_dst, 5.0, eps=1e-6, layout="packed",
        backend="reference",
    )  # fmt: skip
    if client == "diffusers":
        alone(benchmark, peer, exact)
    else:
        compare(benchmark, step if client == "scheduler" else operator, peer, exact)
