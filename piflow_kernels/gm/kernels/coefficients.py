"""Device code for the scalars per sample (DESIGN 2.2): one small launch makes what the rollout kernels read."""

import triton
import triton.language as tl

from .common import LOG2E


@triton.jit
def then(a1, b1, c1, a2, b2, c2):
    """y <- a1 y + b1 followed by y <- a2 y + b2, for two gifts at once."""
    return a1 * a2, a2 * b1 + b2, a2 * c1 + c2


@triton.jit
def then_with_tangent(a1, b1, c1, ta1, tb1, tc1, a2, b2, c2, ta2, tb2, tc2):
    return (
        a1 * a2,
        a2 * b1 + b2,
        a2 * c1 + c2,
        ta1 * a2 + a1 * ta2,
        ta2 * b1 + a2 * tb1 + tb2,
        ta2 * c1 + a2 * tc1 + tc2,
    )


@triton.jit
def posterior(sigma, s, variance, eps):
    """a / sigma, a - a_s, zeta, D, D' / D, D - S a / sigma and its derivative; ' is d / dlogstds, so S' = 2 S."""
    s_clamped = tl.maximum(s, eps)
    sigma = tl.maximum(sigma, eps)
    a, a_s = (1.0 - sigma) / sigma, (1.0 - s_clamped) / s_clamped
    gap = (s_clamped - sigma) / (s_clamped * sigma)
    zeta = gap * (a + a_s)
    precision = 1.0 + variance * zeta
    clamped = precision <= eps
    denominator = tl.where(clamped, eps, precision)
    slope = tl.where(clamped, 0.0, 2.0 * variance * zeta) / denominator
    fall = tl.where(clamped, a / sigma, a + a_s * a_s) * variance
    shrink = tl.where(clamped, eps, 1.0) - fall
    return a / sigma, gap, zeta, denominator, slope, shrink, -2.0 * fall


@triton.jit
def substep(sigma, ds, s, variance, eps):
    """Gain A, the gifts of beta and of 1 + e, and their derivatives."""
    s_clamped = tl.maximum(s, eps)
    a_s = (1.0 - s_clamped) / s_clamped
    _, _, _, denominator, slope, shrink, shrink_slope = posterior(sigma, s, variance, eps)
    rate = ds / tl.maximum(sigma, eps)
    pull = rate / denominator
    gain, gift = 1.0 + rate * (shrink / denominator), pull * s
    drift = pull * (variance * a_s / s_clamped - 1.0)
    gain_slope = pull * (shrink_slope - shrink * slope)
    drift_slope = pull * (2.0 * variance * a_s / s_clamped) - drift * slope
    return gain, gift, drift, gain_slope, -gift * slope, drift_slope


