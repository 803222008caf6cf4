"""Channel space (DESIGN 2.2): y in R^C moves, the velocities stay in registers as one K_TILE x BLOCK tile a channel."""

import triton
import triton.language as tl

from .common import COUNTS, TABLES, load_out, load_step, pixel_offsets, program, table_of, total, wide


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=TABLES)
def gm_channel_rollout_kernel(
    x_start, x_src, means, logweights, target, table, result,
    weight_scale, n_pixels, width, n_steps, n_blocks,
    start_b, start_c, start_r, start_w,
    src_b, src_c, src_r, src_w,
    mean_b, mean_k, mean_c, mean_r, mean_w,
    weight_b, weight_k, weight_r, weight_w,
    target_b, target_c, target_r, target_w,
    result_b, result_c, result_r, result_w,
    K: tl.constexpr, C: tl.constexpr, K_TILE: tl.constexpr, BLOCK: tl.constexpr, HAS_TARGET: tl.constexpr,
):  # fmt: skip
    """y <- A y + B sum_k softmax(L)_k vt_k, L = logweights / T + p_h h + p_hd hd + p_m m + p_q |vt|^2 + p_G vt . y.

    Without a target, result (B, C, P) = o_s x_src + o_d delta + o_beta vbar + o_y y; with one, result (B, blocks) is
    the sum of that value's square errors over this program's pixels.
    """
    block, sample = program(n_blocks)
    row, column, mask = pixel_offsets(block, n_pixels, width, BLOCK)
    x_start += sample * start_b + row * start_r + column * start_w
    x_src += sample * src_b + row * src_r + column * src_w
    k = tl.arange(0, K_TILE)[:, None]
    real = k < K
    inside = real & mask[None, :]
    means += sample * mean_b + k.to(tl.int64) * mean_k + (row * mean_r + column * mean_w)[None, :]
    logweights += sample * weight_b + k.to(tl.int64) * weight_k + (row * weight_r + column * weight_w)[None, :]
    table = table_of(table, sample, n_steps, K)

    zero = tl.zeros((K_TILE, BLOCK), tl.float32)
    # Absent components weigh nothing; pixels outside the mask get finite logits so that no NaN arises.
    bias = tl.load(table + (n_steps + 1) * 7 + k, mask=real, other=float("-inf"))
    lw = tl.load(logweights, mask=inside, other=0.0).to(tl.float32) * weight_scale + bias
    o_s, o_d, o_beta, o_y = load_out(table, n_steps)
    h, hd, m, q = zero, zero, zero, zero
    vt, fixed, y = (), (), ()
    for c in tl.static_range(C):
        s = tl.load(x_src + c * wide(src_c), mask=mask, other=0.0).to(tl.float32)
        delta = tl.load(x_start + c * wide(start_c), mask=mask, other=0.0).to(tl.float32) - s
        v = tl.load(means + c * wide(mean_c), mask=inside, other=0.0).to(tl.float32)
        vbar = tl.sum(v, axis=0) * (1.0 / K)
        v = tl.where(real, v - vbar[None, :], 0.0)
        h += v * s[None, :]
        hd += v * delta[None, :]
        m += v * vbar[None, :]
        q += v * v
        vt, y = vt + (v,), y + (tl.zeros((BLOCK,), tl.float32),)
        fixed = fixed + (tl.fma(o_s, s, tl.fma(o_d, delta, o_beta * vbar)),)

    for n in range(n_steps):
        gain, gift, p_h, p_hd, p_m, p_q, p_gram = load_step(table, n)
        along = vt[0] * y[0][None, :]
        for c in tl.static_range(1, C):
            along += vt[c] * y[c][None, :]
        logits = lw + p_h * h + p_hd * hd + p_m * m + p_q * q + p_gram * along
        w = tl.exp2(logits - tl.max(logits, axis=0)[None, :])
        w *= (gift / tl.sum(w, axis=0))[None, :]
        moved = ()
        for c in tl.static_range(C):
            moved = moved + (tl.fma(gain, y[c], tl.sum(w * vt[c], axis=0)),)
        y = moved

    if HAS_TARGET:
        target += sample * target_b + row * target_r + column * target_w
    else:
        result += sample * result_b + row * result_r + column * result_w
    error = tl.zeros((BLOCK,), tl.float32)
    for c in tl.static_range(C):
        value = tl.fma(o_y, y[c], fixed[c])
        if HAS_TARGET:
            gap = value - tl.load(target + c * wide(target_c), mask=mask, other=0.0).to(tl.float32)
            error = tl.fma(gap, gap, error)
        else:
            tl.store(result + c * wide(result_c), value, mask=mask)
    if HAS_TARGET:
        tl.store(result + sample * n_blocks + block, total(tl.where(mask, error, 0.0)))
