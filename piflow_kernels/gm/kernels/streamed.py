"""Any K and C: y in R^C moves, as tiles of C_TILE x BLOCK, and the velocities are read again in every substep."""

import triton
import triton.language as tl

from .common import (
    COUNTS,
    LN2,
    TABLES,
    load_bias,
    load_out,
    load_own,
    load_step,
    pixel_offsets,
    program,
    table_of,
    total,
    wide,
)


@triton.jit
def load_centred(means, vbar, inside):
    """vt_k = v_k - vbar as a C_TILE x BLOCK tile, zero outside."""
    return tl.where(inside, tl.load(means, mask=inside, other=0.0).to(tl.float32) - vbar, 0.0)


@triton.jit
def mean_velocity_of(means, mean_k, inside, K: tl.constexpr):
    vbar = tl.load(means, mask=inside, other=0.0).to(tl.float32)
    for k in range(1, K):
        vbar += tl.load(means + k * wide(mean_k), mask=inside, other=0.0).to(tl.float32)
    return vbar * (1.0 / K)


@triton.jit
def dot(a, b):
    """Over channels."""
    return tl.sum(a * b, axis=0)


@triton.jit
def probe(s, delta, vbar, y, p_h, p_hd, p_m, p_gram):
    """z, with which the logits are logweights + p_q |vt|^2 + vt . z."""
    return tl.fma(tl.zeros_like(s) + p_h, s, tl.fma(tl.zeros_like(s) + p_hd, delta, p_m * vbar + p_gram * y))


@triton.jit
def logit_of(vt, z, logweights, weight_k, table, n_steps, weight_scale, p_q, mask, k):
    """The logit of component k, in units of log 2."""
    lw = tl.load(logweights + k * wide(weight_k), mask=mask, other=0.0).to(tl.float32)
    lw = tl.fma(lw, weight_scale, load_bias(table, n_steps, k))
    return lw + dot(vt, tl.fma(tl.zeros_like(vt) + p_q, vt, z))