POINTERS = ("sigmas", "local", "sigma_src", "logstds", "keep", "table", "tangent")
INTEGERS = (
    "n_levels",
    "n_steps",
    "n_components",
    "sigma_b",
    "sigma_n",
    "local_b",
    "src_b",
    "std_b",
    "keep_b",
    "keep_k",
)
"""Not specialised, nor addresses on alignment: a handful of numbers is read, and no schedule should compile anew."""


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=POINTERS)
def gm_coefficients_kernel(
    sigmas, local, sigma_src, logstds, keep, table, tangent,
    n_levels, n_steps, n_components, eps, min_delta, temperature,
    sigma_b, sigma_n, local_b, src_b, std_b, keep_b, keep_k,
    MEAN: tl.constexpr, TANGENT: tl.constexpr, HAS_LOCAL: tl.constexpr, HAS_KEEP: tl.constexpr,
    K_TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """table (B, (N + 1) 7 + K): a row of seven for each substep, one with the output weights, K biases.

    Row n: A, B, and p_h, p_hd, p_m, p_q, p_G times log2(e). Row N: o_s, o_d, o_beta, o_y, o_own = o_s - o_d. Bias: 0,
    or -inf where a component is dropped (never all). `tangent`, laid out alike, takes the derivatives with respect to
    logstds. d, beta and 1 + e come from an associative scan over affine maps, all in float64. MEAN: the result is the
    mean velocity (DESIGN 4), or the one at the start.
    """
    sample = tl.program_id(0).to(tl.int64)
    zero = tl.full((), 0.0, tl.float64)
    eps = zero + eps
    s = tl.load(sigma_src + sample * src_b).to(tl.float64)
    std = tl.exp(tl.load(logstds + sample * std_b).to(tl.float64)) * s
    variance = std * std * (zero + temperature)
    sigmas += sample * sigma_b
    first = tl.load(sigmas).to(tl.float64)
    last = tl.load(sigmas + (n_levels - 1) * sigma_n).to(tl.float64)
    at_start = first != first
    if MEAN:
        at_start = first == last
        if HAS_LOCAL:
            at_start = at_start | (tl.load(local + sample * local_b) != 0)
    size = (n_steps + 1) * 7 + n_components
    table += sample * size
    tangent += sample * size

    d, beta, one_e = zero + 1.0, zero, zero + 1.0
    td, tbeta, tone_e = zero, zero, zero
    i = tl.arange(0, CHUNK)
    for begin in range(0, n_steps + 1, CHUNK):
        n = begin + i
        inside = n < n_steps
        # Level n - 1 leads to state n by its substep; level n weighs the logits of the next.
        before = tl.load(sigmas + tl.minimum(tl.maximum(n - 1, 0), n_levels - 1) * sigma_n).to(tl.float64)
        sigma = tl.load(sigmas + tl.minimum(n, n_levels - 1) * sigma_n).to(tl.float64)
        after = tl.load(sigmas + tl.minimum(n + 1, n_levels - 1) * sigma_n).to(tl.float64)
        ds_before = tl.where(at_start, tl.where(n == 1, -1.0, 0.0), sigma - before)
        ds = tl.where(at_start, tl.where(n == 0, -1.0, 0.0), after - sigma)
        before, sigma = tl.where(at_start, first, before), tl.where(at_start, first, sigma)
        gain, gift, drift, tgain, tgift, tdrift = substep(before, ds_before, s, variance, eps)
        moves = (n > 0) & (n <= n_steps)
        gain = tl.where(moves, gain, 1.0)
        gift, drift = tl.where(moves, gift, 0.0), tl.where(moves, drift, 0.0)
        if TANGENT:
            tgain = tl.where(moves, tgain, 0.0)
            tgift, tdrift = tl.where(moves, tgift, 0.0), tl.where(moves, tdrift, 0.0)
            gain, gift, drift, tgain, tgift, tdrift = tl.associative_scan(
                (gain, gift, drift, tgain, tgift, tdrift), 0, then_with_tangent
            )
        else:
            gain, gift, drift = tl.associative_scan((gain, gift, drift), 0, then)
        d_n, beta_n, one_e_n = gain * d, gain * beta + gift, gain * one_e + drift

        ratio, gap, zeta, denominator, slope, _, _ = posterior(sigma, s, variance, eps)
        gain_n, gift_n, _, tgain_n, tgift_n, _ = substep(sigma, ds, s, variance, eps)
        scale = -s / denominator * LOG2E
        p_h, p_hd = gap + ratio * (one_e_n - 1.0), ratio * d_n
        p_m, p_q = ratio * beta_n + zeta * s, 0.5 * zeta * s
        row = table + n * 7
        tl.store(row, gain_n, mask=inside)
        tl.store(row + 1, gift_n, mask=inside)
        tl.store(row + 2, scale * p_h, mask=inside)
        tl.store(row + 3, scale * p_hd, mask=inside)
        tl.store(row + 4, scale * p_m, mask=inside)
        tl.store(row + 5, scale * p_q, mask=inside)
        tl.store(row + 6, scale * ratio, mask=inside)

        divisor = zero - 1.0
        moved = 0.0
        if MEAN:
            divisor = tl.where(at_start, 1.0, tl.maximum(first - last, zero + min_delta))
            moved = 1.0
        end = n == n_steps
        tl.store(row, (one_e_n - moved) / -divisor, mask=end)
        tl.store(row + 1, (d_n - moved) / -divisor, mask=end)
        tl.store(row + 2, beta_n / -divisor, mask=end)
        tl.store(row + 3, -1.0 / divisor + tl.zeros_like(beta_n), mask=end)
        tl.store(row + 4, (one_e_n - d_n) / -divisor, mask=end)

        if TANGENT:
            td_n = tgain * d + gain * td
            tbeta_n = tgain * beta + gain * tbeta + tgift
            tone_e_n = tgain * one_e + gain * tone_e + tdrift
            trow = tangent + n * 7
            tl.store(trow, tgain_n, mask=inside)
            tl.store(trow + 1, tgift_n, mask=inside)
            tl.store(trow + 2, scale * (ratio * tone_e_n - slope * p_h), mask=inside)
            tl.store(trow + 3, scale * (ratio * td_n - slope * p_hd), mask=inside)
            tl.store(trow + 4, scale * (ratio * tbeta_n - slope * p_m), mask=inside)
            tl.store(trow + 5, -scale * slope * p_q, mask=inside)
            tl.store(trow + 6, -scale * slope * ratio, mask=inside)
            tl.store(trow, tone_e_n / -divisor, mask=end)
            tl.store(trow + 1, td_n / -divisor, mask=end)
            tl.store(trow + 2, tbeta_n / -divisor, mask=end)
            tl.store(trow + 3, tl.zeros_like(beta_n), mask=end)
            td, tbeta, tone_e = last_of(td_n, i, CHUNK), last_of(tbeta_n, i, CHUNK), last_of(tone_e_n, i, CHUNK)
        d, beta, one_e = last_of(d_n, i, CHUNK), last_of(beta_n, i, CHUNK), last_of(one_e_n, i, CHUNK)

    k = tl.arange(0, K_TILE)
    bias = tl.zeros((K_TILE,), tl.float32)
    if HAS_KEEP:
        stays = tl.load(keep + sample * keep_b + k * keep_k, mask=k < n_components, other=0) != 0
        some = tl.max(stays.to(tl.int32), axis=0) > 0
        bias = tl.where(stays | (some == 0), 0.0, float("-inf"))
    tl.store(table + (n_steps + 1) * 7 + k, bias, mask=k < n_components)


@triton.jit
def last_of(values, i, CHUNK: tl.constexpr):
    return tl.sum(tl.where(i == CHUNK - 1, values, 0.0), axis=0)
