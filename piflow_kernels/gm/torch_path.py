"""The collapsed GM rollout (docs/collapses.md) in plain PyTorch operations, over blocks of pixels that stay in cache.

Arguments are canonical (see `piflow_kernels.arguments`); a block holds, contiguous and in the computing dtype,

    vt (B, K, C, P), logweights (B, K, P), x_src, delta and vbar (B, C, P)        P pixels of B samples

Gram space carries b (B, K, P) through the substeps and never looks at the channels again; channel space carries
y = sum_k b_k vt_k (B, C, P). The adjoints run the same recursions in reverse from what the forward pass kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .coefficients import Coefficients

BLOCK_ELEMENTS = 1 << 20
"""Elements, per thread, of the array that a substep reads: 4 MB in float32.

Half of a second-level cache would be read faster, but threads that meet after every operation want it long.
"""
SLICE_ELEMENTS = 1 << 15
"""Elements, per block, from which on an operation's own time outweighs the overhead of calling it."""
RESIDENT_ELEMENTS = 1 << 18
"""Elements of what many operations in a row add to: 1 MB in float32 stays in the second-level caches."""


def gram_space_is_cheaper(n_components: int, n_channels: int, n_substeps: int) -> bool:
    """Multiply-adds per pixel of the two forms (docs/collapses.md); a single velocity is always channel space."""
    k, c, n = n_components, n_channels, n_substeps
    return n > 1 and k * (k + 1) * c / 2 + 2 * k * c + n * k * k < 2 * k * c * n


class Block(NamedTuple):
    """Component velocities about their mean, and what else a rollout starts from."""

    vt: Tensor
    vbar: Tensor
    logweights: Tensor
    x_src: Tensor
    delta: Tensor


class BlockAdjoints(NamedTuple):
    """Those of a block's arrays."""

    vt: OuterProducts
    vbar: Tensor
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

    def write(self, tensor: Tensor, value: Tensor, leading: int) -> None:
        """Write a block's values (B, ..., P) to this region of (B, ..., *S)."""
        written = self.of(tensor, leading)
        written.copy_(value.view(written.shape))


