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