@triton.jit
def streamed_softmax(
    means, mean_k, logweights, weight_k, table, n_steps, weight_scale, vbar, z, p_q, inside, mask,
    K: tl.constexpr, C_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum_k w_k vt_k with w = softmax(L), one pass over the velocities.

    Also the largest logit and the reciprocal of the weights' sum, which give every weight again.
    """
    # Finite, so that a component at -inf meets no inf - inf before the first one that counts.
    top = tl.full((BLOCK,), -3.0e38, tl.float32)
    sum_w = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((C_TILE, BLOCK), tl.float32)
    for k in range(0, K, 2):  # in pairs, so that what is there fades half as often; an odd K repeats its last one
        last = tl.minimum(k + 1, K - 1)
        vt = load_centred(means + k * wide(mean_k), vbar, inside)
        vt_last = load_centred(means + last * wide(mean_k), vbar, inside)
        logit = logit_of(vt, z, logweights, weight_k, table, n_steps, weight_scale, p_q, mask, k)
        logit_last = logit_of(vt_last, z, logweights, weight_k, table, n_steps, weight_scale, p_q, mask, last)
        higher = tl.maximum(top, tl.maximum(logit, logit_last))
        fade, w = tl.exp2(top - higher), tl.exp2(logit - higher)
        w_last = tl.where(last > k, tl.exp2(logit_last - higher), 0.0)
        mixed = mixed * fade[None, :] + w[None, :] * vt + w_last[None, :] * vt_last
        sum_w = tl.fma(sum_w, fade, w + w_last)
        top = higher
    inverse = 1.0 / sum_w
    return mixed * inverse[None, :], top, inverse


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=TABLES)
def gm_streamed_rollout_kernel(
    x_start, x_src, means, logweights, target, table, result,
    weight_scale, n_pixels, width, n_steps, n_blocks,
    start_b, start_c, start_r, start_w,
    src_b, src_c, src_r, src_w,
    mean_b, mean_k, mean_c, mean_r, mean_w,
    weight_b, weight_k, weight_r, weight_w,
    target_b, target_c, target_r, target_w,
    result_b, result_c, result_r, result_w,
    K: tl.constexpr, C: tl.constexpr, C_TILE: tl.constexpr, BLOCK: tl.constexpr, HAS_TARGET: tl.constexpr,
):  # fmt: skip
    """y <- A y + B sum_k softmax(L)_k vt_k, L = logweights / T + p_q |vt|^2 + vt . z(y).

    Without a target, result (B, C, P) = o_s x_src + o_d delta + o_beta vbar + o_y y; with one, result (B, blocks) is
    the sum of that value's square errors over this program's pixels.
    """
    block, sample = program(n_blocks)
    row, column, mask = pixel_offsets(block, n_pixels, width, BLOCK)
    c = tl.arange(0, C_TILE).to(tl.int64)[:, None]
    inside = (c < C) & mask[None, :]
    x_start += sample * start_b + c * start_c + (row * start_r + column * start_w)[None, :]
    x_src += sample * src_b + c * src_c + (row * src_r + column * src_w)[None, :]
    means += sample * mean_b + c * mean_c + (row * mean_r + column * mean_w)[None, :]
    logweights += sample * weight_b + row * weight_r + column * weight_w
    table = table_of(table, sample, n_steps, K)

    s = tl.load(x_src, mask=inside, other=0.0).to(tl.float32)
    delta = tl.load(x_start, mask=inside, other=0.0).to(tl.float32) - s
    vbar = mean_velocity_of(means, mean_k, inside, K)
    y = tl.zeros((C_TILE, BLOCK), tl.float32)
    for n in range(n_steps):
        gain, gift, p_h, p_hd, p_m, p_q, p_gram = load_step(table, n)
        z = probe(s, delta, vbar, y, p_h, p_hd, p_m, p_gram)
        mixed, _, _ = streamed_softmax(
            means, mean_k, logweights, weight_k, table, n_steps, weight_scale, vbar, z, p_q, inside, mask,
            K, C_TILE, BLOCK,
        )  # fmt: skip
        y = gain * y + gift * mixed
    o_s, o_d, o_beta, o_y = load_out(table, n_steps)
    value = o_s * s + o_d * delta + o_beta * vbar + o_y * y
    if HAS_TARGET:
        target += sample * target_b + c * target_c + (row * target_r + column * target_w)[None, :]
        gap = tl.where(inside, value - tl.load(target, mask=inside, other=0.0).to(tl.float32), 0.0)
        tl.store(result + sample * n_blocks + block, total(gap * gap))
    else:
        result += sample * result_b + c * result_c + (row * result_r + column * result_w)[None, :]
        tl.store(result, value, mask=inside)


@triton.jit
def reverse_sums(
    means, mean_k, logweights, weight_k, table, n_steps, weight_scale, vbar, z, u, p_q, top, inverse, inside, mask,
    K: tl.constexpr, C_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pass for the adjoint of a substep: mixed = sum_k w_k vt_k, mixed . u, z_bar = sum_k l_k vt_k and q_bar.

    l_k = ln 2 w_k (vt_k . u - mixed . u) is the adjoint of logit k; q_bar = sum_k l_k |vt_k|^2.
    """
    mixed, pulled = tl.zeros((C_TILE, BLOCK), tl.float32), tl.zeros((C_TILE, BLOCK), tl.float32)
    along, q_mixed, q_pulled = inverse * 0.0, inverse * 0.0, inverse * 0.0
    for k in range(K):
        vt = load_centred(means + k * wide(mean_k), vbar, inside)
        logit = logit_of(vt, z, logweights, weight_k, table, n_steps, weight_scale, p_q, mask, k)
        w = tl.exp2(logit - top) * inverse
        wa = w * dot(vt, u)
        square = dot(vt, vt)
        mixed += w[None, :] * vt
        pulled += wa[None, :] * vt
        along += wa
        q_mixed += w * square
        q_pulled += wa * square
    z_bar = (pulled - along[None, :] * mixed) * LN2
    return mixed, along, z_bar, (q_pulled - along * q_mixed) * LN2


@triton.jit
def slope_of(y_bar, z_bar, q_bar, y, mixed, s, delta, vbar, tangent, n):
    """What substep n gives to the adjoint of logstds, per pixel."""
    tgain, tgift, tp_h, tp_hd, tp_m, tp_q, tp_gram = load_step(tangent, n)
    through = y_bar * (tgain * y + tgift * mixed) + z_bar * probe(s, delta, vbar, y, tp_h, tp_hd, tp_m, tp_gram)
    return tl.sum(through, axis=0) + tp_q * q_bar


@triton.jit
def component_adjoint(vt, z, u, logit, p_q, top, inverse, along):
    """Adjoint of logit k, and of vt_k besides what all components share, from one substep."""
    w = tl.exp2(logit - top) * inverse
    l_bar = w * (dot(vt, u) - along) * LN2
    return l_bar, w[None, :] * u + l_bar[None, :] * (z + 2.0 * p_q * vt)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=TABLES)
