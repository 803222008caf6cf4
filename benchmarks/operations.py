"""What the suites measure: an operation on a problem, by every candidate that can do it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import PiflowScheduler
from torch import Tensor

from benchmarks.candidates import Graphed, Run, checkpointed, compiled, scheduler_step, textbook
from benchmarks.roofline import Work
from benchmarks.shapes import (
    DX_SHAPES,
    GM_SHAPES,
    DXShape,
    GMShape,
    dx_backward_work,
    dx_work,
    gm_backward_work,
    gm_work,
)
from piflow.distillation import ImitationConfig, SegmentDraws, SourceTimes, imitation_segment
from piflow.noise_schedule import NoiseSchedule
from piflow.policies import DXPolicy, GMFlowPolicy
from piflow.schedulers import FusedPiflowScheduler
from piflow_kernels import dx_rollout, gm_rollout

GM_LEAVES = ("x_start", "x_src", "means", "logstds", "logweights")
DX_LEAVES = ("x_start", "x_src", "grid")
REFERENCE, DIFFUSERS = "reference", "diffusers"
AT_SOURCE = 2
"""States that move where x_start is x_src: it and the result."""
WINDOW_SUBSTEPS = 3
"""Substeps that training differentiates: `window_substeps` of the recipes."""


@dataclass(frozen=True)
class Operation:
    """candidates: the textbook ("reference") first; leaves: what is differentiated, () for the forward pass alone.

    Samples are independent: tensors of the problem have the batch on their first axis, and so has the result.
    """

    name: str
    n_steps: float
    problem: dict[str, Any]
    candidates: dict[str, Run]
    leaves: tuple[str, ...] = ()
    forward: Work | None = None
    backward: Work | None = None

    @property
    def batch(self) -> int:
        return len(self.problem["x_src"])

    def samples(self, index: Tensor) -> dict[str, Any]:
        """The problem of some samples."""
        return {n: v[index.to(v.device)] if isinstance(v, Tensor) else v for n, v in self.problem.items()}


Builder = Callable[[int], Operation]
"""Makes the operation for a batch, which may be smaller than that of the model."""


@dataclass(frozen=True)
class Case:
    """Operations of one model's shapes, and the batch it names."""

    suite: str
    name: str
    batch: int
    builders: tuple[Builder, ...]


def candidates(
    run: Callable[..., Run],
    leaves: tuple[str, ...],
    device: str,
    peers: dict[str, Run] | None = None,
    inductor: bool = True,
    checkpointing: bool = False,
) -> dict[str, Run]:
    """The textbook and other ways to run it, other peers, ours; `run` takes the backend.

    CUDA graphs come last: a capture that fails spoils the process for what follows.
    """
    formula, ours = run(backend="reference"), run(backend=None)
    found = {REFERENCE: textbook(formula)}
    if checkpointing:
        found["reference, checkpointed"] = checkpointed(formula)
    found |= {"reference, torch.compile": compiled(formula), **(peers or {}), "ours": ours}
    if device != "cpu":
        return found | {
            "reference, CUDA graph": Graphed(found[REFERENCE], leaves),
            "ours, CUDA graph": Graphed(ours, leaves),
        }
    return found | ({"ours, inductor": run(backend="inductor")} if inductor else {})


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def gm_operator(shape: GMShape, gradients: bool, dtype: torch.dtype, device: str, batch: int) -> Operation:
    shape = dataclasses.replace(shape, batch=batch, n_steps=WINDOW_SUBSTEPS if gradients else shape.n_steps)
    problem, leaves = shape.problem(dtype, device), GM_LEAVES if gradients else ()

    def run(backend: Any) -> Run:
        return lambda **problem: gm_rollout(**problem, backend=backend)

    works = gm_work(shape, dtype, 3 if gradients else AT_SOURCE), gm_backward_work(shape, dtype)
    return Operation("gm_rollout", shape.n_steps, problem, candidates(run, leaves, device), leaves, *works)


def dx_operator(shape: DXShape, gradients: bool, dtype: torch.dtype, device: str, batch: int) -> Operation:
    shape = dataclasses.replace(shape, batch=batch)
    problem, leaves = shape.problem(dtype, device), DX_LEAVES if gradients else ()

    def run(backend: Any) -> Run:
        return lambda **problem: dx_rollout(**problem, backend=backend)

    # diffusers has one state where the operator has x_start and x_src
    peers = {} if gradients else {DIFFUSERS: diffusers_step(device)}
    found = candidates(run, leaves, device, peers, inductor=False)
    works = dx_work(shape, dtype, 3 if gradients else AT_SOURCE), dx_backward_work(shape, dtype)
    return Operation("dx_rollout", shape.n_steps, problem, found, leaves, *works)


