"""What the kernels of the GM rollout share: pixels, the table of coefficients, the softmax.

One program integrates BLOCK pixels of one sample. Notation as in `piflow_kernels.gm.coefficients`:

    means       (B, K, C, P)   any strides, any float dtype         x_start, x_src, target  (B, C, P)   any strides
    logweights  (B, K, P)      any strides, any float dtype         table  contiguous float32, see `coefficients.py`

A pixel p is two coordinates, (p // width, p % width), each with its stride: token layouts need no copy. That `width` is
not specialised has a second use: without knowledge of contiguity a thread takes whole pixels, and sums over components
or channels stay within it instead of crossing lanes.
"""

import triton
import triton.language as tl

COUNTS, TABLES = ["n_pixels", "width", "n_steps", "n_blocks"], ["table", "tangent"]
"""Not specialised, and not on alignment: no size of an image and no schedule should compile anew."""

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def program(n_blocks):
    """This program's block of pixels, and its sample as int64. One grid axis: the second takes no more than 65535."""
    return tl.program_id(0) % n_blocks, (tl.program_id(0) // n_blocks).to(tl.int64)


@triton.jit
def pixel_offsets(block, n_pixels, width, BLOCK: tl.constexpr):
    """Row and column of this program's pixels, int64 so that offsets into large tensors hold; and the mask.

    Divided as int32 (the host sees to it that a sample's pixels are that few): a 64-bit division is a subroutine.
    """
    p = block * BLOCK + tl.arange(0, BLOCK)
    return (p // width).to(tl.int64), (p % width).to(tl.int64), p < n_pixels


@triton.jit
def wide(stride):
    """As int64: a 32-bit product with a component's or channel's index would overflow in large tensors."""
    return tl.cast(stride, tl.int64)


@triton.jit
def table_of(table, sample, n_steps, K: tl.constexpr):
    return table + sample * ((n_steps + 1) * 7 + K)


@triton.jit
def load_step(table, n):
    """A, B, p_h, p_hd, p_m, p_q, p_G of substep n; the weights of the logits are in units of log 2."""
    at = table + n * 7
    return (
        tl.load(at),
        tl.load(at + 1),
        tl.load(at + 2),
        tl.load(at + 3),
        tl.load(at + 4),
        tl.load(at + 5),
        tl.load(at + 6),
    )


@triton.jit
def load_out(table, n_steps):
    """o_s, o_d, o_beta, o_y."""
    at = table + n_steps * 7
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def load_own(table, n_steps):
    """o_own = o_s - o_d: what x_src counts for itself, a difference of large numbers that was made in float64."""
    return tl.load(table + n_steps * 7 + 4)


@triton.jit
def load_bias(table, n_steps, k):
    """0 for a component that stays, -inf for one that is dropped."""
    return tl.load(table + (n_steps + 1) * 7 + k)


@triton.jit
def total(tile):
    """Sum over a tile of one or two axes, in an order that its shape fixes."""
    if len(tile.shape) == 2:
        return tl.sum(tl.sum(tile, axis=1), axis=0)
    else:
        return tl.sum(tile, axis=0)
