"""Every kernel specialisation that the launch rule can choose, found by launching on tensors without storage.

A launch on `meta` tensors goes through the same rule as one on a GPU; the kernel itself is not run, but what it would
be called with is kept. Triton makes of that a specialisation: types, constants, integers that are 1 or divisible by 16.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks.static_analysis import Request
from piflow_kernels.configs import FAMILIES, next_power_of_2
from piflow_kernels.dx import launch as dx
from piflow_kernels.gm import launch as gm

Layout = Literal["spatial", "packed", "strided"]
Direction = Literal["forward", "backward"]

BATCH = 2
SUB_PIXELS = 4
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
    torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Specialisation:
    """A kernel as it is compiled for one launch.

    layout "strided": odd sizes and strides, addresses of no alignment. k: components, or points of a DX grid.
    needed: multiply-adds per pixel and substep that the algebra needs, where the gate holds the kernel to them.
    Further fields as of `benchmarks.static_analysis.Request`.
    """

    op: str
    policy: str
    direction: Direction
    space: str | None
    layout: Layout
    dtype: str
    k: int
    c: int
    n_steps: int
    needed: int | None
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: frozenset[str]
    num_warps: int
    maxnreg: int | None
    block: int | None
    substeps: str | int
    fp_fusion: bool = True

    def request(self, capability: int) -> Request:
        return Request(
            self.kernel, self.signature, self.constants, self.divisible, self.num_warps, capability, self.block,
            self.substeps, self.fp_fusion, self.maxnreg,
        )  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel and what it was called with, by the names of its arguments."""

    kernel: JITFunction
    arguments: dict[str, Any]
    num_warps: int
    maxnreg: int | None


@contextlib.contextmanager
def recorded_launches(capability: int) -> Iterator[list[Launch]]:
    """Kernels called inside are not run but kept in the list; devices are taken for GPUs of this capability."""
    launches: list[Launch] = []

    def record(
        self: JITFunction,
        *values: Any,
        grid: Any,
        warmup: bool,
        num_warps: int = 4,
        maxnreg: int | None = None,
        **named: Any,
    ) -> None:
        launches.append(Launch(self, dict(zip(self.arg_names, values)) | named, num_warps, maxnreg))

    run, default = JITFunction.run, FAMILIES["default"]
    JITFunction.run, FAMILIES["default"] = record, FAMILIES[f"sm_{capability}"]
    try:
        yield launches
    finally:
        JITFunction.run, FAMILIES["default"] = run, default


def specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], frozenset[str]]:
    """Signature, constants and arguments divisible by 16, by Triton's rule."""
    signature, constants, divisible = {}, {}, set()
    for parameter in launch.kernel.params:
        name, value = parameter.name, launch.arguments[parameter.name]
        if isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif (
            parameter.is_constexpr
            or value is None
            or (type(value) is int and value == 1 and not parameter.do_not_specialize)
        ):
            signature[name], constants[name] = "constexpr", value
            continue
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        if aligned and not parameter.do_not_specialize_on_alignment:
            divisible.add(name)
    return signature, constants, frozenset(divisible)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors as callers lay them out


def empty(*shape: int, dtype: torch.dtype, strided: bool = False) -> Tensor:
    if strided:
        return torch.empty(*shape[:-1], 3 * shape[-1] + 2, dtype=dtype, device="meta")[..., 1::3]
    return torch.empty(*shape, dtype=dtype, device="meta")


