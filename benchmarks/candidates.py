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
            setattr(module, f"{family}_velocity", in_planes(velocities[family]))
            setattr(module, f"{family}_rollout", in_planes(by_substep(substeps[family])))
        yield
    finally:
        for (family, name), function in before.items():
            setattr(modules[family], f"{family}_{name}", function)


def in_planes(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` on contiguous tensors: tokens are unpacked once, as anybody who writes the textbook does.

    On strided views of them it takes several times as long, and compiled a hundred times.
    """

    def unpacked(*arguments: Any) -> Tensor:
        return function(*(each.contiguous() if isinstance(each, Tensor) else each for each in arguments))

    return unpacked


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


def textbook(run: Run) -> Run:
    """`run` with the textbook as it stands, on contiguous tensors."""
    return wrapped_textbook(run, lambda function: function)


def compiled(run: Run, backend: str = "inductor") -> Run:
    return wrapped_textbook(run, functools.partial(torch.compile, fullgraph=True, dynamic=False, backend=backend))


def checkpointed(run: Run) -> Run:
    """Of each substep nothing is kept but the state; the backward pass computes the rest again."""

    def wrap(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return functools.partial(checkpoint, function, use_reentrant=False)

    return wrapped_textbook(run, wrap)


class Graphed:
    """A run captured in CUDA graphs at its first call, for the very tensors of that call, and replayed afterwards.

    One graph for the forward pass and, where tensors require gradients, one for the backward pass.
    """

    def __init__(self, run: Run, leaves: Sequence[str]) -> None:
        self.run, self.leaves = run, leaves
        self.replay: Run | None = None

    def __call__(self, **problem: Any) -> Tensor:
        if self.replay is None:
            self.replay = self._with_backward(problem) if self.leaves else self._forward(problem)
        return self.replay(**problem)

    def _forward(self, problem: dict[str, Any]) -> Run:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            for _ in range(3):
                self.run(**problem)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            result = self.run(**problem)

        def replay(**_: Any) -> Tensor:
            graph.replay()
            return result

        return replay

    def _with_backward(self, problem: dict[str, Any]) -> Run:
        """Leaves are the graph's own inputs: where a call passes these very tensors, nothing is copied into it."""
        fixed = {name: value for name, value in problem.items() if name not in self.leaves}
        inputs = tuple(problem[name] for name in self.leaves)
        function: Any = torch.cuda.make_graphed_callables(
            lambda *values: self.run(**fixed, **dict(zip(self.leaves, values))), inputs
        )
        return lambda **problem: function(*(problem[name] for name in self.leaves))


def scheduler_step(scheduler: Any) -> Run:
    """The first step of a diffusers-style scheduler for DX, with its timesteps set."""

    def step(x_start: Tensor, grid: Tensor, **_: Any) -> Tensor:
        scheduler.set_begin_index(0)
        scheduler._step_index = None
        return scheduler.step(grid.flatten(-2), scheduler.timesteps[0], x_start).prev_sample

    return step
