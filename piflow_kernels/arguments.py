"""From what callers pass to what the implementations take: shapes, dtypes, layouts, levels, backends.

Canonical form: states (B, C, *S), network outputs (B, K, C, *S), per-sample scalars (B,), noise levels (B, N + 1).
The packed token layout is brought there by views, so nothing is copied.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["reference", "torch", "inductor", "triton"]
Layout = Literal["spatial", "packed"]

BACKENDS = ("reference", "torch", "inductor", "triton")
LAYOUTS = ("spatial", "packed")
STATE_DTYPES = (torch.float32, torch.float64)
NETWORK_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LEVEL_TOLERANCE = 1e-6
CPU = torch.device("cpu")


def check_strided(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise ValueError(f"{name}: expected a dense tensor, got a {kind} one")


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...], device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
    check_strided(name, value)
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: expected dtype {names}, got {str(value.dtype).removeprefix('torch.')}")
    if value.device != device:
        raise ValueError(
            f"{name}: expected a tensor on {device}, where the network output is, got one on {value.device}"
        )
    return value


def check_network(name: str, value: object) -> Tensor:
    """The network output whose device all other tensors must be on."""
    return check_tensor(name, value, NETWORK_DTYPES, value.device if isinstance(value, Tensor) else CPU)


def check_state(name: str, value: object, shape: tuple[int, ...], device: torch.device) -> Tensor:
    state = check_tensor(name, value, STATE_DTYPES, device)
    if shape_of(state) != shape:
        raise ValueError(f"{name}: expected shape {shape} to match the network output, got {shape_of(state)}")
    return state


def computing_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where anything is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def per_sample(name: str, value: float | Tensor, batch: int, device: torch.device) -> Tensor:
    """A scalar per sample, (B,), from a float, a 0-d tensor, (B,), (1,) or anything like (B, 1, ...).

    In the caller's dtype: everything derived from it is computed in float64, where it is derived.
    """
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name}: expected a number or a tensor, got {value!r}")
        return torch.full((batch,), float(value), dtype=torch.float64, device=device)
    check_strided(name, value)
    if not value.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    if value.device != device and (value.dim() > 0 or value.device.type != "cpu"):
        raise ValueError(
            f"{name}: expected a tensor on {device}, where the network output is, got one on {value.device}"
        )
    leading = value.shape[0] if value.dim() else 1
    if value.numel() != leading or leading not in (1, batch):
        raise ValueError(
            f"{name}: expected one value per sample, ({batch},) or ({batch}, 1, ...), got {shape_of(value)}"
        )
    if value.device != device:
        value = value.to(device)
    if value.dim() != 1:
        value = value.reshape(leading)
    return value if leading == batch else value.expand(batch)


def constant(tensor: Tensor) -> Tensor:
    """Outside of differentiation, as noise levels are."""
    return tensor.detach() if tensor.requires_grad else tensor


def noise_levels(sigmas: Tensor, batch: int, device: torch.device) -> Tensor:
    """Levels visited by a rollout, (N + 1,), (1, N + 1) or (B, N + 1): (B, N + 1)."""
    if not isinstance(sigmas, Tensor) or not sigmas.is_floating_point():
        came = sigmas.dtype if isinstance(sigmas, Tensor) else type(sigmas).__name__
        raise ValueError(f"sigmas: expected a floating-point tensor of noise levels, got {came}")
    check_strided("sigmas", sigmas)
    if sigmas.device != device:
        raise ValueError(
            f"sigmas: expected a tensor on {device}, where the network output is, got one on {sigmas.device}"
        )
    if sigmas.dim() not in (1, 2) or sigmas.shape[-1] < 1 or (sigmas.dim() == 2 and sigmas.shape[0] not in (1, batch)):
        raise ValueError(
            f"sigmas: expected (N + 1,), (1, N + 1) or ({batch}, N + 1) with at least one level, got {shape_of(sigmas)}"
        )
    return sigmas if sigmas.shape == (batch, sigmas.shape[-1]) else sigmas.expand(batch, sigmas.shape[-1])


def check_number(name: str, value: object, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number, at least {least:g}, got {value!r}")
    return float(value)


def check_positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive finite number, got {value!r}")
    return float(value)


def check_level_values(name: str, sigma: Tensor) -> None:
    """Raise unless all levels are in [0, 1] (to 1e-6). Reads values: synchronises on a GPU."""
    inside = (sigma >= -LEVEL_TOLERANCE) & (sigma <= 1 + LEVEL_TOLERANCE)  # NaN compares false
    if not bool(inside.all()):
        raise ValueError(
            f"{name}: expected noise levels within [0, 1] and no NaN, got {sigma[~inside].flatten()[0].item()}"
        )


def check_rollout_values(sigmas: Tensor, sigma_src: Tensor) -> None:
    """Raise unless the levels descend from at most sigma_src. Reads values: synchronises on a GPU."""
    check_level_values("sigmas", sigmas)
    check_level_values("sigma_src", sigma_src)
    above = sigmas[:, 0] > sigma_src + LEVEL_TOLERANCE
    if bool(above.any()):
        i = int(above.nonzero()[0])
        raise ValueError(
            f"sigmas: expected sigmas[:, 0] <= sigma_src, but sample {i} starts at {sigmas[i, 0].item():.7g} "
            f"with sigma_src {sigma_src[i].item():.7g}"
        )
    rising = sigmas.diff(dim=1) > LEVEL_TOLERANCE
    if bool(rising.any()):
        i, n = rising.nonzero()[0].tolist()
        raise ValueError(
            f"sigmas: expected non-increasing levels, but sample {i} goes from {sigmas[i, n].item():.7g} "
            f"up to {sigmas[i, n + 1].item():.7g} at substep {n}"
        )


def check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")


def resolve_backend(backend: Backend | None, device: torch.device, dtype: torch.dtype) -> Backend:
    """What runs; raises where a forced backend cannot."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected None or one of {BACKENDS}, got {backend!r}")
    if backend is None:
        backend = "triton" if device.type in ("cuda", "xpu") and dtype == torch.float32 else "torch"
    reason = None
    if backend in ("triton", "inductor") and dtype == torch.float64:
        reason = "it computes in float32, but an input is float64"
    elif backend == "triton":
        from .launch import why_triton_cannot_run

        reason = why_triton_cannot_run(device)
    elif backend == "inductor" and device.type != "cpu":
        reason = f"it compiles for the CPU, but tensors are on {device}"
    if reason is not None:
        raise ValueError(f"backend: {backend!r} cannot run here: {reason}; use backend='torch'")
    return backend


def check_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {type(value).__name__}")
    return value


def check_values(sigmas: Tensor, sigma_src: Tensor, anywhere: bool, check: bool) -> None:
    """Check levels on the CPU, or where asked to; a velocity may be asked `anywhere`, also above sigma_src."""
    if sigmas.device.type != "cpu" and not check:
        return
    if anywhere:
        check_level_values("sigma_t", sigmas)
        check_level_values("sigma_src", sigma_src)
    else:
        check_rollout_values(sigmas, sigma_src)


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise ValueError(f"{name}: expected a bool tensor {shape}, got {type(mask).__name__}")
    check_strided(name, mask)
    if mask.dtype != torch.bool or shape_of(mask) != shape or mask.device != device:
        raise ValueError(
            f"{name}: expected a bool tensor {shape} on {device}, got {mask.dtype} {shape_of(mask)} on {mask.device}"
        )
    return mask