def gm_arguments(layout: Layout, dtype: str, k: int, c: int, n_steps: int, fused_loss: bool) -> gm.Rollout:
    f32 = torch.float32
    if layout == "packed":
        p, tokens = SUB_PIXELS, 1024
        means = empty(BATCH, tokens, k, c * p, dtype=DTYPES[dtype]).unflatten(-1, (c, p)).permute(0, 2, 3, 1, 4)
        logweights = empty(BATCH, tokens, k, p, dtype=DTYPES[dtype]).permute(0, 2, 1, 3).unsqueeze(2)
        state = empty(BATCH, tokens, c * p, dtype=f32).unflatten(-1, (c, p)).movedim(1, 2)
    else:
        strided = layout == "strided"
        size = (33, 33) if strided else (64, 64)
        means = empty(BATCH, k, c, *size, dtype=DTYPES[dtype], strided=strided)
        logweights = empty(BATCH, k, 1, *size, dtype=DTYPES[dtype], strided=strided)
        state = empty(BATCH, c, *size, dtype=f32, strided=strided)
    sigmas, per_sample = empty(BATCH, n_steps + 1, dtype=f32), empty(BATCH, dtype=f32)
    local = empty(BATCH, dtype=torch.bool) if fused_loss else None
    keep = empty(BATCH, k, dtype=torch.bool) if fused_loss else None
    return gm.Rollout(
        x_start=state, sigmas=sigmas, local=local, x_src=state, sigma_src=per_sample, means=means, logstds=per_sample,
        logweights=logweights, keep=keep, target=state if fused_loss else None, temperature=1.0, eps=1e-6,
        min_delta=1e-4 if fused_loss else None,
    )  # fmt: skip


