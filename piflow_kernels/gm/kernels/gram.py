"""Gram space (DESIGN 2.2), one pixel to a thread: b in R^K moves, the products of velocities are taken once."""

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
def centred(means, mean_k, mask, K: tl.constexpr):
    """vt_k = v_k - vbar of one channel, a tuple, and vbar."""
    v = ()
    vbar = tl.load(means, mask=mask, other=0.0).to(tl.float32)
    v = v + (vbar,)
    for k in tl.static_range(1, K):
        v_k = tl.load(means + k * wide(mean_k), mask=mask, other=0.0).to(tl.float32)
        v = v + (v_k,)
        vbar += v_k
    vbar *= 1.0 / K
    vt = ()
    for k in tl.static_range(K):
        vt = vt + (v[k] - vbar,)
    return vt, vbar


@triton.jit
def dot(a, b, K: tl.constexpr):
    value = a[0] * b[0]
    for k in tl.static_range(1, K):
        value = tl.fma(a[k], b[k], value)
    return value


@triton.jit
def zeros(like, K: tl.constexpr):
    values = ()
    for _ in tl.static_range(K):
        values = values + (tl.zeros_like(like),)
    return values


@triton.jit
def plus_scaled(values, scale, others, K: tl.constexpr):
    """values_k + scale others_k."""
    result = ()
    for k in tl.static_range(K):
        result = result + (tl.fma(scale, others[k], values[k]),)
    return result


