"""The public GM operators: checks and choice of implementation."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arguments as arg
from ..arguments import Backend, Layout
from . import reference
from .autograd import differentiable_gm_integrate


class Mixture(NamedTuple):
    """Canonical arguments of every GM operator: what `piflow_kernels.arguments` calls so."""

    x_src: Tensor
    sigma_src: Tensor
    means: Tensor
    logstds: Tensor
    logweights: Tensor
    keep: Tensor | None
    temperature: float
    sub_pixels: int | None

    def unpack(self, state: Tensor) -> Tensor:
        """(B, T, C p) -> (B, C, T, p), a view; spatial states are canonical already."""
        return state if self.sub_pixels is None else state.unflatten(-1, (-1, self.sub_pixels)).permute(0, 2, 1, 3)

    def pack(self, state: Tensor) -> Tensor:
        return state if self.sub_pixels is None else state.permute(0, 2, 1, 3).flatten(2)


def canonical_mixture(
    x_src: Tensor,
    sigma_src: Tensor | float,
    means: Tensor,
    logstds: Tensor | float,
    logweights: Tensor,
    temperature: float | None,
    keep: Tensor | None,
    layout: Layout,
    eps: float,
) -> Mixture:
    arg.check_layout(layout)
    arg.check_positive("eps", eps)
    device = arg.check_network("means", means).device
    arg.check_tensor("logweights", logweights, arg.NETWORK_DTYPES, device)
    sub_pixels = None
    if layout == "packed":
        if means.dim() != 4:
            raise ValueError(f"means: expected (B, T, K, C p) in the packed layout, got {arg.shape_of(means)}")
        if logweights.dim() != 4 or logweights.shape[:3] != means.shape[:3] or logweights.shape[3] == 0:
            raise ValueError(
                f"logweights: expected {(*means.shape[:3], 'p')} in the packed layout, got {arg.shape_of(logweights)}"
            )
        sub_pixels = logweights.shape[-1]
        if means.shape[-1] % sub_pixels:
            raise ValueError(
                f"means: expected C p entries on the last axis, p = {sub_pixels} (logweights), got {means.shape[-1]}"
            )
        state_shape = (means.shape[0], means.shape[1], means.shape[3])
        x_src = arg.check_state("x_src", x_src, state_shape, device)
        means = means.unflatten(-1, (-1, sub_pixels)).permute(0, 2, 3, 1, 4)
        logweights = logweights.permute(0, 2, 1, 3).unsqueeze(2)
    else:
        if means.dim() not in (4, 5, 6):
            raise ValueError(f"means: expected (B, K, C, *S) with one to three spatial axes, got {arg.shape_of(means)}")
        expected = (*means.shape[:2], 1, *means.shape[3:])
        if arg.shape_of(logweights) != expected:
            raise ValueError(f"logweights: expected (B, K, 1, *S) = {expected}, got {arg.shape_of(logweights)}")
        x_src = arg.check_state("x_src", x_src, (means.shape[0], *means.shape[2:]), device)
    if means.shape[1] == 0 or means.shape[2] == 0:
        raise ValueError(f"means: expected at least one component and one channel, got {arg.shape_of(means)}")

    batch = means.shape[0]
    if temperature is not None:
        temperature = min(max(arg.check_number("temperature", temperature, least=0), eps), 1.0)
    mixture = Mixture(
        x_src=x_src,
        sigma_src=arg.constant(arg.per_sample("sigma_src", sigma_src, batch, device)),
        means=means,
        logstds=arg.per_sample("logstds", logstds, batch, device),
        logweights=logweights,
        keep=arg.check_mask("keep", keep, arg.shape_of(means)[:2], device),
        temperature=1.0 if temperature is None else temperature,
        sub_pixels=sub_pixels,
    )
    return mixture._replace(x_src=mixture.unpack(x_src))


def canonical_state(name: str, value: Tensor, mixture: Mixture, like: Tensor) -> Tensor:
    """A state with the shape of `like` (the caller's x_src), made canonical."""
    state = arg.check_state(name, value, arg.shape_of(like), mixture.means.device)
    return mixture.unpack(state)


def tempered(mixture: Mixture, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """logstds and logweights of the mixture at its temperature and without the dropped components, in `dtype`."""
    logstds = mixture.logstds.to(torch.float64) + 0.5 * math.log(mixture.temperature)
    logweights = mixture.logweights.to(dtype) / mixture.temperature
    if mixture.keep is not None:
        keep = mixture.keep | ~mixture.keep.any(dim=1, keepdim=True)
        logweights = logweights.masked_fill(~keep.reshape(*keep.shape, *[1] * (logweights.dim() - 2)), -torch.inf)
    return logstds.to(dtype), logweights


def integrate(
    x_start: Tensor,
    sigmas: Tensor,
    local: Tensor | None,
    mixture: Mixture,
    eps: float,
    min_delta: float | None,
    backend: Backend | None,
    check: bool,
    target: Tensor | None = None,
) -> Tensor:
    """Dispatch of every GM operator; x_start and target are canonical, the result in the caller's layout or (B,)."""
    dtype = arg.computing_dtype(x_start, mixture.x_src, mixture.means, *(() if target is None else (target,)))
    backend = arg.resolve_backend(backend, mixture.means.device, dtype)
    arg.check_flag("check", check)
    x_start, x_src = x_start.to(dtype), mixture.x_src.to(dtype)
    target = None if target is None else target.to(dtype)
    sigmas = arg.constant(sigmas)
    if backend != "reference":
        result = differentiable_gm_integrate(
            x_start, sigmas, local, x_src, mixture.sigma_src, mixture.means, mixture.logstds, mixture.logweights,
            mixture.keep, target, mixture.temperature, eps, min_delta, backend, check,
        )  # fmt: skip
        return mixture.pack(result) if target is None else result

    arg.check_values(sigmas, mixture.sigma_src, min_delta == 0, check)
    logstds, logweights = tempered(mixture, dtype)
    sigmas = sigmas.to(torch.float64)
    network: Any = (x_src, mixture.sigma_src.to(dtype), mixture.means.to(dtype), logstds, logweights, eps)
    end = reference.gm_rollout(x_start, sigmas, *network) if sigmas.shape[1] > 1 else x_start.clone()
    if min_delta is None:
        return mixture.pack(end)
    velocity = reference.gm_velocity(x_start, sigmas[:, 0], *network)
    if min_delta > 0:
        velocity = reference.mean_velocity(x_start, end, velocity, sigmas, local, min_delta)
    return mixture.pack(velocity) if target is None else (velocity - target).square().flatten(1).mean(1)


def gm_velocity(
    x_t: Tensor,
    sigma_t: Tensor | float,
    x_src: Tensor,
    sigma_src: Tensor | float,
    means: Tensor,
    logstds: Tensor | float,
    logweights: Tensor,
    eps: float = 1e-6,
    *,
    temperature: float | None = None,
    keep: Tensor | None = None,
    layout: Layout = "spatial",
    backend: Backend | None = None,
    check: bool = False,
) -> Tensor:
    """Velocity of the GMFlow policy, u = (x_t - E[x_0 | x_t]) / sigma_t (arXiv 2510.14974; docs/collapses.md).

    Args:
        x_t: state (B, C, *S) with one to three spatial axes, or (B, T, C p) in the packed layout; float32 (float64 on
            the CPU).
        sigma_t: noise level in [0, 1], (B,) or broadcastable to (B, 1, ...); may lie above sigma_src.
        x_src, sigma_src: state and noise level at which the network was evaluated.
        means: component means in velocity space as the network predicts them, (B, K, C, *S) or packed (B, T, K, C p)
            with channel index c p + sub-pixel; float32, bfloat16, float16 (or float64).
        logstds: log standard deviation per sample, (B,) or (B, 1, 1, ...).
        logweights: (B, K, 1, *S) or packed (B, T, K, p); log-probabilities or raw logits.
        eps: lower bound of every sigma in a denominator, and of the posterior's denominator.
        temperature: below 1, sharpens the mixture (logweights / T, variance T); None or >= 1 does nothing.
        keep: (B, K) bool, components that stay (component dropout); where a sample keeps none, it keeps all.
        layout: "spatial" or "packed".
        backend: None (Triton for float32 on a GPU, else PyTorch), or one to force: "reference", "torch", "triton", or
            "inductor" (C++ for the CPU, compiled at the first call of each K and C; see `warmup`).
        check: also check the noise levels' values on a GPU, where reading them synchronises.

    Returns:
        The velocity, shaped as x_t, float32 (float64 where states or means are). Differentiable once with respect to
        means, logstds, logweights, x_src and x_t.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    mixture = canonical_mixture(x_src, sigma_src, means, logstds, logweights, temperature, keep, layout, eps)
    x_t = canonical_state("x_t", x_t, mixture, like=x_src)
    sigma = arg.per_sample("sigma_t", sigma_t, means.shape[0], means.device)
    return integrate(x_t, sigma[:, None], None, mixture, eps, 0.0, backend, check)


def gm_rollout(
    x_start: Tensor,
    sigmas: Tensor,
    x_src: Tensor,
    sigma_src: Tensor | float,
    means: Tensor,
    logstds: Tensor | float,
    logweights: Tensor,
    eps: float = 1e-6,
    *,
    temperature: float | None = None,
    keep: Tensor | None = None,
    layout: Layout = "spatial",
    backend: Backend | None = None,
    check: bool = False,
) -> Tensor:
    """End state of an Euler rollout of the GMFlow policy over the substeps of `sigmas` (docs/collapses.md).

    Args:
        x_start: state at sigmas[:, 0]; shapes and the remaining arguments as in `gm_velocity`.
        sigmas: noise levels visited, (N + 1,), (1, N + 1) or (B, N + 1); non-increasing, sigmas[:, 0] <= sigma_src,
            within [0, 1] (all to 1e-6). Equal neighbours are a substep that does nothing, so samples with fewer
            substeps share a batch.

    Returns:
        The state at sigmas[:, -1], shaped as x_start, float32 (float64 where states or means are). Differentiable once
        with respect to means, logstds, logweights, x_src and x_start.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    mixture = canonical_mixture(x_src, sigma_src, means, logstds, logweights, temperature, keep, layout, eps)
    x_start = canonical_state("x_start", x_start, mixture, like=x_src)
    levels = arg.noise_levels(sigmas, means.shape[0], means.device)
    return integrate(x_start, levels, None, mixture, eps, None, backend, check)


def gm_mean_velocity(
    x_start: Tensor,
    sigmas: Tensor,
    x_src: Tensor,
    sigma_src: Tensor | float,
    means: Tensor,
    logstds: Tensor | float,
    logweights: Tensor,
    local: Tensor | None = None,
    eps: float = 1e-6,
    min_delta: float = 1e-4,
    *,
    temperature: float | None = None,
    keep: Tensor | None = None,
    layout: Layout = "spatial",
    backend: Backend | None = None,
    check: bool = False,
) -> Tensor:
    """Mean velocity over a window, (x_start - x_end) / max(sigma_start - sigma_end, min_delta).

    Where `local` (B,) bool holds, or the first and last level are equal, the velocity at the start. Arguments, result
    and errors otherwise as in `gm_rollout`.
    """
    mixture = canonical_mixture(x_src, sigma_src, means, logstds, logweights, temperature, keep, layout, eps)
    arg.check_positive("min_delta", min_delta)
    x_start = canonical_state("x_start", x_start, mixture, like=x_src)
    levels = arg.noise_levels(sigmas, means.shape[0], means.device)
    local = arg.check_mask("local", local, (means.shape[0],), means.device)
    return integrate(x_start, levels, local, mixture, eps, min_delta, backend, check)


def gm_mean_velocity_loss(
    x_start: Tensor,
    sigmas: Tensor,
    x_src: Tensor,
    sigma_src: Tensor | float,
    means: Tensor,
    logstds: Tensor | float,
    logweights: Tensor,
    target: Tensor,
    local: Tensor | None = None,
    eps: float = 1e-6,
    min_delta: float = 1e-4,
    *,
    temperature: float | None = None,
    keep: Tensor | None = None,
    layout: Layout = "spatial",
    backend: Backend | None = None,
    check: bool = False,
) -> Tensor:
    """Mean square error of `gm_mean_velocity` against `target` over channels and space, per sample: (B,).

    Differentiable also with respect to `target`, which is shaped as x_start.
    """
    mixture = canonical_mixture(x_src, sigma_src, means, logstds, logweights, temperature, keep, layout, eps)
    arg.check_positive("min_delta", min_delta)
    x_start = canonical_state("x_start", x_start, mixture, like=x_src)
    target = canonical_state("target", target, mixture, like=x_src)
    levels = arg.noise_levels(sigmas, means.shape[0], means.device)
    local = arg.check_mask("local", local, (means.shape[0],), means.device)
    return integrate(x_start, levels, local, mixture, eps, min_delta, backend, check, target)