def diffusers_step(device: str, scheduler_class: type[PiflowScheduler] = PiflowScheduler) -> Run:
    """The first of 10 steps, with the configuration of the published distilled checkpoints."""
    scheduler = scheduler_class(shift=5.0, n_grid=10)
    scheduler.set_timesteps(10, device=device)
    return scheduler_step(scheduler)


# ---------------------------------------------------------------------------------------------------------------------
# Policies, as samplers and trainers call them


def packed(shape: GMShape, problem: dict[str, Any]) -> dict[str, Any]:
    """The problem in tokens of 2 x 2 pixels, as FLUX and Qwen transformers emit it."""
    rows, columns = shape.spatial[0] // 2, shape.spatial[1] // 2

    def tokens(value: Tensor) -> Tensor:
        *lead, c, _, _ = value.shape
        value = value.reshape(*lead, c, rows, 2, columns, 2)
        order = [*range(len(lead)), *(len(lead) + axis for axis in (1, 3, 0, 2, 4))]
        return value.permute(order).reshape(*lead, rows * columns, c * 4)

    states = dict.fromkeys(("x_start", "x_src"), tokens(problem["x_src"]))
    network = {name: tokens(problem[name]).transpose(1, 2).contiguous() for name in ("means", "logweights")}
    return {**problem, **states, **network}


def gm_policy_rollout(shape: GMShape, dtype: torch.dtype, device: str, batch: int) -> Operation:
    """A segment of the sampler at temperature 0.3, in the layout of the transformer's output."""
    shape = dataclasses.replace(shape, batch=batch)
    problem = shape.problem(dtype, device)
    problem = packed(shape, problem) if shape.packed else problem
    layout: Any = "packed" if shape.packed else "spatial"

    def run(backend: Any) -> Run:
        def rollout(x_start: Tensor, sigmas: Tensor, x_src: Tensor, sigma_src: Tensor, **network: Any) -> Tensor:
            options: dict[str, Any] = {"temperature": 0.3, "layout": layout, "backend": backend}
            policy = GMFlowPolicy(**network, x_src=x_src, sigma_src=sigma_src, **options)
            return policy.rollout(x_start, sigmas)

        return rollout

    work = gm_work(shape, dtype, AT_SOURCE)
    return Operation("GMFlowPolicy.rollout", shape.n_steps, problem, candidates(run, (), device), (), work)


def gm_policy_loss(shape: GMShape, dtype: torch.dtype, device: str, batch: int, training: bool = False) -> Operation:
    """The loss that training differentiates, over a window of 3 substeps."""
    shape = dataclasses.replace(shape, batch=batch, n_steps=WINDOW_SUBSTEPS)
    problem = shape.problem(dtype, device)
    problem["target"] = 0.5 * problem["x_src"].flip(-1)

    def run(backend: Any) -> Run:
        def loss(
            x_start: Tensor, sigmas: Tensor, x_src: Tensor, sigma_src: Tensor, target: Tensor, **network: Any
        ) -> Tensor:
            policy = GMFlowPolicy(**network, x_src=x_src, sigma_src=sigma_src, backend=backend)
            return policy.mean_velocity_loss(x_start, sigmas, target)

        return loss

    leaves = ("means", "logstds", "logweights")
    found = candidates(run, leaves, device, checkpointing=training)
    works = gm_work(shape, dtype, 2), gm_backward_work(shape, dtype, 2)  # the source's state and the target
    return Operation("GMFlowPolicy.mean_velocity_loss", shape.n_steps, problem, found, leaves, *works)


def dx_policy_step(shape: DXShape, dtype: torch.dtype, device: str, batch: int) -> Operation:
    """A step of the scheduler in diffusers' pipeline, ours in its place."""
    shape = dataclasses.replace(shape, batch=batch)
    problem = shape.problem(dtype, device)

    def run(backend: Any) -> Run:
        if backend is None:
            return diffusers_step(device, FusedPiflowScheduler)

        def step(x_start: Tensor, sigmas: Tensor, x_src: Tensor, sigma_src: Tensor, **grid: Any) -> Tensor:
            return DXPolicy(x_src=x_src, sigma_src=sigma_src, backend=backend, **grid).rollout(x_start, sigmas)

        return step

    found = candidates(run, (), device, {DIFFUSERS: diffusers_step(device)}, inductor=False)
    return Operation("PiflowScheduler.step", shape.n_steps, problem, found, (), dx_work(shape, dtype, AT_SOURCE))


# ---------------------------------------------------------------------------------------------------------------------
# Training


