"""The collapsed GM rollout (DESIGN 2.2) in plain PyTorch operations, over blocks of pixels that stay in cache.

Arguments are canonical (see `piflow_kernels.arguments`); a block holds, contiguous and in the computing dtype,

    means (B, K, C, P), logweights (B, K, P), x_src and delta (B, C, P)        P pixels of B samples

Gram space carries b (B, K, P) through the substeps and never looks at the channels again; channel space carries
y = sum_k b_k vt_k (B, C, P). The adjoints run the same recursions in reverse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .coefficients import Coefficients

BLOCK_ELEMENTS = 1 << 20
"""Elements of the array that a substep reads: 4 MB in float32, so that it stays in the cores' second-level caches."""


def gram_space_is_cheaper(n_components: int, n_channels: int, n_substeps: int) -> bool:
    """Multiply-adds per pixel of the two forms (DESIGN 2.2); a single velocity is always channel space."""
    k, c, n = n_components, n_channels, n_substeps
    return n > 1 and k * (k + 1) * c / 2 + 2 * k * c + n * k * k < 2 * k * c * n


class Block(NamedTuple):
    means: Tensor
    logweights: Tensor
    x_src: Tensor
    delta: Tensor


class Region(NamedTuple):
    """A range of samples and a range along one spatial axis; the other axes are whole."""

    samples: slice
    axis: int
    positions: slice

    def of(self, tensor: Tensor, leading: int) -> Tensor:
        """The part of (B, ..., *S) in this region, where `leading` axes come before the spatial ones."""
        return tensor[(self.samples, *[slice(None)] * (leading - 1 + self.axis), self.positions)]