def gm_streamed_backward_kernel(
    grad, x_start, x_src, means, logweights, target, table, tangent,
    start_bar, src_bar, means_bar, logweights_bar, target_bar, logstd_bar, history,
    weight_scale, grad_scale, n_pixels, width, n_steps, n_blocks,
    grad_b, grad_c, grad_r, grad_w,
    start_b, start_c, start_r, start_w,
    src_b, src_c, src_r, src_w,
    mean_b, mean_k, mean_c, mean_r, mean_w,
    weight_b, weight_k, weight_r, weight_w,
    target_b, target_c, target_r, target_w,
    start_bar_b, start_bar_c, start_bar_r, start_bar_w,
    src_bar_b, src_bar_c, src_bar_r, src_bar_w,
    mean_bar_b, mean_bar_k, mean_bar_c, mean_bar_r, mean_bar_w,
    weight_bar_b, weight_bar_k, weight_bar_r, weight_bar_w,
    target_bar_b, target_bar_c, target_bar_r, target_bar_w,
    K: tl.constexpr, C: tl.constexpr, C_TILE: tl.constexpr, BLOCK: tl.constexpr, HAS_TARGET: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Adjoints of the rollout for any K and C, in one launch.

    Forward again; then backwards with u = B y_bar and z_bar = sum_k l_k vt_k (see `reverse_sums`),

        y_bar <- A y_bar + p_G z_bar

    then per component vt_bar_k = sum_n w_k u + l_k (z + 2 p_q vt_k), whose sum over components, sum_n u + 2 p_q z_bar,
    is known before. WINDOW > 0 is the number of substeps of a short window, whose z and u stay in registers; else they
    are kept in `history` (B, N, 2 C + 3, P): y then z, u, the largest logit, the reciprocal of the weights' sum,
    mixed . u.
    logstd_bar (B, blocks) and the target as in the Gram-space kernel.
    """
    block, sample = program(n_blocks)
    row, column, mask = pixel_offsets(block, n_pixels, width, BLOCK)
    c = tl.arange(0, C_TILE).to(tl.int64)[:, None]
    inside = (c < C) & mask[None, :]
    x_start += sample * start_b + c * start_c + (row * start_r + column * start_w)[None, :]
    x_src += sample * src_b + c * src_c + (row * src_r + column * src_w)[None, :]
    means += sample * mean_b + c * mean_c + (row * mean_r + column * mean_w)[None, :]
    logweights += sample * weight_b + row * weight_r + column * weight_w
    table, tangent = table_of(table, sample, n_steps, K), table_of(tangent, sample, n_steps, K)
    size = n_pixels.to(tl.int64)
    plane = (2 * C + 3) * size
    p = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    stats = history + sample * n_steps * plane + 2 * C * size + p
    history += sample * n_steps * plane + c * size + p[None, :]

    s = tl.load(x_src, mask=inside, other=0.0).to(tl.float32)
    delta = tl.load(x_start, mask=inside, other=0.0).to(tl.float32) - s
    vbar = mean_velocity_of(means, mean_k, inside, K)
    y = tl.zeros((C_TILE, BLOCK), tl.float32)
    states, tops, inverses = (), (), ()
    if WINDOW > 0:
        for n in tl.static_range(WINDOW):
            gain, gift, p_h, p_hd, p_m, p_q, p_gram = load_step(table, n)
            z = probe(s, delta, vbar, y, p_h, p_hd, p_m, p_gram)
            mixed, top, inverse = streamed_softmax(
                means, mean_k, logweights, weight_k, table, n_steps, weight_scale, vbar, z, p_q, inside, mask,
                K, C_TILE, BLOCK,
            )  # fmt: skip
            states, tops, inverses = states + (y,), tops + (top,), inverses + (inverse,)
            y = gain * y + gift * mixed
    else:
        for n in range(n_steps):
            tl.store(history + n * plane, y, mask=inside)
            gain, gift, p_h, p_hd, p_m, p_q, p_gram = load_step(table, n)
            z = probe(s, delta, vbar, y, p_h, p_hd, p_m, p_gram)
            mixed, top, inverse = streamed_softmax(
                means, mean_k, logweights, weight_k, table, n_steps, weight_scale, vbar, z, p_q, inside, mask,
                K, C_TILE, BLOCK,
            )  # fmt: skip
            tl.store(stats + n * plane, top, mask=mask)
            tl.store(stats + n * plane + size, inverse, mask=mask)
            y = gain * y + gift * mixed
        tl.debug_barrier()  # what one thread has kept another may read back

    o_s, o_d, o_beta, o_y = load_out(table, n_steps)
    to_s, to_d, to_beta, _ = load_out(tangent, n_steps)
    if HAS_TARGET:
        target += sample * target_b + c * target_c + (row * target_r + column * target_w)[None, :]
        value = o_s * s + o_d * delta + o_beta * vbar + o_y * y
        g = (grad_scale * tl.load(grad + sample * grad_b)) * (
            value - tl.load(target, mask=inside, other=0.0).to(tl.float32)
        )
        g = tl.where(inside, g, 0.0)
        target_bar += sample * target_bar_b + c * target_bar_c + (row * target_bar_r + column * target_bar_w)[None, :]
        tl.store(target_bar, -g, mask=inside)
    else:
        grad += sample * grad_b + c * grad_c + (row * grad_r + column * grad_w)[None, :]
        g = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
    slope = tl.sum(g * (to_s * s + to_d * delta + to_beta * vbar), axis=0)

    y_bar = o_y * g
    delta_bar = tl.zeros_like(g)
    s_bar = tl.zeros_like(g)
    # What each component gets besides its own: the adjoint of vbar, less the mean of all vt_bar, over K.
    shared = o_beta * g
    zs, us, alongs = (), (), ()
    if WINDOW > 0:
        for i in tl.static_range(WINDOW):
            gain, gift, p_h, p_hd, p_m, p_q, p_gram = load_step(table, WINDOW - 1 - i)
            y = states[WINDOW - 1 - i]
            z, u = probe(s, delta, vbar, y, p_h, p_hd, p_m, p_gram), gift * y_bar
            mixed, along, z_bar, q_bar = reverse_sums(
                means, mean_k, logweights, weight_k, table, n_steps, weight_scale, vbar, z, u, p_q,
                tops[WINDOW - 1 - i], inverses[WINDOW - 1 - i], inside, mask, K, C_TILE, BLOCK,
            )  # fmt: skip
            zs, us, alongs = zs + (z,), us + (u,), alongs + (along,)
            slope += slope_of(y_bar, z_bar, q_bar, y, mixed, s, delta, vbar, tangent, WINDOW - 1 - i)
            s_bar += p_h * z_bar
            delta_bar += p_hd * z_bar
            shared += (p_m - 2.0 * p_q) * z_bar - u
            y_bar = gain * y_bar + p_gram * z_bar
    else:
        for i in range(n_steps):
            n = n_steps - 1 - i
            gain, gift, p_h, p_hd, p_m, p_q, p_gram = load_step(table, n)
            y = tl.load(history + n * plane, mask=inside, other=0.0)
            top = tl.load(stats + n * plane, mask=mask, other=0.0)
            inverse = tl.load(stats + n * plane + size, mask=mask, other=0.0)
            z, u = probe(s, delta, vbar, y, p_h, p_hd, p_m, p_gram), gift * y_bar
            mixed, along, z_bar, q_bar = reverse_sums(
                means, mean_k, logweights, weight_k, table, n_steps, weight_scale, vbar, z, u, p_q,
                top, inverse, inside, mask, K, C_TILE, BLOCK,
            )  # fmt: skip
            tl.store(history + n * plane, z, mask=inside)
            tl.store(history + n * plane + C * size, u, mask=inside)
            tl.store(stats + n * plane + 2 * size, along, mask=mask)
            slope += slope_of(y_bar, z_bar, q_bar, y, mixed, s, delta, vbar, tangent, n)
            s_bar += p_h * z_bar
            delta_bar += p_hd * z_bar
            shared += (p_m - 2.0 * p_q) * z_bar - u
            y_bar = gain * y_bar + p_gram * z_bar
        tl.debug_barrier()
    start_bar += sample * start_bar_b + c * start_bar_c + (row * start_bar_r + column * start_bar_w)[None, :]
    src_bar += sample * src_bar_b + c * src_bar_c + (row * src_bar_r + column * src_bar_w)[None, :]
    tl.store(start_bar, o_d * g + delta_bar, mask=inside)
    tl.store(src_bar, load_own(table, n_steps) * g + (s_bar - delta_bar), mask=inside)
    tl.store(logstd_bar + sample * n_blocks + block, total(tl.where(mask, slope, 0.0)))
    shared *= 1.0 / K
    means_bar += sample * mean_bar_b + c * mean_bar_c + (row * mean_bar_r + column * mean_bar_w)[None, :]
    logweights_bar += sample * weight_bar_b + row * weight_bar_r + column * weight_bar_w

    for k in range(K):
        vt = load_centred(means + k * wide(mean_k), vbar, inside)
        vt_bar = shared
        lw_bar = tl.zeros((BLOCK,), tl.float32)
        if WINDOW > 0:
            for i in tl.static_range(WINDOW):
                p_q = tl.load(table + (WINDOW - 1 - i) * 7 + 5)
                top, inverse = tops[WINDOW - 1 - i], inverses[WINDOW - 1 - i]
                logit = logit_of(vt, zs[i], logweights, weight_k, table, n_steps, weight_scale, p_q, mask, k)
                l_bar, bar = component_adjoint(vt, zs[i], us[i], logit, p_q, top, inverse, alongs[i])
                vt_bar += bar
                lw_bar += l_bar
        else:
            for n in range(n_steps):
                p_q = tl.load(table + n * 7 + 5)
                z = tl.load(history + n * plane, mask=inside, other=0.0)
                u = tl.load(history + n * plane + C * size, mask=inside, other=0.0)
                top = tl.load(stats + n * plane, mask=mask, other=0.0)
                inverse = tl.load(stats + n * plane + size, mask=mask, other=0.0)
                along = tl.load(stats + n * plane + 2 * size, mask=mask, other=0.0)
                logit = logit_of(vt, z, logweights, weight_k, table, n_steps, weight_scale, p_q, mask, k)
                l_bar, bar = component_adjoint(vt, z, u, logit, p_q, top, inverse, along)
                vt_bar += bar
                lw_bar += l_bar
        tl.store(means_bar + k * wide(mean_bar_k), vt_bar, mask=inside)
        tl.store(logweights_bar + k * wide(weight_bar_k), weight_scale * lw_bar, mask=mask)