def imitation(shape: GMShape, dtype: torch.dtype, device: str, batch: int) -> Operation:
    """The policy's part of a pi-ID step of the ImageNet recipe halfway through the decay of the teacher's share.

    All of `imitation_segment` with a teacher whose velocity costs nothing: rollouts to two states, two windows with
    gradients. The times are drawn once. Components lie closer together than noise: rollouts through components as far
    apart as that amplify rounding until no candidate can be told from another.
    """
    shape = dataclasses.replace(shape, batch=batch)
    problem = shape.problem(dtype, device)
    g = torch.Generator().manual_seed(1)
    problem = {name: problem[name] for name in ("x_src", "means", "logstds", "logweights")} | {
        "means": problem["means"][:, :1] + 0.3 * problem["means"],
        "target": 0.5 * problem["x_src"].flip(-1),
        "student": torch.rand(batch, 2, generator=g),
        "teacher": torch.rand(batch, 1, generator=g),
        "dropout": torch.rand(batch, shape.k, generator=g).to(device),
    }
    config = ImitationConfig(nfe=1, total_substeps=128, num_intermediate_states=2, policy_dropout=0.05)

    def run(backend: Any) -> Run:
        def losses(
            x_src: Tensor, target: Tensor, student: Tensor, teacher: Tensor, dropout: Tensor, **network: Any
        ) -> Tensor:
            ones = torch.ones(len(x_src))
            policy = GMFlowPolicy(**network, x_src=x_src, sigma_src=ones.to(x_src), backend=backend)
            result = imitation_segment(
                policy, lambda x_t, sigma: target.to(x_t), SourceTimes(ones, ones, ones), NoiseSchedule(), config,
                teacher_ratio=0.5, draws=SegmentDraws(student, teacher, dropout),
            )  # fmt: skip
            return result.losses.T

        return losses

    leaves = ("means", "logstds", "logweights")
    found = candidates(run, leaves, device, checkpointing=True)
    rolled, window = (dataclasses.replace(shape, n_steps=n) for n in (21, 32))  # on average, of two each
    forward = 2 * (gm_work(rolled, dtype) + gm_work(window, dtype))
    backward = 2 * gm_backward_work(window, dtype, 3)
    return Operation("imitation_segment", 2 * (21 + 32), problem, found, leaves, forward, backward)


# ---------------------------------------------------------------------------------------------------------------------
# Suites


INFERENCE = ("qwen-image-1024", "flux-1024", "flux-2-1024", "imagenet-256-batch-1", "imagenet-256-batch-512")
TRAINING = ("imagenet-256-batch-64", "imagenet-256-batch-512")


def cases(suite: str, device: str, dtype: torch.dtype, tiny: bool = False) -> list[Case]:
    """Of one suite ("kernels", "policies", "training"), in the order in which they run.

    tiny: at most 2 samples of 4 pixels an axis and 4 substeps of GM, with the same components and channels.
    """
    setting = {"dtype": dtype, "device": device}
    gm = {name: GM_SHAPES[name] for name in INFERENCE}

    def case(name: str, shape: GMShape | DXShape, *builders: Callable[..., Operation]) -> Case:
        shape = shrunk(shape) if tiny else shape
        bound = [lambda batch, build=build: build(shape, batch=batch, **setting) for build in builders]
        return Case(suite, name, shape.batch, tuple(bound))

    if suite == "training":
        training = {name: GM_SHAPES[name] for name in TRAINING}
        loss: Builder = lambda shape, **rest: gm_policy_loss(shape, training=True, **rest)  # noqa: E731
        return [case(name, shape, loss, imitation) for name, shape in training.items()]

    def passes(build: Callable[..., Operation]) -> list[Callable[..., Operation]]:
        return [
            lambda shape, gradients=gradients, **rest: build(shape, gradients, **rest) for gradients in (False, True)
        ]

    if suite == "kernels":
        return [case(name, shape, *passes(gm_operator)) for name, shape in gm.items()] + [
            case(name, shape, *passes(dx_operator)) for name, shape in DX_SHAPES.items()
        ]
    return [case(name, shape, gm_policy_rollout, gm_policy_loss) for name, shape in gm.items()] + [
        case(name, shape, dx_policy_step) for name, shape in DX_SHAPES.items()
    ]


def shrunk(shape: GMShape | DXShape) -> GMShape | DXShape:
    spatial = tuple(min(size, 4) for size in shape.spatial)
    n_steps = min(shape.n_steps, 4) if isinstance(shape, GMShape) else shape.n_steps  # a scheduler has its own
    return dataclasses.replace(shape, batch=min(shape.batch, 2), spatial=spatial, n_steps=n_steps)