def dx_arguments(layout: Layout, dtype: str, n: int, c: int, n_steps: int, fused_loss: bool) -> dx.Rollout:
    size = (8, 60, 108)
    if layout == "packed":
        grid = empty(BATCH, *size, n, c, dtype=DTYPES[dtype]).movedim((-2, -1), (1, 2))
        state = empty(BATCH, *size, c, dtype=torch.float32).movedim(-1, 1)
    else:
        strided = layout == "strided"
        grid = empty(BATCH, n, c, *size, dtype=DTYPES[dtype], strided=strided)
        state = empty(BATCH, c, *size, dtype=torch.float32, strided=strided)
    sigmas, per_sample = empty(BATCH, n_steps + 1, dtype=torch.float32), empty(BATCH, dtype=torch.float32)
    return dx.Rollout(
        x_start=state, sigmas=sigmas, local=None, x_src=state, sigma_src=per_sample, grid=grid,
        segment_size=per_sample, shift=per_sample, target=state if fused_loss else None, mode="grid", eps=1e-6,
        min_delta=1e-4 if fused_loss else None,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What is launched


def needed_multiply_adds(space: str, k: int, c: int) -> int:
    """Of one substep, per pixel (docs/collapses.md): Gram K^2, channel 2 K C, and 8 K each.

    Channel space works on tiles of a power of two of components. Streamed, what is not kept is computed again: the
    difference from the mean and the square of each velocity, K C each.
    """
    if space == "channel":
        k = next_power_of_2(k)
    return {"gram": k * k, "channel": 2 * k * c, "streamed": 4 * k * c}[space] + 8 * k


Case = tuple[Layout, str, int, int, int, bool]
"""Layout, dtype of the network output, K (grid points), C, substeps, whether the loss is fused."""

REQUIRED = [(8, 16), (32, 4), (16, 16), (8, 64)]
EXTREME = [(1, 4), (1, 16), (8, 1), (8, 128), (5, 3), (64, 128)]
SUBSTEPS: dict[Direction, tuple[int, ...]] = {"forward": (1, 37), "backward": (1, 3, 4, 37)}
LAYOUTS: tuple[Layout, ...] = ("spatial", "packed")


def gm_cases(direction: Direction, thorough: bool) -> Iterator[Case]:
    *short, long = SUBSTEPS[direction]
    for k, c in REQUIRED:
        for layout, dtype in itertools.product(LAYOUTS, ("bf16", "fp32")):
            yield layout, dtype, k, c, long, False
        for n_steps in short:
            yield "spatial", "bf16", k, c, n_steps, False
        yield "packed", "bf16", k, c, 3, True
        if thorough:
            yield "spatial", "fp16", k, c, long, False
            yield "strided", "bf16", k, c, long, False
    for k, c in EXTREME:
        yield "spatial", "bf16", k, c, long, False
        yield "spatial", "fp32", k, c, 3, True


def dx_cases(thorough: bool) -> Iterator[Case]:
    for n in (1, 10, 20):
        for layout, dtype in itertools.product(LAYOUTS, ("bf16", "fp32")):
            yield layout, dtype, n, 16, 13, False
        yield "packed", "bf16", n, 16, 3, True
        if thorough:
            yield "strided", "bf16", n, 16, 13, False


def launch_gm(direction: Direction, case: Case) -> None:
    r = gm_arguments(*case)
    if direction == "forward":
        gm.gm_integrate(r)
    else:
        gm.gm_integrate_backward(r.x_start if r.target is None else r.sigma_src, r)


def launch_dx(direction: Direction, case: Case) -> None:
    r = dx_arguments(*case)
    if direction == "forward":
        dx.dx_integrate(r)
    else:
        dx.dx_integrate_backward(r.x_start if r.target is None else r.sigma_src, r)


def launched(capability: int, policy: str, direction: Direction, case: Case) -> Iterator[Specialisation]:
    """The specialisations of all kernels that one call launches."""
    layout, dtype, k, c, n_steps, fused_loss = case
    with recorded_launches(capability) as launches:
        (launch_gm if policy == "gm" else launch_dx)(direction, case)
    for launch in launches:
        signature, constants, divisible = specialise(launch)
        name = launch.kernel.__name__
        per_pixel = "coefficients" not in name
        space = next((form for form in ("gram", "channel", "streamed") if form in name), None)
        result = "mean_velocity_loss" if fused_loss else "velocity" if n_steps == 1 else "rollout"
        # A single component needs no substeps in Gram space, and its forward kernel holds no loop over them.
        loops = k > 1 or (space, direction) != ("gram", "forward")
        yield Specialisation(
            op=f"{policy}_{result}" if per_pixel else f"{policy}_coefficients",
            policy=policy, direction=direction, space=space, layout=layout, dtype=dtype, k=k, c=c, n_steps=n_steps,
            needed=needed_multiply_adds(space, k, c) if space and direction == "forward" and loops else None,
            kernel=f"{launch.kernel.__module__}:{name}", signature=signature, constants=constants, divisible=divisible,
            num_warps=launch.num_warps, maxnreg=launch.maxnreg, block=constants["BLOCK"] if per_pixel else None,
            substeps=substeps_of(space, constants) if loops else 1,
        )  # fmt: skip


def substeps_of(space: str | None, constants: dict[str, Any]) -> str | int:
    """How a kernel goes over substeps: in a loop; a streamed adjoint's WINDOW written out; DX in one pass for all."""
    if space is None:
        return 1
    return constants.get("WINDOW") or "n_steps"


def specialisations(capability: int) -> list[Specialisation]:
    """Of all operators on GPUs of one capability. Where several calls launch the same, the first one names it.

    float16, odd strides and the other setting of floating-point fusion change little; sm_90 stands for all there.
    """
    thorough = capability == 90
    found: dict[str, Specialisation] = {}
    directions: tuple[Direction, ...] = ("forward", "backward")
    for direction in directions:
        for policy, cases in (("gm", gm_cases(direction, thorough)), ("dx", dx_cases(thorough))):
            for case in cases:
                for each in launched(capability, policy, direction, case):
                    compiled_as = (each.kernel, each.signature, each.constants, sorted(each.divisible), each.num_warps)
                    found.setdefault(repr(compiled_as), each)
    # The other setting of Triton's floating-point fusion, where only what is written as fma is one.
    unfused = [
        replace(each, fp_fusion=False, needed=None)
        for each in found.values()
        if thorough
        and (each.k, each.c) in REQUIRED
        and (each.layout, each.dtype) == ("spatial", "bf16")
        and each.policy == "gm"
    ]
    return [*found.values(), *unfused]