@triton.jit
def gram_products(x_start, x_src, means, start_c, src_c, mean_k, mean_c, mask, K: tl.constexpr, C: tl.constexpr):
    """h = vt . x_src, hd = vt . delta, m = vt . vbar and the lower triangle of G = vt vt^T, summed over channels."""
    zero = tl.zeros_like(mask.to(tl.float32))
    h, hd, m, gram = zeros(zero, K), zeros(zero, K), zeros(zero, K), zeros(zero, K * (K + 1) // 2)
    for c in range(C):  # not unrolled: all channels' loads at once do not fit in registers
        s = tl.load(x_src + c * wide(src_c), mask=mask, other=0.0).to(tl.float32)
        delta = tl.load(x_start + c * wide(start_c), mask=mask, other=0.0).to(tl.float32) - s
        vt, vbar = centred(means + c * wide(mean_c), mean_k, mask, K)
        h, hd, m = plus_scaled(h, s, vt, K), plus_scaled(hd, delta, vt, K), plus_scaled(m, vbar, vt, K)
        products = ()
        for i in tl.static_range(K):
            for j in tl.static_range(i + 1):
                products = products + (tl.fma(vt[i], vt[j], gram[i * (i + 1) // 2 + j]),)
        gram = products
    return h, hd, m, gram


@triton.jit
def gram_times(gram, b, K: tl.constexpr):
    """G b, of the lower triangle."""
    result = ()
    for i in tl.static_range(K):
        value = gram[i * (i + 1) // 2] * b[0]
        for j in tl.static_range(1, K):
            value = tl.fma(gram[max(i, j) * (max(i, j) + 1) // 2 + min(i, j)], b[j], value)
        result = result + (value,)
    return result


@triton.jit
def gram_weights(lw, h, hd, m, gram, gram_b, p_h, p_hd, p_m, p_q, p_gram, K: tl.constexpr):
    """softmax(lw + p_h h + p_hd hd + p_m m + p_q diag(G) + p_G G b), before the division by the sum; and that."""
    logits = ()
    for i in tl.static_range(K):
        logit = tl.fma(p_hd, hd[i], tl.fma(p_h, h[i], lw[i]))
        logit = tl.fma(p_q, gram[i * (i + 1) // 2 + i], tl.fma(p_m, m[i], logit))
        logits = logits + (tl.fma(p_gram, gram_b[i], logit),)
    top = logits[0]
    for k in tl.static_range(1, K):
        top = tl.maximum(top, logits[k])
    w = ()
    sum_w = tl.zeros_like(top)
    for k in tl.static_range(K):
        w_k = tl.exp2(logits[k] - top)
        w = w + (w_k,)
        sum_w += w_k
    return w, sum_w


@triton.jit
def load_logweights(logweights, weight_k, table, n_steps, weight_scale, mask, K: tl.constexpr):
    """logweights / T in units of log 2; a dropped component at -inf."""
    lw = ()
    for k in tl.static_range(K):
        value = tl.load(logweights + k * wide(weight_k), mask=mask, other=0.0).to(tl.float32)
        lw = lw + (tl.fma(value, weight_scale, load_bias(table, n_steps, k)),)
    return lw


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=TABLES)
def gm_gram_rollout_kernel(
    x_start, x_src, means, logweights, target, table, result,
    weight_scale, n_pixels, width, n_steps, n_blocks,
    start_b, start_c, start_r, start_w,
    src_b, src_c, src_r, src_w,
    mean_b, mean_k, mean_c, mean_r, mean_w,
    weight_b, weight_k, weight_r, weight_w,
    target_b, target_c, target_r, target_w,
    result_b, result_c, result_r, result_w,
    K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, HAS_TARGET: tl.constexpr,
):  # fmt: skip
    """b <- A b + B softmax(L), L = logweights / T + p_h h + p_hd hd + p_m m + p_q diag(G) + p_G G b.

    Without a target, result (B, C, P) = o_s x_src + o_d delta + o_beta vbar + o_y sum_k b_k vt_k; with one, result (B,
    blocks) is the sum of that value's square errors over this program's pixels.
    """
    block, sample = program(n_blocks)
    row, column, mask = pixel_offsets(block, n_pixels, width, BLOCK)
    x_start += sample * start_b + row * start_r + column * start_w
    x_src += sample * src_b + row * src_r + column * src_w
    means += sample * mean_b + row * mean_r + column * mean_w
    logweights += sample * weight_b + row * weight_r + column * weight_w
    table = table_of(table, sample, n_steps, K)

    h, hd, m, gram = gram_products(x_start, x_src, means, start_c, src_c, mean_k, mean_c, mask, K, C)
    lw = load_logweights(logweights, weight_k, table, n_steps, weight_scale, mask, K)
    b = zeros(h[0], K)
    for n in range(n_steps if K > 1 else 0):  # a single component is its own mean: vt = 0, b is idle
        gain, gift, p_h, p_hd, p_m, p_q, p_gram = load_step(table, n)
        w, sum_w = gram_weights(lw, h, hd, m, gram, gram_times(gram, b, K), p_h, p_hd, p_m, p_q, p_gram, K)
        share = gift / sum_w
        moved = ()
        for k in tl.static_range(K):
            moved = moved + (tl.fma(gain, b[k], share * w[k]),)
        b = moved

    o_s, o_d, o_beta, o_y = load_out(table, n_steps)
    if HAS_TARGET:
        target += sample * target_b + row * target_r + column * target_w
    else:
        result += sample * result_b + row * result_r + column * result_w
    error = tl.zeros_like(h[0])
    for c in range(C):
        s = tl.load(x_src + c * wide(src_c), mask=mask, other=0.0).to(tl.float32)
        delta = tl.load(x_start + c * wide(start_c), mask=mask, other=0.0).to(tl.float32) - s
        vt, vbar = centred(means + c * wide(mean_c), mean_k, mask, K)
        value = tl.fma(o_s, s, tl.fma(o_d, delta, tl.fma(o_beta, vbar, o_y * dot(b, vt, K))))
        if HAS_TARGET:
            gap = value - tl.load(target + c * wide(target_c), mask=mask, other=0.0).to(tl.float32)
            error = tl.fma(gap, gap, error)
        else:
            tl.store(result + c * wide(result_c), value, mask=mask)
    if HAS_TARGET:
        tl.store(result + sample * n_blocks + block, total(tl.where(mask, error, 0.0)))


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=TABLES)
def gm_gram_backward_kernel(
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
    K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, HAS_TARGET: tl.constexpr,
):  # fmt: skip
    """Adjoints of the rollout, in reverse in R^K.

    Forward again, b_n for 0 < n < N - 1 kept in `history` (B, N - 2, K, P). Then, with the adjoint of the logits l_k =
    w_k (a_k - w . a), a = B b_bar:

        G_bar += p_G l b^T + p_q diag(l),   h_bar += p_h l, ...,   b_bar <- A b_bar + p_G G l

    and one pass over the velocities, vt_bar_k = o_y b_k g + h_bar_k x_src + hd_bar_k delta + m_bar_k vbar + (G_bar +
    G_bar^T)_k vt. logstd_bar (B, blocks): sums over this program's pixels. With a target g is grad_scale grad[sample]
    times the error of the value; without one it is grad (B, C, P).
    """
    block, sample = program(n_blocks)
    row, column, mask = pixel_offsets(block, n_pixels, width, BLOCK)
    x_start += sample * start_b + row * start_r + column * start_w
    x_src += sample * src_b + row * src_r + column * src_w
    means += sample * mean_b + row * mean_r + column * mean_w
    logweights += sample * weight_b + row * weight_r + column * weight_w
    if HAS_TARGET:
        target += sample * target_b + row * target_r + column * target_w
        target_bar += sample * target_bar_b + row * target_bar_r + column * target_bar_w
        scale = grad_scale * tl.load(grad + sample * grad_b)
    else:
        grad += sample * grad_b + row * grad_r + column * grad_w
        scale = 1.0
    table, tangent = table_of(table, sample, n_steps, K), table_of(tangent, sample, n_steps, K)
    p = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = n_pixels.to(tl.int64)
    history += sample * (n_steps - 2) * K * size + p

    h, hd, m, gram = gram_products(x_start, x_src, means, start_c, src_c, mean_k, mean_c, mask, K, C)
    lw = load_logweights(logweights, weight_k, table, n_steps, weight_scale, mask, K)
    b = zeros(h[0], K)
    before = b
    for n in range(n_steps):
        if (n > 0) & (n < n_steps - 1):
            for k in tl.static_range(K):
                tl.store(history + ((n - 1) * K + k) * size, b[k], mask=mask)
        gain, gift, p_h, p_hd, p_m, p_q, p_gram = load_step(table, n)
        w, sum_w = gram_weights(lw, h, hd, m, gram, gram_times(gram, b, K), p_h, p_hd, p_m, p_q, p_gram, K)
        share = gift / sum_w
        moved = ()
        for k in tl.static_range(K):
            moved = moved + (tl.fma(gain, b[k], share * w[k]),)
        before = b
        b = moved
    tl.debug_barrier()  # what one thread has kept another may read back

    o_s, o_d, o_beta, o_y = load_out(table, n_steps)
    to_s, to_d, to_beta, _ = load_out(tangent, n_steps)
    b_bar = zeros(h[0], K)
    slope = tl.zeros_like(h[0])
    for c in range(C):
        s = tl.load(x_src + c * wide(src_c), mask=mask, other=0.0).to(tl.float32)
        delta = tl.load(x_start + c * wide(start_c), mask=mask, other=0.0).to(tl.float32) - s
        vt, vbar = centred(means + c * wide(mean_c), mean_k, mask, K)
        if HAS_TARGET:
            value = tl.fma(o_s, s, tl.fma(o_d, delta, tl.fma(o_beta, vbar, o_y * dot(b, vt, K))))
            g = scale * (value - tl.load(target + c * wide(target_c), mask=mask, other=0.0).to(tl.float32))
            tl.store(target_bar + c * wide(target_bar_c), -g, mask=mask)
        else:
            g = tl.load(grad + c * wide(grad_c), mask=mask, other=0.0).to(tl.float32)
        b_bar = plus_scaled(b_bar, o_y * g, vt, K)
        slope = tl.fma(g, tl.fma(to_s, s, tl.fma(to_d, delta, to_beta * vbar)), slope)

    lw_bar, h_bar, hd_bar, m_bar = zeros(slope, K), zeros(slope, K), zeros(slope, K), zeros(slope, K)
    gram_bar = zeros(slope, K * (K + 1) // 2)
    b_n = before
    for i in range(n_steps):
        n = n_steps - 1 - i
        gain, gift, p_h, p_hd, p_m, p_q, p_gram = load_step(table, n)
        tgain, tgift, tp_h, tp_hd, tp_m, tp_q, tp_gram = load_step(tangent, n)
        if i > 0:
            earlier = ()
            for k in tl.static_range(K):
                kept = tl.load(history + ((n - 1) * K + k) * size, mask=mask & (n > 0), other=0.0)
                earlier = earlier + (kept,)
            b_n = earlier
        gram_b = gram_times(gram, b_n, K)
        w, sum_w = gram_weights(lw, h, hd, m, gram, gram_b, p_h, p_hd, p_m, p_q, p_gram, K)
        inverse = 1.0 / sum_w
        mixed = dot(w, b_bar, K) * inverse  # sum_k w_k b_bar_k
        l_bar = ()
        for k in tl.static_range(K):
            l_bar = l_bar + (gift * LN2 * (w[k] * inverse) * (b_bar[k] - mixed),)
        slope = tl.fma(tgain, dot(b_bar, b_n, K), tl.fma(tgift, mixed, slope))
        for k in tl.static_range(K):
            q = gram[k * (k + 1) // 2 + k]
            tangent_k = tl.fma(tp_h, h[k], tl.fma(tp_hd, hd[k], tp_m * m[k]))
            slope = tl.fma(l_bar[k], tl.fma(tp_q, q, tl.fma(tp_gram, gram_b[k], tangent_k)), slope)
        lw_bar, h_bar = plus_scaled(lw_bar, 1.0, l_bar, K), plus_scaled(h_bar, p_h, l_bar, K)
        hd_bar, m_bar = plus_scaled(hd_bar, p_hd, l_bar, K), plus_scaled(m_bar, p_m, l_bar, K)
        through_gram = ()
        for k in tl.static_range(K):
            through_gram = through_gram + (p_gram * l_bar[k],)
        products = ()
        for i_k in tl.static_range(K):
            for j in tl.static_range(i_k):
                product = tl.fma(through_gram[i_k], b_n[j], gram_bar[i_k * (i_k + 1) // 2 + j])
                products = products + (tl.fma(through_gram[j], b_n[i_k], product),)
            product = tl.fma(through_gram[i_k], b_n[i_k], gram_bar[i_k * (i_k + 1) // 2 + i_k])
            products = products + (tl.fma(p_q, l_bar[i_k], product),)
        gram_bar = products
        b_bar = plus_scaled(gram_times(gram, through_gram, K), gain, b_bar, K)
    tl.store(logstd_bar + sample * n_blocks + block, total(tl.where(mask, slope, 0.0)))
    logweights_bar += sample * weight_bar_b + row * weight_bar_r + column * weight_bar_w
    for k in tl.static_range(K):
        tl.store(logweights_bar + k * wide(weight_bar_k), weight_scale * lw_bar[k], mask=mask)

    o_own = load_own(table, n_steps)
    start_bar += sample * start_bar_b + row * start_bar_r + column * start_bar_w
    src_bar += sample * src_bar_b + row * src_bar_r + column * src_bar_w
    means_bar += sample * mean_bar_b + row * mean_bar_r + column * mean_bar_w
    for c in range(C):
        s = tl.load(x_src + c * wide(src_c), mask=mask, other=0.0).to(tl.float32)
        delta = tl.load(x_start + c * wide(start_c), mask=mask, other=0.0).to(tl.float32) - s
        vt, vbar = centred(means + c * wide(mean_c), mean_k, mask, K)
        if HAS_TARGET:
            value = tl.fma(o_s, s, tl.fma(o_d, delta, tl.fma(o_beta, vbar, o_y * dot(b, vt, K))))
            g = scale * (value - tl.load(target + c * wide(target_c), mask=mask, other=0.0).to(tl.float32))
        else:
            g = tl.load(grad + c * wide(grad_c), mask=mask, other=0.0).to(tl.float32)
        hd_pull = dot(hd_bar, vt, K)
        delta_bar = tl.fma(o_d, g, hd_pull)
        s_bar = tl.fma(o_own, g, dot(h_bar, vt, K) - hd_pull)
        tl.store(start_bar + c * wide(start_bar_c), delta_bar, mask=mask)
        tl.store(src_bar + c * wide(src_bar_c), s_bar, mask=mask)
        shared = tl.fma(o_beta, g, dot(m_bar, vt, K))
        own = ()
        for k in tl.static_range(K):
            vt_bar = tl.fma(gram_bar[k * (k + 1) // 2 + k], vt[k], o_y * g * b[k])
            vt_bar = tl.fma(h_bar[k], s, tl.fma(hd_bar[k], delta, tl.fma(m_bar[k], vbar, vt_bar)))
            for j in tl.static_range(K):
                vt_bar = tl.fma(gram_bar[max(k, j) * (max(k, j) + 1) // 2 + min(k, j)], vt[j], vt_bar)
            own = own + (vt_bar,)
            shared -= vt_bar
        for k in tl.static_range(K):
            tl.store(
                means_bar + k * wide(mean_bar_k) + c * wide(mean_bar_c), tl.fma(shared, 1.0 / K, own[k]), mask=mask
            )
