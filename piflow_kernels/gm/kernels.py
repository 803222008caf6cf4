"""Device code of the GM rollout (DESIGN 2.2). No allocation, no autograd; launched by `piflow_kernels.launch`.

Notation as in `piflow_kernels.gm.coefficients`; one program integrates BLOCK pixels of one sample.

    means       (B, K, C, P)   any strides, any float dtype         x_start, x_src, result  (B, C, P)   any strides
    logweights  (B, K, P)      any strides, any float dtype         steps (B, N, 7), out (B, 4)   contiguous float32

A pixel p is two coordinates, (p // width, p % width), each with its stride: token layouts need no copy.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def pixel_offsets(block, n_pixels, width, BLOCK: tl.constexpr):
    """Row and column of this program's pixels, int64 so that offsets into large tensors hold; and the mask."""
    p = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return p // width, p % width, p < n_pixels


@triton.jit
def load_step(steps, n, n_steps, sample):
    """A, B, p_h, p_hd, p_m, p_q, p_G of substep n; the weights of the logits pre-scaled for exp2."""
    at = steps + (sample * n_steps + n) * 7
    return (
        tl.load(at),
        tl.load(at + 1),
        tl.load(at + 2) * LOG2E,
        tl.load(at + 3) * LOG2E,
        tl.load(at + 4) * LOG2E,
        tl.load(at + 5) * LOG2E,
        tl.load(at + 6) * LOG2E,
    )


@triton.jit
def softmax_base_2(logits, K: tl.constexpr):
    """softmax over a tuple of K logits in units of log 2; a component at -inf gets no weight."""
    top = logits[0]
    for k in tl.static_range(1, K):
        top = tl.maximum(top, logits[k])
    weights = ()
    total = tl.zeros_like(top)
    for k in tl.static_range(K):
        w = tl.exp2(logits[k] - top)
        weights = weights + (w,)
        total += w
    inverse = 1.0 / total
    normalised = ()
    for k in tl.static_range(K):
        normalised = normalised + (weights[k] * inverse,)
    return normalised


