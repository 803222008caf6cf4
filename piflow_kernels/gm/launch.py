"""Launch of the GM kernels: `piflow_kernels.gm.torch_path` on a GPU. Imports triton only where a kernel is needed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..configs import FAMILIES, coefficient_options, family_of, gm_form, gm_launch_config, next_power_of_2
from ..launch import Output, Pixels, block_of, cdiv, on_device_of, pixel_counts

COEFFICIENT_CHUNK = 128
"""Substeps whose coefficients one pass of the scan makes."""


class Rollout(NamedTuple):
    """Canonical arguments of the GM operators, see `piflow_kernels.arguments`.

    x_start, x_src, target: (B, C, *S) float32. means: (B, K, C, *S), logweights: (B, K, 1, *S), any float dtype.
    sigmas: (B, N + 1), local, sigma_src, logstds: (B,), keep: (B, K).
    """

    x_start: Tensor
    sigmas: Tensor
    local: Tensor | None
    x_src: Tensor
    sigma_src: Tensor
    means: Tensor
    logstds: Tensor
    logweights: Tensor
    keep: Tensor | None
    target: Tensor | None
    temperature: float
    eps: float
    min_delta: float | None

    @property
    def n_steps(self) -> int:
        levels = self.sigmas.shape[1]
        return levels - 1 if self.min_delta is None else max(levels - 1, 1)


def coefficients(r: Rollout, with_tangent: bool) -> tuple[Tensor, Tensor]:
    """The table of scalars that the kernels read, (B, (N + 1) 7 + K), and its derivative with respect to logstds."""
    from .kernels.coefficients import gm_coefficients_kernel

    batch, k = r.means.shape[:2]
    table = r.x_start.new_empty(1 + with_tangent, batch, (r.n_steps + 1) * 7 + k, dtype=torch.float32)
    local, keep = (r.sigma_src if flag is None else flag for flag in (r.local, r.keep))
    gm_coefficients_kernel[(batch,)](
        r.sigmas, local, r.sigma_src, r.logstds, keep, table[0], table[-1],
        r.sigmas.shape[1], r.n_steps, k, r.eps, r.min_delta or 0.0, r.temperature,
        *r.sigmas.stride(), local.stride(0), r.sigma_src.stride(0), r.logstds.stride(0), *keep.stride()[:2],
        *(() if r.keep is not None else (0,)),
        MEAN=r.min_delta is not None, TANGENT=with_tangent, HAS_LOCAL=r.local is not None,
        HAS_KEEP=r.keep is not None, K_TILE=next_power_of_2(k), CHUNK=COEFFICIENT_CHUNK,
        **coefficient_options(FAMILIES[family_of(r.means.device)]),
    )  # fmt: skip
    return table[0], table[-1]


def gm_integrate(r: Rollout) -> Tensor:
    """End state or velocity, shaped and laid out as x_start; with a target its mean square error per sample, (B,)."""
    from .kernels.channel import gm_channel_rollout_kernel
    from .kernels.gram import gm_gram_rollout_kernel
    from .kernels.streamed import gm_streamed_rollout_kernel

    batch, k, c = r.means.shape[:3]
    n_pixels, width = pixel_counts(r.x_start)
    if r.x_start.numel() == 0:
        return torch.empty_like(r.x_start) if r.target is None else r.x_start.new_full((batch,), math.nan)
    form = gm_form(k, c, r.n_steps, "forward")
    config = gm_launch_config(form, "forward", k, c, r.n_steps, FAMILIES[family_of(r.means.device)])
    kernel: Any = {
        "gram": gm_gram_rollout_kernel,
        "channel": gm_channel_rollout_kernel,
        "streamed": gm_streamed_rollout_kernel,
    }[form]
    block = block_of(n_pixels, config.block)
    n_blocks = cdiv(n_pixels, block)
    x_start, x_src, means, logweights = inputs(r)
    target = x_start if r.target is None else Pixels(r.target, 2)
    result: Any = Output(r.x_start, 2) if r.target is None else None
    partial = result.tensor if result else r.x_start.new_empty(batch, n_blocks)
    with on_device_of(r.means):
        table, _ = coefficients(r, with_tangent=False)
        kernel[(n_blocks * batch,)](
            x_start.tensor, x_src.tensor, means.tensor, logweights.tensor, target.tensor, table, partial,
            weight_scale(r), n_pixels, width, r.n_steps, n_blocks,
            *x_start.strides, *x_src.strides, *means.strides, *without_channel(logweights.strides), *target.strides,
            *(result.strides if result else (0, 0, 0, 0)),
            K=k, C=c, BLOCK=block, HAS_TARGET=r.target is not None, **config.keywords,
        )  # fmt: skip
    return result.get() if result else partial.sum(1) / (c * n_pixels)


class Adjoints(NamedTuple):
    """Of the tensors of a `Rollout` that take gradients."""

    x_start: Tensor
    x_src: Tensor
    means: Tensor
    logstds: Tensor
    logweights: Tensor
    target: Tensor | None


def gm_integrate_backward(grad: Tensor, r: Rollout) -> Adjoints:
    """Adjoints, given that of the result: shaped as x_start or, with a target, (B,)."""
    from .kernels.gram import gm_gram_backward_kernel
    from .kernels.streamed import gm_streamed_backward_kernel

    batch, k, c = r.means.shape[:3]
    n_pixels, width = pixel_counts(r.x_start)
    d_start, d_src, d_means, d_logweights = (
        Output(tensor, leading) for tensor, leading in ((r.x_start, 2), (r.x_src, 2), (r.means, 3), (r.logweights, 3))
    )
    target_bar = None if r.target is None else Output(r.target, 2)

    def adjoints(logstds_bar: Tensor) -> Adjoints:
        target = None if target_bar is None else target_bar.get()
        return Adjoints(d_start.get(), d_src.get(), d_means.get(), logstds_bar, d_logweights.get(), target)

    if r.x_start.numel() == 0:
        return adjoints(torch.zeros_like(r.logstds))
    form = gm_form(k, c, r.n_steps, "backward")
    config = gm_launch_config(form, "backward", k, c, r.n_steps, FAMILIES[family_of(r.means.device)])
    kernel: Any = {"gram": gm_gram_backward_kernel, "streamed": gm_streamed_backward_kernel}[form]
    block = block_of(n_pixels, config.block)
    n_blocks = cdiv(n_pixels, block)
    x_start, x_src, means, logweights = inputs(r)
    target = x_start if r.target is None else Pixels(r.target, 2)
    cotangent = None if r.target is not None else Pixels(grad, 2)
    d_target = target_bar or d_start
    kept = history_values(form, k, c, r.n_steps)
    history = r.x_start.new_empty(batch * kept * n_pixels)
    d_logstds = r.x_start.new_empty(batch, n_blocks)
    with on_device_of(r.means):
        table, tangent = coefficients(r, with_tangent=True)
        kernel[(n_blocks * batch,)](
            cotangent.tensor if cotangent else grad, x_start.tensor, x_src.tensor, means.tensor, logweights.tensor,
            target.tensor, table, tangent, d_start.tensor, d_src.tensor, d_means.tensor, d_logweights.tensor,
            d_target.tensor, d_logstds, history,
            weight_scale(r), 2 / (c * n_pixels), n_pixels, width, r.n_steps, n_blocks,
            *(cotangent.strides if cotangent else (grad.stride(0), 0, 0, 0)),
            *x_start.strides, *x_src.strides, *means.strides, *without_channel(logweights.strides), *target.strides,
            *d_start.strides, *d_src.strides, *d_means.strides, *without_channel(d_logweights.strides),
            *d_target.strides,
            K=k, C=c, BLOCK=block, HAS_TARGET=r.target is not None, **config.keywords,
        )  # fmt: skip
    return adjoints(d_logstds.sum(1, dtype=torch.float64).to(r.logstds.dtype))


def history_values(form: str, n_components: int, n_channels: int, n_steps: int) -> int:
    """float32 values per pixel that the backward pass keeps in memory besides the gradients."""
    if form == "gram":
        return n_components * max(n_steps - 2, 0)
    config = gm_launch_config("streamed", "backward", n_components, n_channels, n_steps, FAMILIES["default"])
    return 0 if config.constants["WINDOW"] else (2 * n_channels + 3) * n_steps


def inputs(r: Rollout) -> tuple[Pixels, Pixels, Pixels, Pixels]:
    return Pixels(r.x_start, 2), Pixels(r.x_src, 2), Pixels(r.means, 3), Pixels(r.logweights, 3)


def without_channel(strides: list[int]) -> list[int]:
    """(B, K, 1, R, W) -> (B, K, R, W)."""
    return [*strides[:2], *strides[3:]]


def weight_scale(r: Rollout) -> float:
    """Logits are logweights / T, in units of log 2."""
    return math.log2(math.e) / r.temperature
