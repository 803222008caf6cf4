"""Compile ahead of the first call what a shape needs, so that no request or training step waits for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .arguments import LAYOUTS, NETWORK_DTYPES, Backend, Layout, check_flag
from .dx.op import dx_mean_velocity, dx_mean_velocity_loss, dx_rollout, dx_velocity
from .gm.op import gm_mean_velocity, gm_mean_velocity_loss, gm_rollout, gm_velocity

OPERATORS: dict[str, Callable[..., Tensor]] = {
    operator.__name__: operator
    for operator in (
        gm_velocity,
        gm_rollout,
        gm_mean_velocity,
        gm_mean_velocity_loss,
        dx_velocity,
        dx_rollout,
        dx_mean_velocity,
        dx_mean_velocity_loss,
    )
}


def sizes_of(
    layout: Layout, policy: str, batch: int, points: int, channels: int, spatial: tuple[int, ...]
) -> list[tuple[int, ...]]:
    """Shapes of the network output, its logweights and the states in a layout."""
    if layout == "spatial":
        return [(batch, points, channels, *spatial), (batch, points, 1, *spatial), (batch, channels, *spatial)]
    if policy == "dx":
        return [(batch, *spatial, points, channels), (), (batch, *spatial, channels)]
    if len(spatial) != 2:
        raise ValueError(f"spatial: expected (tokens, sub_pixels) in the packed layout of a GM policy, got {spatial}")
    tokens, p = spatial
    return [(batch, tokens, points, channels * p), (batch, tokens, points, p), (batch, tokens, channels * p)]


def warmup(
    operator: str = "gm_rollout",
    *,
    components: int,
    channels: int,
    spatial: tuple[int, ...],
    batch: int = 1,
    substeps: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    layout: Layout = "spatial",
    backend: Backend | None = None,
    backward: bool = False,
) -> None:
    """Compile what later calls of an operator with these shapes run, by running it once on zeros of that size.

    Args:
        operator: name of one, such as "gm_rollout".
        components, channels: K (or grid points N) and C. spatial: spatial axes of the latents; (tokens, sub_pixels) for
            packed GM outputs. batch: samples. substeps: N of the rollout or window.
        dtype: of the network output. device, layout, backend: as in the later calls.
        backward: also compile the backward pass.

    The Triton kernels depend on K, C, dtypes and the alignment of strides, and on the count of substeps only where that
    changes the form (`piflow_kernels.configs`) or the length of a short window, so one call serves many sizes. `keep`,
    `local` and scalars in another dtype than float32 change the small kernel that makes the coefficients, no other.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if not isinstance(operator, str) or operator not in OPERATORS:
        raise ValueError(f"operator: expected one of {', '.join(OPERATORS)}, got {operator!r}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
    if not isinstance(spatial, tuple | list) or not 1 <= len(spatial) <= 3:
        raise ValueError(f"spatial: expected one to three axes, such as (128, 128), got {spatial!r}")
    spatial = tuple(spatial)
    if dtype not in NETWORK_DTYPES:
        raise ValueError(
            f"dtype: expected torch.float32, torch.bfloat16, torch.float16 or torch.float64, got {dtype!r}"
        )
    check_flag("backward", backward)
    if not isinstance(device, str | torch.device):
        raise ValueError(f"device: expected a torch.device or its name, got {device!r}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {device!r} is none that torch has here: {error}") from error
    counts = {"components": components, "channels": channels, "batch": batch, "substeps": substeps}
    for name, value in (*counts.items(), *(("spatial", size) for size in spatial)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    network, weights, state = sizes_of(layout, operator[:2], batch, components, channels, spatial)

    with torch.inference_mode(False), torch.set_grad_enabled(backward):
        run_once(operator, network, weights, state, batch, substeps, dtype, device, layout, backend, backward)


def run_once(
    operator: str,
    network: tuple[int, ...],
    weights: tuple[int, ...],
    state: tuple[int, ...],
    batch: int,
    substeps: int,
    dtype: torch.dtype,
    device: torch.device | str,
    layout: Layout,
    backend: Backend | None,
    backward: bool,
) -> None:
    def zeros(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device, requires_grad=backward)

    x = zeros(state)
    levels = torch.linspace(1, 0.5, substeps + 1, device=device)
    level = torch.ones(batch, device=device)
    if operator.endswith("velocity") and "mean" not in operator:
        levels = level
    arguments: tuple[Tensor, ...]
    if operator.startswith("gm"):
        arguments = (x, levels, x, level, zeros(network, dtype), zeros((batch,)), zeros(weights, dtype))
    else:
        arguments = (x, levels, x, level, zeros(network, dtype), level, level)
    if operator.endswith("loss"):
        arguments = (*arguments, zeros(state))
    result = OPERATORS[operator](*arguments, layout=layout, backend=backend)
    if backward:
        result.backward(torch.ones_like(result))