@triton.jit
def gm_gram_rollout_kernel(
    x_start, x_src, means, logweights, steps, out, result,
    n_pixels, width, n_steps,
    start_b, start_c, start_r, start_w,
    src_b, src_c, src_r, src_w,
    mean_b, mean_k, mean_c, mean_r, mean_w,
    weight_b, weight_k, weight_r, weight_w,
    result_b, result_c, result_r, result_w,
    K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """b <- A b + B softmax(L), L = logweights + p_h h + p_hd hd + p_m m + p_q diag(G) + p_G G b."""
    row, column, mask = pixel_offsets(tl.program_id(0), n_pixels, width, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    x_start += sample * start_b + row * start_r + column * start_w
    x_src += sample * src_b + row * src_r + column * src_w
    means += sample * mean_b + row * mean_r + column * mean_w
    logweights += sample * weight_b + row * weight_r + column * weight_w
    result += sample * result_b + row * result_r + column * result_w

    zero = tl.zeros((BLOCK,), tl.float32)
    h, hd, m, gram = (), (), (), ()
    for _ in tl.static_range(K):
        h, hd, m = h + (zero,), hd + (zero,), m + (zero,)
    for _ in tl.static_range(K * (K + 1) // 2):
        gram = gram + (zero,)
    for c in range(C):  # not unrolled: all channels' loads at once do not fit in registers
        s = tl.load(x_src + c * src_c, mask=mask, other=0.0).to(tl.float32)
        delta = tl.load(x_start + c * start_c, mask=mask, other=0.0).to(tl.float32) - s
        v = ()
        vbar = zero
        for k in tl.static_range(K):
            v_k = tl.load(means + k * mean_k + c * mean_c, mask=mask, other=0.0).to(tl.float32)
            v = v + (v_k,)
            vbar += v_k
        vbar *= 1.0 / K
        new_h, new_hd, new_m, new_gram = (), (), (), ()
        for i in tl.static_range(K):
            vt = v[i] - vbar
            new_h = new_h + (tl.fma(vt, s, h[i]),)
            new_hd = new_hd + (tl.fma(vt, delta, hd[i]),)
            new_m = new_m + (tl.fma(vt, vbar, m[i]),)
            for j in tl.static_range(i + 1):
                new_gram = new_gram + (tl.fma(vt, v[j] - vbar, gram[i * (i + 1) // 2 + j]),)
        h, hd, m, gram = new_h, new_hd, new_m, new_gram

    lw, b = (), ()
    for k in tl.static_range(K):
        lw = lw + (tl.load(logweights + k * weight_k, mask=mask, other=0.0).to(tl.float32) * LOG2E,)
        b = b + (zero,)
    for n in range(n_steps):
        gain, gift, p_h, p_hd, p_m, p_q, p_gram = load_step(steps, n, n_steps, sample)
        logits = ()
        for i in tl.static_range(K):
            through_b = zero
            for j in tl.static_range(K):
                through_b = tl.fma(gram[max(i, j) * (max(i, j) + 1) // 2 + min(i, j)], b[j], through_b)
            logit = tl.fma(p_h, h[i], lw[i])
            logit = tl.fma(p_hd, hd[i], logit)
            logit = tl.fma(p_m, m[i], logit)
            logit = tl.fma(p_q, gram[i * (i + 1) // 2 + i], logit)
            logits = logits + (tl.fma(p_gram, through_b, logit),)
        w = softmax_base_2(logits, K)
        new_b = ()
        for k in tl.static_range(K):
            new_b = new_b + (tl.fma(gain, b[k], gift * w[k]),)
        b = new_b

    o_s, o_d = tl.load(out + sample * 4), tl.load(out + sample * 4 + 1)
    o_beta, o_y = tl.load(out + sample * 4 + 2), tl.load(out + sample * 4 + 3)
    for c in range(C):
        s = tl.load(x_src + c * src_c, mask=mask, other=0.0).to(tl.float32)
        delta = tl.load(x_start + c * start_c, mask=mask, other=0.0).to(tl.float32) - s
        v = ()
        vbar = zero
        for k in tl.static_range(K):
            v_k = tl.load(means + k * mean_k + c * mean_c, mask=mask, other=0.0).to(tl.float32)
            v = v + (v_k,)
            vbar += v_k
        vbar *= 1.0 / K
        y = zero
        for k in tl.static_range(K):
            y = tl.fma(b[k], v[k] - vbar, y)
        value = tl.fma(o_s, s, tl.fma(o_d, delta, tl.fma(o_beta, vbar, o_y * y)))
        tl.store(result + c * result_c, value, mask=mask)


@triton.jit
def gm_channel_rollout_kernel(
    x_start, x_src, means, logweights, steps, out, result,
    n_pixels, width, n_steps,
    start_b, start_c, start_r, start_w,
    src_b, src_c, src_r, src_w,
    mean_b, mean_k, mean_c, mean_r, mean_w,
    weight_b, weight_k, weight_r, weight_w,
    result_b, result_c, result_r, result_w,
    K: tl.constexpr, C: tl.constexpr, K_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y <- A y + B sum_k softmax(L)_k vt_k, L = logweights + p_q |vt|^2 + vt . z(y); a K_TILE x BLOCK tile each."""
    row, column, mask = pixel_offsets(tl.program_id(0), n_pixels, width, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    x_start += sample * start_b + row * start_r + column * start_w
    x_src += sample * src_b + row * src_r + column * src_w
    result += sample * result_b + row * result_r + column * result_w
    k = tl.arange(0, K_TILE).to(tl.int64)[:, None]
    real = k < K
    means += sample * mean_b + k * mean_k + (row * mean_r + column * mean_w)[None, :]
    logweights += sample * weight_b + k * weight_k + (row * weight_r + column * weight_w)[None, :]
    inside = real & mask[None, :]

    vt, vbar, states, deltas, y = (), (), (), (), ()
    q = tl.zeros((K_TILE, BLOCK), tl.float32)
    for c in tl.static_range(C):
        s = tl.load(x_src + c * src_c, mask=mask, other=0.0).to(tl.float32)
        states = states + (s,)
        deltas = deltas + (tl.load(x_start + c * start_c, mask=mask, other=0.0).to(tl.float32) - s,)
        v = tl.load(means + c * mean_c, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(v, axis=0) * (1.0 / K)
        v = tl.where(real, v - mean[None, :], 0.0)
        vt, vbar = vt + (v,), vbar + (mean,)
        q = tl.fma(v, v, q)
        y = y + (tl.zeros((BLOCK,), tl.float32),)
    # Absent components weigh nothing; pixels outside the mask get finite logits so that no NaN arises.
    lw = tl.load(logweights, mask=inside, other=0.0).to(tl.float32) * LOG2E
    lw = tl.where(real, lw, float("-inf"))

    for n in range(n_steps):
        gain, gift, p_h, p_hd, p_m, p_q, p_gram = load_step(steps, n, n_steps, sample)
        logits = tl.fma(q, p_q + tl.zeros_like(q), lw)
        for c in tl.static_range(C):
            z = tl.fma(p_h, states[c], tl.fma(p_hd, deltas[c], tl.fma(p_m, vbar[c], p_gram * y[c])))
            logits = tl.fma(vt[c], tl.broadcast_to(z[None, :], (K_TILE, BLOCK)), logits)
        w = tl.exp2(logits - tl.max(logits, axis=0)[None, :])
        inverse = gift / tl.sum(w, axis=0)
        new_y = ()
        for c in tl.static_range(C):
            new_y = new_y + (tl.fma(gain, y[c], inverse * tl.sum(w * vt[c], axis=0)),)
        y = new_y

    o_s, o_d = tl.load(out + sample * 4), tl.load(out + sample * 4 + 1)
    o_beta, o_y = tl.load(out + sample * 4 + 2), tl.load(out + sample * 4 + 3)
    for c in tl.static_range(C):
        value = tl.fma(o_s, states[c], tl.fma(o_d, deltas[c], tl.fma(o_beta, vbar[c], o_y * y[c])))
        tl.store(result + c * result_c, value, mask=mask)


@triton.jit
def load_natural_step(steps, n, n_steps, sample):
    """A, B, p_h, p_hd, p_m, p_q, p_G of substep n, as they are."""
    at = steps + (sample * n_steps + n) * 7
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
def load_centred(means, vbar, inside):
    """vt_k = v_k - vbar as a C_TILE x BLOCK tile, zero outside."""
    return tl.where(inside, tl.load(means, mask=inside, other=0.0).to(tl.float32) - vbar, 0.0)


@triton.jit
def mean_velocity_of(means, mean_k, inside, K: tl.constexpr):
    vbar = tl.load(means, mask=inside, other=0.0).to(tl.float32)
    for k in range(1, K):
        vbar += tl.load(means + k * mean_k, mask=inside, other=0.0).to(tl.float32)
    return vbar * (1.0 / K)


@triton.jit
def streamed_softmax(
    means, mean_k, logweights, weight_k, vbar, z, p_q, inside, mask,
    K: tl.constexpr, C_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum_k w_k vt_k with w = softmax(logweights + vt . (z + p_q vt)), one pass over the velocities.

    Also the largest logit in units of log 2 and the reciprocal of the weights' sum, which give every weight again.
    """
    # Finite, so that a component at -inf meets no inf - inf before the first one that counts.
    top = tl.full((BLOCK,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((C_TILE, BLOCK), tl.float32)
    for k in range(K):
        vt = load_centred(means + k * mean_k, vbar, inside)
        lw = tl.load(logweights + k * weight_k, mask=mask, other=0.0).to(tl.float32)
        logit = (lw + tl.sum(vt * tl.fma(tl.zeros_like(vt) + p_q, vt, z), axis=0)) * LOG2E
        higher = tl.maximum(top, logit)
        fade, w = tl.exp2(top - higher), tl.exp2(logit - higher)
        mixed = mixed * fade[None, :] + w[None, :] * vt
        total = total * fade + w
        top = higher
    inverse = 1.0 / total
    return mixed * inverse[None, :], top, inverse


@triton.jit
def gm_streamed_rollout_kernel(
    x_start, x_src, means, logweights, steps, out, result,
    n_pixels, width, n_steps,
    start_b, start_c, start_r, start_w,
    src_b, src_c, src_r, src_w,
    mean_b, mean_k, mean_c, mean_r, mean_w,
    weight_b, weight_k, weight_r, weight_w,
    result_b, result_c, result_r, result_w,
    K: tl.constexpr, C: tl.constexpr, C_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y <- A y + B sum_k softmax(L)_k vt_k for any K and C: C_TILE x BLOCK tiles, velocities read in every substep."""
    row, column, mask = pixel_offsets(tl.program_id(0), n_pixels, width, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, C_TILE).to(tl.int64)[:, None]
    inside = (c < C) & mask[None, :]
    x_start += sample * start_b + c * start_c + (row * start_r + column * start_w)[None, :]
    x_src += sample * src_b + c * src_c + (row * src_r + column * src_w)[None, :]
    means += sample * mean_b + c * mean_c + (row * mean_r + column * mean_w)[None, :]
    logweights += sample * weight_b + row * weight_r + column * weight_w
    result += sample * result_b + c * result_c + (row * result_r + column * result_w)[None, :]

    s = tl.load(x_src, mask=inside, other=0.0).to(tl.float32)
    delta = tl.load(x_start, mask=inside, other=0.0).to(tl.float32) - s
    vbar = mean_velocity_of(means, mean_k, inside, K)
    y = tl.zeros((C_TILE, BLOCK), tl.float32)
    for n in range(n_steps):
        gain, gift, p_h, p_hd, p_m, p_q, p_gram = load_natural_step(steps, n, n_steps, sample)
        z = p_h * s + p_hd * delta + p_m * vbar + p_gram * y
        mixed, _, _ = streamed_softmax(
            means, mean_k, logweights, weight_k, vbar, z, p_q, inside, mask, K, C_TILE, BLOCK
        )
        y = gain * y + gift * mixed
    o_s, o_d = tl.load(out + sample * 4), tl.load(out + sample * 4 + 1)
    o_beta, o_y = tl.load(out + sample * 4 + 2), tl.load(out + sample * 4 + 3)
    tl.store(result, o_s * s + o_d * delta + o_beta * vbar + o_y * y, mask=inside)


@triton.jit
def tile_sum(tile):
    return tl.sum(tl.sum(tile, axis=1), axis=0)


@triton.jit
def gm_streamed_backward_kernel(
    grad, x_start, x_src, means, logweights, steps, out,
    start_bar, src_bar, means_bar, logweights_bar, steps_bar, out_bar, history, stream, stats,
    n_pixels, width, n_steps, n_blocks,
    grad_b, grad_c, grad_r, grad_w,
    start_b, start_c, start_r, start_w,
    src_b, src_c, src_r, src_w,
    mean_b, mean_k, mean_c, mean_r, mean_w,
    weight_b, weight_k, weight_r, weight_w,
    start_bar_b, start_bar_c, start_bar_r, start_bar_w,
    src_bar_b, src_bar_c, src_bar_r, src_bar_w,
    mean_bar_b, mean_bar_k, mean_bar_c, mean_bar_r, mean_bar_w,
    weight_bar_b, weight_bar_k, weight_bar_r, weight_bar_w,
    K: tl.constexpr, C: tl.constexpr, C_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adjoints of the rollout for any K and C, in one launch.

    Forward again, y_n kept in `history` (B, N, C, P); then backwards, u = B y_bar, l_bar = w (vt . u - mixed . u):

        z_bar = sum_k l_bar_k vt_k,   y_bar <- A y_bar + p_G z_bar

    keeping u in `stream` and z over y_n; then per component vt_bar_k = sum_n w_k u + l_bar_k (z + 2 p_q vt_k), whose
    sum over components is sum_n u + 2 p_q z_bar, known before. steps_bar (B, blocks, N, 7) and out_bar (B, blocks, 4):
    sums over this program's pixels, to be added up in a second, ordered reduction. stats (B, N, 3, P): top, inverse,
    mixed . u.
    """
    block = tl.program_id(0)
    row, column, mask = pixel_offsets(block, n_pixels, width, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, C_TILE).to(tl.int64)[:, None]
    inside = (c < C) & mask[None, :]
    p = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    plane = n_pixels.to(tl.int64) * C
    grad += sample * grad_b + c * grad_c + (row * grad_r + column * grad_w)[None, :]
    x_start += sample * start_b + c * start_c + (row * start_r + column * start_w)[None, :]
    x_src += sample * src_b + c * src_c + (row * src_r + column * src_w)[None, :]
    means += sample * mean_b + c * mean_c + (row * mean_r + column * mean_w)[None, :]
    logweights += sample * weight_b + row * weight_r + column * weight_w
    start_bar += sample * start_bar_b + c * start_bar_c + (row * start_bar_r + column * start_bar_w)[None, :]
    src_bar += sample * src_bar_b + c * src_bar_c + (row * src_bar_r + column * src_bar_w)[None, :]
    means_bar += sample * mean_bar_b + c * mean_bar_c + (row * mean_bar_r + column * mean_bar_w)[None, :]
    logweights_bar += sample * weight_bar_b + row * weight_bar_r + column * weight_bar_w
    history += sample * n_steps * plane + c * n_pixels + p[None, :]
    stream += sample * n_steps * plane + c * n_pixels + p[None, :]
    stats += sample * n_steps * n_pixels.to(tl.int64) * 3 + p
    steps_bar += (sample * n_blocks + block) * n_steps * 7
    out_bar += (sample * n_blocks + block) * 4

    g = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(x_src, mask=inside, other=0.0).to(tl.float32)
    delta = tl.load(x_start, mask=inside, other=0.0).to(tl.float32) - s
    vbar = mean_velocity_of(means, mean_k, inside, K)
    y = tl.zeros((C_TILE, BLOCK), tl.float32)
    for n in range(n_steps):
        tl.store(history + n * plane, y, mask=inside)
        gain, gift, p_h, p_hd, p_m, p_q, p_gram = load_natural_step(steps, n, n_steps, sample)
        z = p_h * s + p_hd * delta + p_m * vbar + p_gram * y
        mixed, _, _ = streamed_softmax(
            means, mean_k, logweights, weight_k, vbar, z, p_q, inside, mask, K, C_TILE, BLOCK
        )
        y = gain * y + gift * mixed
    tl.debug_barrier()  # what one thread has kept another may read back

    o_s, o_d = tl.load(out + sample * 4), tl.load(out + sample * 4 + 1)
    o_beta, o_y = tl.load(out + sample * 4 + 2), tl.load(out + sample * 4 + 3)
    tl.store(out_bar, tile_sum(g * s))
    tl.store(out_bar + 1, tile_sum(g * delta))
    tl.store(out_bar + 2, tile_sum(g * vbar))
    tl.store(out_bar + 3, tile_sum(g * y))

    y_bar = o_y * g
    delta_bar = o_d * g
    s_bar = o_s * g
    # What each component gets besides its own: the adjoint of vbar, less the mean of all vt_bar, over K.
    shared = o_beta * g
    for i in range(n_steps):
        n = n_steps - 1 - i
        gain, gift, p_h, p_hd, p_m, p_q, p_gram = load_natural_step(steps, n, n_steps, sample)
        y = tl.load(history + n * plane, mask=inside, other=0.0)
        z = p_h * s + p_hd * delta + p_m * vbar + p_gram * y
        mixed, top, inverse = streamed_softmax(
            means, mean_k, logweights, weight_k, vbar, z, p_q, inside, mask, K, C_TILE, BLOCK
        )
        u = gift * y_bar
        along = tl.sum(mixed * u, axis=0)
        z_bar = tl.zeros((C_TILE, BLOCK), tl.float32)
        q_bar = tl.zeros((BLOCK,), tl.float32)
        for k in range(K):
            vt = load_centred(means + k * mean_k, vbar, inside)
            lw = tl.load(logweights + k * weight_k, mask=mask, other=0.0).to(tl.float32)
            square = tl.sum(vt * vt, axis=0)
            logit = (lw + tl.sum(vt * z, axis=0) + p_q * square) * LOG2E
            l_bar = tl.exp2(logit - top) * inverse * (tl.sum(vt * u, axis=0) - along)
            z_bar += l_bar[None, :] * vt
            q_bar += l_bar * square
        tl.store(steps_bar + n * 7, tile_sum(y_bar * y))
        tl.store(steps_bar + n * 7 + 1, tile_sum(y_bar * mixed))
        tl.store(steps_bar + n * 7 + 2, tile_sum(z_bar * s))
        tl.store(steps_bar + n * 7 + 3, tile_sum(z_bar * delta))
        tl.store(steps_bar + n * 7 + 4, tile_sum(z_bar * vbar))
        tl.store(steps_bar + n * 7 + 5, tl.sum(tl.where(mask, q_bar, 0.0), axis=0))
        tl.store(steps_bar + n * 7 + 6, tile_sum(z_bar * y))
        tl.store(history + n * plane, z, mask=inside)
        tl.store(stream + n * plane, u, mask=inside)
        tl.store(stats + n * 3 * n_pixels, top, mask=mask)
        tl.store(stats + (n * 3 + 1) * n_pixels, inverse, mask=mask)
        tl.store(stats + (n * 3 + 2) * n_pixels, along, mask=mask)
        s_bar += p_h * z_bar
        delta_bar += p_hd * z_bar
        shared += (p_m - 2.0 * p_q) * z_bar - u
        y_bar = gain * y_bar + p_gram * z_bar
    tl.store(start_bar, delta_bar, mask=inside)
    tl.store(src_bar, s_bar - delta_bar, mask=inside)
    shared *= 1.0 / K
    tl.debug_barrier()

    for k in range(K):
        vt = load_centred(means + k * mean_k, vbar, inside)
        lw = tl.load(logweights + k * weight_k, mask=mask, other=0.0).to(tl.float32)
        square = tl.sum(vt * vt, axis=0)
        vt_bar = shared
        lw_bar = tl.zeros((BLOCK,), tl.float32)
        for n in range(n_steps):
            p_q = tl.load(steps + (sample * n_steps + n) * 7 + 5)
            z = tl.load(history + n * plane, mask=inside, other=0.0)
            u = tl.load(stream + n * plane, mask=inside, other=0.0)
            top = tl.load(stats + n * 3 * n_pixels, mask=mask, other=0.0)
            inverse = tl.load(stats + (n * 3 + 1) * n_pixels, mask=mask, other=0.0)
            along = tl.load(stats + (n * 3 + 2) * n_pixels, mask=mask, other=0.0)
            logit = (lw + tl.sum(vt * z, axis=0) + p_q * square) * LOG2E
            w = tl.exp2(logit - top) * inverse
            l_bar = w * (tl.sum(vt * u, axis=0) - along)
            vt_bar += w[None, :] * u + l_bar[None, :] * (z + 2.0 * p_q * vt)
            lw_bar += l_bar
        tl.store(means_bar + k * mean_bar_k, vt_bar, mask=inside)
        tl.store(logweights_bar + k * weight_bar_k, lw_bar, mask=mask)