def regions(batch: int, spatial: tuple[int, ...], elements_per_pixel: int) -> Iterator[Region]:
    """Cover (B, *S) by regions of about BLOCK_ELEMENTS / elements_per_pixel pixels for each thread."""
    n_pixels = math.prod(spatial)
    if batch * n_pixels == 0:
        return
    budget = max(BLOCK_ELEMENTS * torch.get_num_threads() // elements_per_pixel, 1)
    axis = max(range(len(spatial)), key=lambda i: spatial[i])
    samples = max(min(budget // n_pixels, batch), 1)
    length = max(min(budget * spatial[axis] // (samples * n_pixels), spatial[axis]), 1)
    length = math.ceil(spatial[axis] / math.ceil(spatial[axis] / length))  # as many blocks, of even lengths
    for b in range(0, batch, samples):
        for i in range(0, spatial[axis], length):
            yield Region(slice(b, min(b + samples, batch)), axis, slice(i, min(i + length, spatial[axis])))


def flat(part: Tensor, leading: int, dtype: torch.dtype) -> Tensor:
    """(B, ..., *S) -> (B, ..., P) in `dtype`, contiguous."""
    return part.to(dtype).reshape(*part.shape[:leading], -1).contiguous()


def read_block(
    region: Region,
    x_start: Tensor,
    x_src: Tensor,
    means: Tensor,
    logweights: Tensor,
    keep: Tensor | None,
    temperature: float,
) -> Block:
    dtype = x_start.dtype
    part = region.of(means, 3)
    vbar = part.mean(1, dtype=dtype)
    vt = torch.sub(part, vbar[:, None], out=torch.empty(part.shape, dtype=dtype)).flatten(3)
    logits = flat(region.of(logweights, 3), 3, dtype)[:, :, 0]
    if temperature != 1:
        logits = logits / temperature
    if keep is not None:
        logits = logits.masked_fill(~keep[region.samples, :, None], -torch.inf)
    x_s = flat(region.of(x_src, 2), 2, dtype)
    return Block(vt, flat(vbar, 2, dtype), logits, x_s, flat(region.of(x_start, 2), 2, dtype) - x_s)


class SumOfProducts:
    """sum over `axis` of left * right (of as many axes), of what the two hold at each call; without that axis.

    It runs as fused multiply-adds over slices of the summed axis: products written out and read back for their sum
    would leave the cache. A slice is as thick as it takes to outweigh the overhead per operation; slices and the room
    for their products are made once, for a substep takes little longer than that.
    """

    def __init__(self, left: Tensor, right: Tensor, axis: int) -> None:
        size, shape = left.shape[axis], [max(sizes) for sizes in zip(left.shape, right.shape)]
        slice_elements = math.prod(shape) // size
        thickness = next(
            i for i in range(1, size + 1) if i == size or (size % i == 0 and i * slice_elements >= SLICE_ELEMENTS)
        )
        shape[axis] = thickness
        self.axis = axis
        self.pairs = list(zip(left.split(thickness, axis), right.split(thickness, axis)))
        self.products = left.new_empty(shape) if thickness > 1 else None

    def into(self, out: Tensor) -> Tensor:
        total = out.unsqueeze(self.axis) if self.products is None else self.products
        torch.mul(*self.pairs[0], out=total)
        for pair in self.pairs[1:]:
            total.addcmul_(*pair)
        return out if self.products is None else torch.sum(total, self.axis, out=out)

    def added_to(self, out: Tensor) -> Tensor:
        if self.products is not None:
            torch.mul(*self.pairs[0], out=self.products)
            for pair in self.pairs[1:]:
                self.products.addcmul_(*pair)
            return out.add_(self.products.sum(self.axis))
        total = out.unsqueeze(self.axis)
        for pair in self.pairs:
            total.addcmul_(*pair)
        return out


class OuterProducts:
    """An adjoint of the velocities that is never stored: sum_j w_j v_j + r vt with w_j, r (B, K, P) and v_j (B, C, P).

    It is taken up slice by slice of the components, each of which stays in cache over all terms.
    """

    def __init__(self, terms: list[tuple[Tensor, Tensor]], vt: Tensor, own: Tensor) -> None:
        self.terms, self.vt, self.own = terms, vt, own

    def sum(self) -> Tensor:
        """Over the components, (B, C, P)."""
        total = SumOfProducts(self.vt, self.own[:, :, None], 1).into(torch.empty_like(self.vt[:, 0]))
        for weights, vector in self.terms:
            total.addcmul_(weights.sum(1, keepdim=True), vector)
        return total

    def write(self, out: Tensor, offset: Tensor) -> None:
        """Write it plus `offset` (B, C, P) to out (B, K, C, *S) of any layout and dtype."""
        spatial, dtype = out.shape[3:], self.vt.dtype
        thickness = max(RESIDENT_ELEMENTS // max(offset.numel(), 1), 1)
        expanded = [
            (weights.unflatten(2, spatial)[:, :, None], vector.unflatten(2, spatial)[:, None])
            for weights, vector in self.terms
        ]
        own, vt = self.own.unflatten(2, spatial)[:, :, None], self.vt.unflatten(3, spatial)
        first = offset.unflatten(2, spatial)[:, None]
        direct = out.dtype == dtype and out[0, 0, 0].is_contiguous()  # else all terms would go through its strides
        for k in range(0, out.shape[1], thickness):
            part = slice(k, k + thickness)
            written = out[:, part]
            total = written if direct else self.vt.new_empty(written.shape)
            torch.addcmul(first, own[:, part], vt[:, part], out=total)
            for weights, vector in expanded:
                total.addcmul_(weights[:, part], vector)
            if total is not written:
                written.copy_(total)


def softmax_terms(logits: Tensor) -> Tensor:
    """Overwrites logits (B, K, P) by e with softmax = e / sum_k e_k and returns the sum, (B, 1, P).

    Weights below e^-60 of the largest count as that: as denormal numbers they would take a hundred times the time.
    """
    return logits.sub_(logits.amax(1, keepdim=True)).clamp_(min=-60).exp_().sum(1, keepdim=True)


def normalised(e: Tensor, total: Tensor, out: Tensor) -> Tensor:
    """The softmax, where weights as small as that are zero."""
    return torch.threshold_(torch.div(e, total, out=out), 1e-26, 0.0)


def softmax_adjoint(w: Tensor, w_bar: Tensor, out: Tensor) -> Tensor:
    torch.mul(w, w_bar, out=out)
    return out.addcmul_(w, out.sum(1, keepdim=True), value=-1)


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of what two histories hold of each substep, (B, N, ., P): (B, N, 1)."""
    return (left * right).sum((2, 3))[..., None]


class Space:
    """What the two forms share: a block, its coefficients, products of its velocities with what two arrays hold."""

    def __init__(self, block: Block, steps: Tensor) -> None:
        self.block, self.steps = block, steps
        # A, B, p_h, p_hd, p_m, p_q, p_G of each substep, each (B, 1, 1).
        self.scalars = [step.unbind(0) for step in steps.permute(1, 2, 0)[..., None, None].unbind(0)]
        self.vector, self.weights = torch.empty_like(block.vbar), torch.empty_like(block.logweights)
        self.dot = SumOfProducts(block.vt, self.vector[:, None], 2)  # vt_k . vector, (B, K, P)
        self.combine = SumOfProducts(block.vt, self.weights[:, :, None], 1)  # sum_k weights_k vt_k, (B, C, P)

    def history(self, like: Tensor) -> Tensor:
        """Room for one array like (B, ., P) of each substep, (B, N, ., P)."""
        return like.new_empty(like.shape[0], self.steps.shape[1], *like.shape[1:])


class GramSpace(Space):
    """b <- A b + B softmax(L(b)) with the products of velocities taken once."""

    def __init__(self, block: Block, steps: Tensor) -> None:
        super().__init__(block, steps)
        batch, k, _, p = block.vt.shape
        self.gram = block.vt.new_empty(batch, k, k, p)
        # Logweights, h, hd, m, q: the part of the logits that b does not move is a matrix product with them.
        self.features = block.vt.new_empty(batch, 5, k, p)
        self.features[:, 0] = block.logweights
        states = torch.stack([block.x_src, block.delta, block.vbar], dim=1)
        by_component = block.vt[:, None]
        SumOfProducts(block.vt[:, :, None], by_component, 3).into(self.gram)
        SumOfProducts(states[:, :, None], by_component, 3).into(self.features[:, 1:4])  # h, hd, m
        self.features[:, 4] = torch.diagonal(self.gram, dim1=1, dim2=2).movedim(-1, 1)
        self.feature_weights = torch.cat([torch.ones_like(steps[..., :1]), steps[..., 2:6]], dim=-1)  # (B, N, 5)
        self.gram_times_weights = SumOfProducts(self.gram, self.weights[:, None], 2)  # (B, K, P)

    def forward(self, keep_history: bool = False) -> Tensor:
        """y_N = sum_k b_{N,k} vt_k, (B, C, P); b_n and the softmax of every substep are kept for `backward`."""
        b, gram_b, logits = self.weights.zero_(), torch.empty_like(self.weights), torch.empty_like(self.weights)
        if keep_history:
            self.bs, self.ws = self.history(b), self.history(b)
        for n, (gain, gift, *_, p_gram) in enumerate(self.scalars):
            if n % 4 == 0:
                fixed = torch.bmm(self.feature_weights[:, n : n + 4], self.features.flatten(2))
                fixed_logits = fixed.unflatten(2, b.shape[1:]).unbind(1)
            e = torch.addcmul(fixed_logits[n % 4], self.gram_times_weights.into(gram_b), p_gram, out=logits)
            total = softmax_terms(e)
            if keep_history:
                self.bs[:, n] = b
                normalised(e, total, out=self.ws[:, n])
            b.mul_(gain).addcmul_(e, gift / total)
        self.b = b.clone()
        return self.combine.into(torch.empty_like(self.vector))

    def backward(self, y_bar: Tensor) -> tuple[BlockAdjoints, Tensor]:
        """Given the adjoint of y_N, those of the block's arrays and of the steps (B, N, 7)."""
        block, l_bar = self.block, self.weights
        self.vector.copy_(y_bar)
        b_bar = self.dot.into(torch.empty_like(l_bar))
        b_bars, l_bars, gram_ls = (self.history(b_bar) for _ in range(3))
        gram_bar = torch.zeros_like(self.gram)
        for n in reversed(range(len(self.scalars))):
            gain, gift, *_, p_gram = self.scalars[n]
            b_bars[:, n] = b_bar
            softmax_adjoint(self.ws[:, n], b_bar * gift, out=l_bar)
            l_bars[:, n] = l_bar
            gram_l = self.gram_times_weights.into(gram_ls[:, n])
            gram_bar.addcmul_((l_bar * p_gram)[:, :, None], self.bs[:, n, None])
            b_bar.mul_(gain).addcmul_(gram_l, p_gram)

        flat_bars = l_bars.flatten(2)
        features_bar = torch.bmm(self.feature_weights.mT, flat_bars).unflatten(2, b_bar.shape[1:])
        logweights_bar, h_bar, hd_bar, m_bar, q_bar = features_bar.unbind(1)
        terms, states_bar = [(self.b, y_bar)], []
        for k_bar, state in ((h_bar, block.x_src), (hd_bar, block.delta), (m_bar, block.vbar)):
            terms.append((k_bar, state))
            self.weights.copy_(k_bar)
            states_bar.append(self.combine.into(torch.empty_like(state)))
        symmetric = gram_bar + gram_bar.transpose(1, 2)
        terms += zip(symmetric.unbind(2), block.vt.unbind(1))
        vt_bar = OuterProducts(terms, block.vt, 2 * q_bar)
        x_src_bar, delta_bar, vbar_bar = states_bar
        through_features = torch.bmm(flat_bars, self.features[:, 1:].flatten(2).mT)
        through_b = [inner(b_bars, self.bs), inner(b_bars, self.ws)]
        steps_bar = torch.cat([*through_b, through_features, inner(gram_ls, self.bs)], dim=-1)
        return BlockAdjoints(vt_bar, vbar_bar, logweights_bar, x_src_bar, delta_bar), steps_bar


class ChannelSpace(Space):
    """y <- A y + B sum_k softmax(L(y))_k vt_k, reading the velocities in every substep.

    The logits are logweights + p_q q + vt . z with the probe z = p_h x_src + p_hd delta + p_m vbar + p_G y.
    """

    def __init__(self, block: Block, steps: Tensor) -> None:
        super().__init__(block, steps)
        self.q = SumOfProducts(block.vt, block.vt, 2).into(torch.empty_like(block.logweights))
        # What the probe is made of; y, the last, moves.
        self.states = torch.stack([block.x_src, block.delta, block.vbar, torch.zeros_like(block.vbar)], dim=1)
        self.probe_weights = torch.cat([steps[..., 2:5], steps[..., 6:]], dim=-1)  # (B, N, 4)

    def forward(self, keep_history: bool = False) -> Tensor:
        """y_N, (B, C, P); what `backward` needs of every substep is kept for it."""
        z, e, y = self.vector, self.weights, self.states[:, 3]
        mixed = torch.empty_like(z)
        flat_z, flat_states = z.flatten(1)[:, None], self.states.flatten(2)
        if keep_history:
            self.ys, self.zs, self.ws = self.history(y), self.history(z), self.history(e)
        for n, (gain, gift, *_, p_q, _) in enumerate(self.scalars):
            torch.bmm(self.probe_weights[:, n : n + 1], flat_states, out=flat_z)
            torch.addcmul(self.block.logweights, self.q, p_q, out=e)
            total = softmax_terms(self.dot.added_to(e))
            if keep_history:
                self.ys[:, n], self.zs[:, n] = y, z
                normalised(e, total, out=self.ws[:, n])
            y.mul_(gain).addcmul_(self.combine.into(mixed), gift / total)
        return y

    def backward(self, y_bar: Tensor) -> tuple[BlockAdjoints, Tensor]:
        """Given the adjoint of y_N, those of the block's arrays and of the steps (B, N, 7)."""
        l_bar, w_bar = self.weights, torch.empty_like(self.weights)
        y_bars, z_bars, l_bars = self.history(y_bar), self.history(y_bar), self.history(self.q)
        terms: list[tuple[Tensor, Tensor]] = []
        gift_bars = self.history(self.q[:, :1])
        for n in reversed(range(len(self.scalars))):
            gain, gift, *_, p_gram = self.scalars[n]
            w = self.ws[:, n]
            y_bars[:, n] = self.vector.copy_(y_bar)
            self.dot.into(w_bar)
            mean = torch.sum(torch.mul(w, w_bar, out=l_bar), 1, keepdim=True, out=gift_bars[:, n])
            l_bars[:, n] = torch.mul(w, w_bar.sub_(mean), out=l_bar).mul_(gift)
            z_bar = self.combine.into(z_bars[:, n])
            terms += [(w.mul_(gift), y_bars[:, n]), (l_bars[:, n], self.zs[:, n])]
            y_bar = (y_bar * gain).addcmul_(z_bar, p_gram)

        flat_z, flat_l = z_bars.flatten(2), l_bars.flatten(2)
        q_bar = torch.bmm(self.steps[..., 5:6].mT, flat_l).view_as(self.q)
        vt_bar = OuterProducts(terms, self.block.vt, 2 * q_bar)
        states_bar = torch.bmm(self.steps[..., 2:5].mT, flat_z).unflatten(2, y_bar.shape[1:])
        x_src_bar, delta_bar, vbar_bar = states_bar.unbind(1)
        through_y = [inner(y_bars, self.ys), gift_bars.sum((2, 3))[..., None]]
        through_states = torch.bmm(flat_z, self.states[:, :3].flatten(2).mT)
        through_q = torch.bmm(flat_l, self.q.flatten(1)[..., None])
        steps_bar = torch.cat([*through_y, through_states, through_q, inner(z_bars, self.ys)], dim=-1)
        return BlockAdjoints(vt_bar, vbar_bar, l_bars.sum(1), x_src_bar, delta_bar), steps_bar


class Part(NamedTuple):
    """One region of pixels: its arrays in the form that is cheaper, and its `out` weights, (B, 1, 1) each.

    The last weight is o_s - o_d, with which x_src counts where x_start is held: a difference taken in float64.
    """

    region: Region
    space: GramSpace | ChannelSpace
    out: tuple[Tensor, ...]

    def result(self, y: Tensor) -> Tensor:
        """o_s x_src + o_d delta + o_beta vbar + o_y y_N, (B, C, P)."""
        (o_s, o_d, o_beta, o_y, _), block = self.out, self.space.block
        return (o_s * block.x_src).addcmul_(block.delta, o_d).addcmul_(block.vbar, o_beta).addcmul_(y, o_y)


def parts(
    x_start: Tensor,
    x_src: Tensor,
    means: Tensor,
    logweights: Tensor,
    coefficients: Coefficients,
    keep: Tensor | None,
    temperature: float,
) -> Iterator[Part]:
    batch, n_components, n_channels, *spatial = means.shape
    steps, out = coefficients.steps, coefficients.out
    out = torch.cat([out, out[:, :1] - out[:, 1:2]], dim=1).to(x_start.dtype)[:, :, None, None]
    steps = steps.to(x_start.dtype)
    gram = gram_space_is_cheaper(n_components, n_channels, steps.shape[1])
    space = GramSpace if gram else ChannelSpace
    # Gram space reads K K values in a substep, but K C lie beside them.
    per_pixel = n_components * (n_channels if not gram else (n_components + n_channels + 1) // 2)
    for region in regions(batch, tuple(spatial), per_pixel):
        block = read_block(region, x_start, x_src, means, logweights, keep, temperature)
        yield Part(region, space(block, steps[region.samples]), out[region.samples].unbind(1))


def gm_integrate(
    x_start: Tensor,
    x_src: Tensor,
    means: Tensor,
    logweights: Tensor,
    coefficients: Coefficients,
    *,
    keep: Tensor | None = None,
    temperature: float = 1.0,
    target: Tensor | None = None,
) -> Tensor:
    """o_s x_src + o_d delta + o_beta vbar + o_y y_N, laid out as x_start; its mean square error (B,) given a target.

    keep: (B, K) bool, components that stay, at least one per sample. temperature: in (0, 1], divides the logweights.
    """
    result = torch.empty_like(x_start) if target is None else x_start.new_zeros(len(x_start))
    for part in parts(x_start, x_src, means, logweights, coefficients, keep, temperature):
        value = part.result(part.space.forward())
        if target is None:
            part.region.write(result, value, 2)
        else:
            error = value.sub_(flat(part.region.of(target, 2), 2, value.dtype))
            result[part.region.samples] += error.square_().sum((1, 2))
    return result if target is None else result / x_start[:1].numel()


class Adjoints(NamedTuple):
    x_start: Tensor
    x_src: Tensor
    means: Tensor
    logweights: Tensor
    coefficients: Coefficients
    target: Tensor | None = None


def gm_integrate_backward(
    grad: Tensor,
    x_start: Tensor,
    x_src: Tensor,
    means: Tensor,
    logweights: Tensor,
    coefficients: Coefficients,
    *,
    keep: Tensor | None = None,
    temperature: float = 1.0,
    target: Tensor | None = None,
) -> Adjoints:
    """Adjoints of everything `gm_integrate` takes, given that of its result."""
    result = Adjoints(
        torch.empty_like(x_start),
        torch.empty_like(x_src),
        torch.empty_like(means),
        torch.empty_like(logweights),
        Coefficients(*(torch.zeros_like(part) for part in coefficients)),
        None if target is None else torch.empty_like(target),
    )
    dtype = x_start.dtype
    for part in parts(x_start, x_src, means, logweights, coefficients, keep, temperature):
        region, space, block = part.region, part.space, part.space.block

        y = space.forward(keep_history=True)
        if target is None or result.target is None:
            g = flat(region.of(grad, 2), 2, dtype)
        else:
            error = part.result(y).sub_(flat(region.of(target, 2), 2, dtype))
            g = error.mul_((grad[region.samples] * (2 / x_start[:1].numel())).to(dtype)[:, None, None])
            region.write(result.target, -g, 2)
        _, o_d, o_beta, o_y, o_src = part.out
        bar, steps_bar = space.backward(o_y * g)
        region.write(result.x_start, bar.delta.addcmul(g, o_d), 2)
        region.write(result.x_src, (bar.x_src - bar.delta).addcmul_(g, o_src), 2)
        centre = bar.vbar.addcmul(g, o_beta).sub_(bar.vt.sum()).div_(means.shape[1])
        bar.vt.write(region.of(result.means, 3), centre)
        region.write(result.logweights, bar.logweights / temperature, 3)
        states = (block.x_src, block.delta, block.vbar, y)
        result.coefficients.steps[region.samples] += steps_bar
        result.coefficients.out[region.samples] += torch.stack([(g * state).sum((1, 2)) for state in states], dim=-1)
    return result