def regions(batch: int, spatial: tuple[int, ...], elements_per_pixel: int) -> Iterator[Region]:
    """Cover (B, *S) by regions of about BLOCK_ELEMENTS / elements_per_pixel pixels."""
    n_pixels = 1
    for size in spatial:
        n_pixels *= size
    if batch * n_pixels == 0:
        return
    budget = max(BLOCK_ELEMENTS // elements_per_pixel, 1)
    axis = max(range(len(spatial)), key=lambda i: spatial[i])
    samples = max(min(budget // n_pixels, batch), 1)
    length = max(min(budget * spatial[axis] // (samples * n_pixels), spatial[axis]), 1)
    for b in range(0, batch, samples):
        for i in range(0, spatial[axis], length):
            yield Region(slice(b, min(b + samples, batch)), axis, slice(i, min(i + length, spatial[axis])))


def read_block(
    region: Region, x_start: Tensor, x_src: Tensor, means: Tensor, logweights: Tensor, dtype: torch.dtype
) -> Block:
    def flat(tensor: Tensor, leading: int) -> Tensor:
        part = region.of(tensor, leading).to(dtype)
        return part.reshape(*part.shape[:leading], -1)

    x_s = flat(x_src, 2)
    return Block(flat(means, 3), flat(logweights, 3)[:, :, 0], x_s, flat(x_start, 2) - x_s)


def per_sample_step(steps: Tensor, n: int) -> tuple[Tensor, ...]:
    """A, B, p_h, p_hd, p_m, p_q, p_G of substep n, each (B, 1, 1)."""
    return steps[:, n, :, None, None].unbind(1)


# Sums of products below run as fused multiply-adds over the summed axis: a product (B, K, C, P) written out and read
# back for its sum costs twice the time. Only where the other axis is short does the overhead per operation cost more.


def combine(weights: Tensor, vectors: Tensor) -> Tensor:
    """sum_k weights_k vectors_k: (B, K, P), (B, K, C, P) -> (B, C, P)."""
    if vectors.shape[1] > 2 * vectors.shape[2]:
        return (weights[:, :, None] * vectors).sum(1)
    total = weights[:, 0, None] * vectors[:, 0]
    for k in range(1, vectors.shape[1]):
        total.addcmul_(weights[:, k, None], vectors[:, k])
    return total


def dot(vectors: Tensor, state: Tensor) -> Tensor:
    """vectors_k . state: (B, K, C, P), (B, C, P) -> (B, K, P)."""
    total = vectors[:, :, 0] * state[:, None, 0]
    for c in range(1, vectors.shape[2]):
        total.addcmul_(vectors[:, :, c], state[:, None, c])
    return total


def gram_matrix(vectors: Tensor) -> Tensor:
    """vectors_k . vectors_j: (B, K, C, P) -> (B, K, K, P)."""
    total = vectors[:, :, None, 0] * vectors[:, None, :, 0]
    for c in range(1, vectors.shape[2]):
        total.addcmul_(vectors[:, :, None, c], vectors[:, None, :, c])
    return total


def softmax_adjoint(w: Tensor, w_bar: Tensor) -> Tensor:
    return w * (w_bar - (w * w_bar).sum(1, keepdim=True))


class GramSpace:
    """b <- A b + B softmax(L(b)) with the products of velocities taken once."""

    def __init__(self, block: Block, steps: Tensor) -> None:
        self.block, self.steps = block, steps
        self.vbar = block.means.mean(1)
        self.vt = block.means - self.vbar[:, None]
        self.gram = gram_matrix(self.vt)
        self.columns = self.gram.unbind(2)
        features = [block.logweights, dot(self.vt, block.x_src), dot(self.vt, block.delta), dot(self.vt, self.vbar)]
        features.append(torch.diagonal(self.gram, dim1=1, dim2=2).movedim(-1, 1))
        self.features = torch.stack(features, dim=1)  # (B, 5, K, P): logweights, h, hd, m, q

    def feature_weights(self) -> Tensor:
        """(B, N, 5): what each substep's logits take of the features."""
        return torch.cat([torch.ones_like(self.steps[..., :1]), self.steps[..., 2:6]], dim=-1)

    def gram_times(self, b: Tensor) -> Tensor:
        total = self.columns[0] * b[:, None, 0]
        for column, b_k in zip(self.columns[1:], b.unbind(1)[1:]):
            total.addcmul_(column, b_k[:, None])
        return total

    def forward(self, history: list[tuple[Tensor, Tensor, Tensor]] | None = None) -> Tensor:
        """y_N = sum_k b_{N,k} vt_k, (B, C, P); (b_n, w_n, G b_n) of every substep go to `history`."""
        batch, _, k, p = self.features.shape
        # The part of the logits that b does not move, of all substeps in one matrix product.
        fixed = torch.bmm(self.feature_weights(), self.features.reshape(batch, 5, k * p)).reshape(batch, -1, k, p)
        b = torch.zeros_like(self.block.logweights)
        for n in range(self.steps.shape[1]):
            gain, gift, *_, p_gram = per_sample_step(self.steps, n)
            gram_b = self.gram_times(b)
            w = torch.softmax(torch.addcmul(fixed[:, n], gram_b, p_gram), dim=1)
            if history is not None:
                history.append((b, w, gram_b))
            b = torch.addcmul(w * gift, b, gain)
        self.b = b
        return combine(b, self.vt)

    def backward(self, y_bar: Tensor) -> tuple[Tensor, Block, Tensor]:
        """y_N and, given its adjoint, those of the block's arrays and of the steps (B, N, 7)."""
        block, vt = self.block, self.vt
        history: list[tuple[Tensor, Tensor, Tensor]] = []
        y = self.forward(history)
        batch, _, k, p = self.features.shape
        n_steps = self.steps.shape[1]
        b_bar = dot(vt, y_bar)
        gram_bar = torch.zeros_like(self.gram)
        logits_bar = self.features.new_empty(batch, n_steps, k, p)
        steps_bar = torch.zeros_like(self.steps)
        for n in reversed(range(n_steps)):
            gain, gift, *_, p_gram = per_sample_step(self.steps, n)
            b, w, gram_b = history.pop()
            steps_bar[:, n, 0] = (b_bar * b).sum((1, 2))
            steps_bar[:, n, 1] = (b_bar * w).sum((1, 2))
            l_bar = softmax_adjoint(w, b_bar * gift)
            logits_bar[:, n] = l_bar
            steps_bar[:, n, 6] = (l_bar * gram_b).sum((1, 2))
            through_gram = l_bar * p_gram
            gram_bar.addcmul_(through_gram[:, :, None], b[:, None])
            b_bar = torch.addcmul(self.gram_times(through_gram), b_bar, gain)

        flat_bar = logits_bar.reshape(batch, n_steps, k * p)
        features = self.features.reshape(batch, 5, k * p)
        steps_bar[..., 2:6] = torch.bmm(flat_bar, features.transpose(1, 2))[..., 1:]
        features_bar = torch.bmm(self.feature_weights().transpose(1, 2), flat_bar).reshape(batch, 5, k, p)
        logweights_bar, h_bar, hd_bar, m_bar, q_bar = features_bar.unbind(1)

        vt_bar = self.b[:, :, None] * y_bar[:, None]
        for k_bar, state in ((h_bar, block.x_src), (hd_bar, block.delta), (m_bar, self.vbar)):
            vt_bar.addcmul_(k_bar[:, :, None], state[:, None])
        vt_bar.addcmul_(q_bar[:, :, None], vt, value=2)
        symmetric = gram_bar + gram_bar.transpose(1, 2)
        for j in range(k):
            vt_bar.addcmul_(symmetric[:, :, j, None], vt[:, j, None])
        vbar_bar = combine(m_bar, vt)
        means_bar = vt_bar.add_(((vbar_bar - vt_bar.sum(1)) / k)[:, None])
        return y, Block(means_bar, logweights_bar, combine(h_bar, vt), combine(hd_bar, vt)), steps_bar


class ChannelSpace:
    """y <- A y + B sum_k softmax(L(y))_k vt_k, reading the velocities in every substep."""

    def __init__(self, block: Block, steps: Tensor) -> None:
        self.block, self.steps = block, steps
        self.vbar = block.means.mean(1)
        self.vt = block.means - self.vbar[:, None]
        self.q = (self.vt**2).sum(2)

    def probe_and_weights(self, n: int, y: Tensor) -> tuple[Tensor, Tensor]:
        """z_n, with which the logits are logweights + p_q q + vt . z_n, and their softmax."""
        _, _, p_h, p_hd, p_m, p_q, p_gram = per_sample_step(self.steps, n)
        z = p_h * self.block.x_src + p_hd * self.block.delta + p_m * self.vbar + p_gram * y
        return z, torch.softmax(torch.addcmul(self.block.logweights, self.q, p_q) + dot(self.vt, z), dim=1)

    def forward(self, history: list[Tensor] | None = None) -> Tensor:
        """y_N, (B, C, P); y_n of every substep go to `history`."""
        y = torch.zeros_like(self.vbar)
        for n in range(self.steps.shape[1]):
            if history is not None:
                history.append(y)
            gain, gift, *_ = per_sample_step(self.steps, n)
            _, w = self.probe_and_weights(n, y)
            y = torch.addcmul(combine(w, self.vt) * gift, y, gain)
        return y

    def backward(self, y_bar: Tensor) -> tuple[Tensor, Block, Tensor]:
        """y_N and, given its adjoint, those of the block's arrays and of the steps (B, N, 7)."""
        block, vt = self.block, self.vt
        history: list[Tensor] = []
        y_end = self.forward(history)
        vt_bar = torch.zeros_like(vt)
        x_src_bar, delta_bar, vbar_bar = torch.zeros_like(y_bar), torch.zeros_like(y_bar), torch.zeros_like(y_bar)
        logweights_bar, q_bar = torch.zeros_like(block.logweights), torch.zeros_like(block.logweights)
        steps_bar = torch.zeros_like(self.steps)
        for n in reversed(range(self.steps.shape[1])):
            gain, gift, p_h, p_hd, p_m, p_q, p_gram = per_sample_step(self.steps, n)
            y = history.pop()
            z, w = self.probe_and_weights(n, y)
            mixed_bar = y_bar * gift
            l_bar = softmax_adjoint(w, dot(vt, mixed_bar))
            z_bar = combine(l_bar, vt)
            vt_bar.addcmul_(w[:, :, None], mixed_bar[:, None])
            vt_bar.addcmul_(l_bar[:, :, None], z[:, None])
            logweights_bar += l_bar
            q_bar.addcmul_(l_bar, p_q)
            x_src_bar.addcmul_(z_bar, p_h)
            delta_bar.addcmul_(z_bar, p_hd)
            vbar_bar.addcmul_(z_bar, p_m)
            pairs = (
                (y_bar, y),
                (y_bar, combine(w, vt)),
                (z_bar, block.x_src),
                (z_bar, block.delta),
                (z_bar, self.vbar),
                (l_bar, self.q),
                (z_bar, y),
            )
            steps_bar[:, n] = torch.stack([(bar * value).sum((1, 2)) for bar, value in pairs], dim=-1)
            y_bar = torch.addcmul(z_bar * p_gram, y_bar, gain)
        vt_bar.addcmul_(q_bar[:, :, None], vt, value=2)
        means_bar = vt_bar.add_(((vbar_bar - vt_bar.sum(1)) / vt.shape[1])[:, None])
        return y_end, Block(means_bar, logweights_bar, x_src_bar, delta_bar), steps_bar


def spaces(
    x_start: Tensor, x_src: Tensor, means: Tensor, logweights: Tensor, coefficients: Coefficients
) -> Iterator[tuple[Region, GramSpace | ChannelSpace, Tensor]]:
    """Each region of pixels with its arrays in the form that is cheaper, and its `out` weights (B, 4, 1, 1)."""
    batch, n_components, n_channels, *spatial = means.shape
    dtype = x_start.dtype
    steps, out = coefficients.steps.to(dtype), coefficients.out.to(dtype)[:, :, None, None]
    gram = gram_space_is_cheaper(n_components, n_channels, steps.shape[1])
    for region in regions(batch, tuple(spatial), n_components * (n_components if gram else n_channels)):
        block = read_block(region, x_start, x_src, means, logweights, dtype)
        space = GramSpace if gram else ChannelSpace
        yield region, space(block, steps[region.samples]), out[region.samples]


def gm_integrate(
    x_start: Tensor, x_src: Tensor, means: Tensor, logweights: Tensor, coefficients: Coefficients
) -> Tensor:
    """o_s x_src + o_d delta + o_beta vbar + o_y y_N, shaped and laid out as x_start."""
    result = torch.empty_like(x_start)
    for region, space, out in spaces(x_start, x_src, means, logweights, coefficients):
        o_s, o_d, o_beta, o_y = out.unbind(1)
        y = space.forward()
        value = o_s * space.block.x_src + o_d * space.block.delta + o_beta * space.vbar + o_y * y
        target = region.of(result, 2)
        target.copy_(value.reshape(target.shape))
    return result


class Adjoints(NamedTuple):
    x_start: Tensor
    x_src: Tensor
    means: Tensor
    logweights: Tensor
    coefficients: Coefficients


def gm_integrate_backward(
    grad: Tensor, x_start: Tensor, x_src: Tensor, means: Tensor, logweights: Tensor, coefficients: Coefficients
) -> Adjoints:
    """Adjoints of everything `gm_integrate` takes, given that of its result."""
    result = Adjoints(
        torch.empty_like(x_start),
        torch.empty_like(x_src),
        torch.empty_like(means),
        torch.empty_like(logweights),
        Coefficients(torch.zeros_like(coefficients.steps), torch.zeros_like(coefficients.out)),
    )
    for region, space, out in spaces(x_start, x_src, means, logweights, coefficients):
        o_s, o_d, o_beta, o_y = out.unbind(1)
        block = space.block
        g = region.of(grad, 2).to(x_start.dtype)
        g = g.reshape(*g.shape[:2], -1)
        y, bar, steps_bar = space.backward(o_y * g)
        means_bar = bar.means.add_((o_beta * g / block.means.shape[1])[:, None])
        delta_bar = bar.delta + o_d * g
        x_src_bar = bar.x_src + o_s * g - delta_bar
        written = ((result.x_start, delta_bar, 2), (result.x_src, x_src_bar, 2), (result.means, means_bar, 3))
        for target, value, leading in (*written, (result.logweights, bar.logweights, 3)):
            part = region.of(target, leading)
            part.copy_(value.reshape(part.shape))
        states = (block.x_src, block.delta, space.vbar, y)
        result.coefficients.steps[region.samples] += steps_bar
        result.coefficients.out[region.samples] += torch.stack([(g * state).sum((1, 2)) for state in states], dim=-1)
    return result
