"""Other ways to run the textbook formula: torch.compile, activation checkpointing, CUDA graphs, diffusers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from piflow_kernels.dx import reference as dx_reference
from piflow_kernels.gm import reference as gm_reference
from piflow_kernels.gm.reference import per_pixel

Run = Callable[..., Tensor]
"""Takes a problem by name, returns the result with the batch on its first axis."""
Wrap = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


@contextmanager
def textbook_replaced(
    velocities: dict[str, Callable[..., Tensor]], substeps: dict[str, Callable[..., Tensor]]
) -> Iterator[None]:
    """The velocities and Euler substeps ("gm", "dx") with which `backend="reference"` computes meanwhile."""
    modules = {"gm": gm_reference, "dx": dx_reference}
    before = {
        (family, name): getattr(modules[family], f"{family}_{name}")
        for family in modules
        for name in ("velocity", "rollout")
    }
    try:
        for family, module in modules.items():
            setattr(module, f"{family}_velocity", velocities[family])
            setattr(module, f"{family}_rollout", by_substep(substeps[family]))
        yield
    finally:
        for (family, name), function in before.items():
            setattr(modules[family], f"{family}_{name}", function)


def euler_substep(velocity: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def substep(x: Tensor, sigma: Tensor, sigma_next: Tensor, *network: Any) -> Tensor:
        return x + per_pixel(sigma_next - sigma, x) * velocity(x, sigma, *network)

    return substep


def by_substep(substep: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def rollout(x: Tensor, sigmas: Tensor, *network: Any) -> Tensor:
        levels = [level.contiguous() for level in sigmas.unbind(1)]  # strides that no count of substeps changes
        for sigma, sigma_next in pairwise(levels):
            x = substep(x, sigma, sigma_next, *network)
        return x

    return rollout


def wrapped_textbook(run: Run, wrap: Wrap) -> Run:
    """`run` with the textbook's velocity, and each Euler substep, wrapped.

    A whole rollout is not: its loop would be unrolled, and compiling 37 substeps takes minutes.
    """
    originals: dict[str, Callable[..., Tensor]] = {"gm": gm_reference.gm_velocity, "dx": dx_reference.dx_velocity}
    velocities = {family: wrap(velocity) for family, velocity in originals.items()}
    substeps = {family: wrap(euler_substep(velocity)) for family, velocity in originals.items()}

    def wrapped(**problem: Any) -> Tensor:
        with textbook_replaced(velocities, substeps):
            return run(**problem)

    return wrapped


def compiled(run: Run, backend: str = "inductor") -> Run:
    return wrapped_textbook(run, functools.partial(torch.compile, fullgraph=True, dynamic=False, backend=backend))


def checkpointed(run: Run) -> Run:
    """Of each substep nothing is kept but the state; the backward pass computes the rest again."""

    def wrap(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return functools.partial(checkpoint, function, use_reentrant=False)

    return wrapped_textbook(run, wrap)


def graphed(run: Run, problem: dict[str, Any], leaves: Sequence[str]) -> Run:
    """`run` captured in CUDA graphs for this very problem: one for the forward pass and, with leaves, one backward."""
    if not leaves:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            run(**problem)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            result = run(**problem)

        def replay(**_: Any) -> Tensor:
            graph.replay()
            return result

        return replay

    fixed = {name: value for name, value in problem.items() if name not in leaves}
    samples = tuple(problem[name].detach().clone().requires_grad_() for name in leaves)
    function: Any = torch.cuda.make_graphed_callables(
        lambda *values: run(**fixed, **dict(zip(leaves, values))), samples
    )
    return lambda **problem: function(*(problem[name] for name in leaves))


def scheduler_step(scheduler: Any) -> Run:
    """The first step of a diffusers-style scheduler for DX, with its timesteps set."""

    def step(x_start: Tensor, grid: Tensor, **_: Any) -> Tensor:
        scheduler.set_begin_index(0)
        scheduler._step_index = None
        return scheduler.step(grid.flatten(-2), scheduler.timesteps[0], x_start).prev_sample

    return step
