"""Device code of the DX rollout (DESIGN 2.3): one weighted sum over the network output, and its adjoint.

States are three axes of sizes (X, Y, Z), ordered by the host so that memory is walked along Z and as few as strides
allow; the grid has them too, and its N points with a stride of their own.
weights: (B, N + 2) float32, of x_start, x_src and the grid points.
"""

import triton
import triton.language as tl


@triton.jit
def product(a, b):
    return a * b


@triton.jit
def raw_time(sigma, shift):
    return sigma / (shift + (1.0 - shift) * sigma)


POINTERS = ("sigmas", "local", "sigma_src", "segment_size", "shift", "weights")
INTEGERS = ("n_levels", "n_steps", "sigma_b", "sigma_n", "local_b", "src_b", "segment_b", "shift_b")
"""Not specialised, nor addresses on alignment: a handful of numbers is read, and no schedule should compile anew."""


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=POINTERS)
def dx_coefficients_kernel(
    sigmas, local, sigma_src, segment_size, shift, weights,
    n_levels, n_steps, eps, min_delta,
    sigma_b, sigma_n, local_b, src_b, segment_b, shift_b,
    MEAN: tl.constexpr, HAS_LOCAL: tl.constexpr, POLYNOMIAL: tl.constexpr,
    N: tl.constexpr, N_TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """weights (B, N + 2): x_N, or with MEAN -(x_N - x_start) / divisor, = w_0 x_start + w_1 x_src + sum_n w_{2+n} v_n.

    A substep is x <- (1 + rate) x - rate x_0: x_0 of substep n counts -rate_n times the product of (1 + rate) over the
    later ones, a scan from the end. All in float64.
    """
    sample = tl.program_id(0).to(tl.int64)
    zero = tl.full((), 0.0, tl.float64)
    eps = zero + eps
    sigmas += sample * sigma_b
    s = tl.load(sigma_src + sample * src_b).to(tl.float64)
    segment = tl.load(segment_size + sample * segment_b).to(tl.float64)
    scale = tl.load(shift + sample * shift_b).to(tl.float64)
    first = tl.load(sigmas).to(tl.float64)
    last = tl.load(sigmas + (n_levels - 1) * sigma_n).to(tl.float64)
    at_start = first != first
    if MEAN:
        at_start = first == last
        if HAS_LOCAL:
            at_start = at_start | (tl.load(local + sample * local_b) != 0)
    r_src = raw_time(s, scale)
    r_dst = tl.maximum(r_src - segment, 0.0)
    length = tl.maximum(r_src - r_dst, eps)

    i = tl.arange(0, CHUNK)
    point = tl.arange(0, N_TILE)
    pulls = tl.zeros((N_TILE,), tl.float64)
    survival = zero + 1.0  # product of (1 + rate) over the substeps seen so far, from the end
    chunks = (n_steps + CHUNK - 1) // CHUNK
    for chunk in range(chunks):
        n = (chunks - 1 - chunk) * CHUNK + i
        sigma = tl.load(sigmas + tl.minimum(n, n_levels - 1) * sigma_n).to(tl.float64)
        after = tl.load(sigmas + tl.minimum(n + 1, n_levels - 1) * sigma_n).to(tl.float64)
        ds = tl.where(at_start, tl.where(n == 0, -1.0, 0.0), after - sigma)
        sigma = tl.where(at_start, first, sigma)
        rate = tl.where(n < n_steps, ds / tl.maximum(sigma, eps), 0.0)
        from_here = tl.associative_scan(1.0 + rate, 0, product, reverse=True) * survival
        # Of the later substeps only: the next one's, as a difference would lose what a vanishing factor takes away.
        later_n = n + 1
        later_sigma = tl.load(sigmas + tl.minimum(later_n, n_levels - 1) * sigma_n).to(tl.float64)
        later_after = tl.load(sigmas + tl.minimum(later_n + 1, n_levels - 1) * sigma_n).to(tl.float64)
        later_rate = tl.where(at_start, 0.0, later_after - later_sigma) / tl.maximum(later_sigma, eps)
        inner = tl.where((later_n < n_steps) & (i < CHUNK - 1), 1.0 + later_rate, 1.0)
        later = tl.associative_scan(inner, 0, product, reverse=True) * survival
        pull = -rate * later

        r = raw_time(sigma, scale)
        if POLYNOMIAL:
            power = pull
            for g in range(N):
                pulls += tl.where(point == g, tl.sum(power, axis=0), 0.0)
                power *= r_src - r
        else:
            tau = tl.minimum(tl.maximum((r - r_dst) / length, 0.0), 1.0) * (N - 1)
            low = tl.minimum(tl.floor(tau), max(N - 2, 0) * 1.0)
            fraction = tau - low
            for g in range(N):
                at = tl.where(low == g, 1.0 - fraction, 0.0) + tl.where(low + 1.0 == g, fraction, 0.0)
                pulls += tl.where(point == g, tl.sum(pull * at, axis=0), 0.0)
        survival = tl.sum(tl.where(i == 0, from_here, 0.0), axis=0)

    divisor = zero - 1.0
    moved = 0.0
    if MEAN:
        divisor = tl.where(at_start, 1.0, tl.maximum(first - last, zero + min_delta))
        moved = 1.0
    weights += sample * (N + 2)
    # Clamping takes NaN for a bound; a segment or shift that is none must not pass for one.
    divisor += 0.0 * (segment + scale)
    tl.store(weights, (survival - moved) / -divisor)
    tl.store(weights + 1, tl.sum(pulls, axis=0) / -divisor)
    tl.store(weights + 2 + point, s * pulls / divisor, mask=point < N)


@triton.jit
def program(n_blocks):
    """This program's block of elements, and its sample as int64. One grid axis: the second takes no more than 65535."""
    return tl.program_id(0) % n_blocks, (tl.program_id(0) // n_blocks).to(tl.int64)


@triton.jit
def element_offsets(block, n_elements, size_y, size_z, BLOCK: tl.constexpr):
    """Coordinates of this program's elements, int64 so that offsets into large tensors hold; and the mask.

    Divided as int32 (the host sees to it that a sample's elements are that few): a 64-bit division is a subroutine.
    """
    e = block * BLOCK + tl.arange(0, BLOCK)
    row = e // size_z
    return (row // size_y).to(tl.int64), (row % size_y).to(tl.int64), (e % size_z).to(tl.int64), e < n_elements


@triton.jit
def weighted_sum(
    x_start, x_src, grid, weights, x, y, z, mask,
    start_x, start_y, start_z,
    src_x, src_y, src_z,
    grid_n, grid_x, grid_y, grid_z,
    N: tl.constexpr,
):  # fmt: skip
    """o_start x_start + o_src x_src + sum_n w_n v_n."""
    start = tl.load(x_start + x * start_x + y * start_y + z * start_z, mask=mask, other=0.0).to(tl.float32)
    src = tl.load(x_src + x * src_x + y * src_y + z * src_z, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(weights) * start + tl.load(weights + 1) * src
    grid += x * grid_x + y * grid_y + z * grid_z
    for n in tl.static_range(N):
        value += tl.load(weights + 2 + n) * tl.load(grid + n * tl.cast(grid_n, tl.int64), mask=mask, other=0.0).to(
            tl.float32
        )
    return value


@triton.jit(do_not_specialize=["n_elements", "n_blocks"], do_not_specialize_on_alignment=["weights"])
def dx_rollout_kernel(
    x_start, x_src, grid, target, weights, result,
    n_elements, size_y, size_z, n_blocks,
    start_b, start_x, start_y, start_z,
    src_b, src_x, src_y, src_z,
    grid_b, grid_n, grid_x, grid_y, grid_z,
    target_b, target_x, target_y, target_z,
    result_b, result_x, result_y, result_z,
    N: tl.constexpr, BLOCK: tl.constexpr, HAS_TARGET: tl.constexpr,
):  # fmt: skip
    """Without a target result (B, X, Y, Z) is the weighted sum; with one result (B, blocks) sums its square errors."""
    block, sample = program(n_blocks)
    x, y, z, mask = element_offsets(block, n_elements, size_y, size_z, BLOCK)
    value = weighted_sum(
        x_start + sample * start_b, x_src + sample * src_b, grid + sample * grid_b, weights + sample * (N + 2),
        x, y, z, mask, start_x, start_y, start_z, src_x, src_y, src_z, grid_n, grid_x, grid_y, grid_z, N,
    )  # fmt: skip
    if HAS_TARGET:
        at = target + sample * target_b + x * target_x + y * target_y + z * target_z
        gap = tl.where(mask, value - tl.load(at, mask=mask, other=0.0).to(tl.float32), 0.0)
        tl.store(result + sample * n_blocks + block, tl.sum(gap * gap, axis=0))
    else:
        tl.store(result + sample * result_b + x * result_x + y * result_y + z * result_z, value, mask=mask)


@triton.jit(do_not_specialize=["n_elements", "n_blocks"], do_not_specialize_on_alignment=["weights"])
def dx_backward_kernel(
    grad, x_start, x_src, grid, target, weights, start_bar, src_bar, grid_bar, target_bar,
    grad_scale, n_elements, size_y, size_z, n_blocks,
    grad_b, grad_x, grad_y, grad_z,
    start_b, start_x, start_y, start_z,
    src_b, src_x, src_y, src_z,
    grid_b, grid_n, grid_x, grid_y, grid_z,
    target_b, target_x, target_y, target_z,
    start_bar_b, start_bar_x, start_bar_y, start_bar_z,
    src_bar_b, src_bar_x, src_bar_y, src_bar_z,
    grid_bar_b, grid_bar_n, grid_bar_x, grid_bar_y, grid_bar_z,
    target_bar_b, target_bar_x, target_bar_y, target_bar_z,
    N: tl.constexpr, BLOCK: tl.constexpr, HAS_TARGET: tl.constexpr,
):  # fmt: skip
    """start_bar = o_start g, src_bar = o_src g, grid_bar_n = w_n g.

    Without a target g is grad (B, X, Y, Z), read once; with one it is grad_scale grad[sample] times the error of the
    weighted sum, taken again here, and target_bar = -g.
    """
    block, sample = program(n_blocks)
    x, y, z, mask = element_offsets(block, n_elements, size_y, size_z, BLOCK)
    weights += sample * (N + 2)
    if HAS_TARGET:
        value = weighted_sum(
            x_start + sample * start_b, x_src + sample * src_b, grid + sample * grid_b, weights,
            x, y, z, mask, start_x, start_y, start_z, src_x, src_y, src_z, grid_n, grid_x, grid_y, grid_z, N,
        )  # fmt: skip
        at = target + sample * target_b + x * target_x + y * target_y + z * target_z
        gap = value - tl.load(at, mask=mask, other=0.0).to(tl.float32)
        g = grad_scale * tl.load(grad + sample * grad_b) * gap
        at = target_bar + sample * target_bar_b + x * target_bar_x + y * target_bar_y + z * target_bar_z
        tl.store(at, -g, mask=mask)
    else:
        at = grad + sample * grad_b + x * grad_x + y * grad_y + z * grad_z
        g = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    at = start_bar + sample * start_bar_b + x * start_bar_x + y * start_bar_y + z * start_bar_z
    tl.store(at, tl.load(weights) * g, mask=mask)
    at = src_bar + sample * src_bar_b + x * src_bar_x + y * src_bar_y + z * src_bar_z
    tl.store(at, tl.load(weights + 1) * g, mask=mask)
    grid_bar += sample * grid_bar_b + x * grid_bar_x + y * grid_bar_y + z * grid_bar_z
    for n in tl.static_range(N):
        tl.store(grid_bar + n * tl.cast(grid_bar_n, tl.int64), tl.load(weights + 2 + n) * g, mask=mask)
