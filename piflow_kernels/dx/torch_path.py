"""The collapsed DX rollout (DESIGN 2.3) in plain PyTorch operations: one weighted sum over the network output."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gm.reference import per_pixel
from .coefficients import Coefficients


def add_weighted_sum(result: Tensor, grid: Tensor, weights: Tensor) -> None:
    """result += sum_n weights_n grid_n, in place: (B, C, *S), (B, N, C, *S), (B, N); one pass where layouts allow."""
    batch, n_grid, n_channels = grid.shape[:3]
    tokens, result_tokens = grid.movedim((1, 2), (-2, -1)), result.movedim(1, -1)
    if grid.dtype == weights.dtype and grid.is_contiguous() and result.is_contiguous():
        result.view(batch, 1, -1).baddbmm_(weights[:, None], grid.view(batch, n_grid, -1))
    elif grid.dtype == weights.dtype and tokens.is_contiguous() and result_tokens.is_contiguous():
        # (w kron 1_C) as the matrix of one product: more multiplications, but each token is read once and in order.
        mix = torch.einsum("bn,cd->bncd", weights, torch.eye(n_channels, dtype=weights.dtype, device=weights.device))
        mix = mix.reshape(batch, n_grid * n_channels, n_channels)
        result_tokens.view(batch, -1, n_channels).baddbmm_(tokens.view(batch, -1, n_grid * n_channels), mix)
    else:
        for n in range(n_grid):
            result.addcmul_(grid[:, n].to(weights.dtype), per_pixel(weights[:, n], result))


def dx_integrate(x_start: Tensor, x_src: Tensor, grid: Tensor, coefficients: Coefficients) -> Tensor:
    """o_start x_start + o_src x_src + sum_n w_n v_n, shaped and laid out as x_start."""
    start, src = per_pixel(coefficients.start, x_start), per_pixel(coefficients.src, x_start)
    result = torch.mul(x_start, start, out=torch.empty_like(x_start))
    if x_start.numel() == 0:
        return result
    add_weighted_sum(result.addcmul_(x_src, src), grid, coefficients.grid.to(x_start.dtype))
    return result


def dx_integrate_backward(
    grad: Tensor, x_start: Tensor, x_src: Tensor, grid: Tensor, coefficients: Coefficients
) -> tuple[Tensor, Tensor, Tensor]:
    """Adjoints of x_start, x_src and grid, given that of the result."""
    weights = coefficients.grid.to(x_start.dtype)
    grid_bar = torch.empty_like(grid)
    for n in range(grid.shape[1]):
        grid_bar[:, n] = grad * per_pixel(weights[:, n], grad)
    start_bar = torch.mul(grad, per_pixel(coefficients.start, grad), out=torch.empty_like(x_start))
    src_bar = torch.mul(grad, per_pixel(coefficients.src, grad), out=torch.empty_like(x_src))
    return start_bar, src_bar, grid_bar
