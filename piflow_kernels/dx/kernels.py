"""Device code of the DX rollout (DESIGN 2.3): one weighted sum over the network output, and its adjoint.

States are three axes of sizes (X, Y, Z), ordered by the caller so that memory is walked along Z; the grid has them
too, and its N points with a stride of their own. weights: (B, N + 2) float32, of x_start, x_src and
the grid points.
"""

import triton
import triton.language as tl


@triton.jit
def element_offsets(n_elements, size_y, size_z, BLOCK: tl.constexpr):
    """Coordinates of this program's elements, int64, and the mask."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return e // (size_y * size_z), (e // size_z) % size_y, e % size_z, e < n_elements


@triton.jit
def dx_rollout_kernel(
    x_start, x_src, grid, weights, result,
    n_elements, size_y, size_z,
    start_b, start_x, start_y, start_z,
    src_b, src_x, src_y, src_z,
    grid_b, grid_n, grid_x, grid_y, grid_z,
    result_b, result_x, result_y, result_z,
    N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """result = o_start x_start + o_src x_src + sum_n w_n v_n."""
    x, y, z, mask = element_offsets(n_elements, size_y, size_z, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    weights += sample * (N + 2)
    start = tl.load(x_start + sample * start_b + x * start_x + y * start_y + z * start_z, mask=mask, other=0.0)
    src = tl.load(x_src + sample * src_b + x * src_x + y * src_y + z * src_z, mask=mask, other=0.0)
    total = tl.load(weights) * start.to(tl.float32) + tl.load(weights + 1) * src.to(tl.float32)
    grid += sample * grid_b + x * grid_x + y * grid_y + z * grid_z
    for n in tl.static_range(N):
        total += tl.load(weights + 2 + n) * tl.load(grid + n * grid_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(result + sample * result_b + x * result_x + y * result_y + z * result_z, total, mask=mask)


@triton.jit
def dx_backward_kernel(
    grad, weights, start_bar, src_bar, grid_bar,
    n_elements, size_y, size_z,
    grad_b, grad_x, grad_y, grad_z,
    start_b, start_x, start_y, start_z,
    src_b, src_x, src_y, src_z,
    grid_b, grid_n, grid_x, grid_y, grid_z,
    N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """start_bar = o_start g, src_bar = o_src g, grid_bar_n = w_n g: the gradient is read once."""
    x, y, z, mask = element_offsets(n_elements, size_y, size_z, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    weights += sample * (N + 2)
    at = grad + sample * grad_b + x * grad_x + y * grad_y + z * grad_z
    g = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(start_bar + sample * start_b + x * start_x + y * start_y + z * start_z, tl.load(weights) * g, mask=mask)
    tl.store(src_bar + sample * src_b + x * src_x + y * src_y + z * src_z, tl.load(weights + 1) * g, mask=mask)
    grid_bar += sample * grid_b + x * grid_x + y * grid_y + z * grid_z
    for n in tl.static_range(N):
        tl.store(grid_bar + n * grid_n, tl.load(weights + 2 + n) * g, mask=mask)
