"""The collapsed GM rollout (docs/collapses.md) compiled to C++ by inductor, for who asks for it (backend="inductor").

Three functions per space are compiled for each (K, C): what the substeps need, U substeps, and the result. Nothing else
is specialised: pixels lie in tiles of TILE, whose number is dynamic,

    means (T, K, C, TILE), states = x_src and x_start (T, 2, C, TILE), logits (T, K, TILE), steps (T, U, 7), out (T, 4)

each tile of one sample, the coefficients in float32 and everything in a softmax in units of log 2. The code is
written so that inductor makes one vectorised loop over pixels of it, whose values stay in the first-level cache.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .coefficients import Coefficients
from .torch_path import BLOCK_ELEMENTS, gram_space_is_cheaper, regions

LOG2_E = math.log2(math.e)
TILE = 64
LARGEST_BLOCK = 1 << 22
"""Elements of a block's tiles, 16 MB: calling a compiled function costs as much as 4000 pixel substeps of it."""
LARGEST_UNROLLED = 16
"""Components, in Gram space, or channels that are unrolled; compiling more would take minutes."""
TYPICAL_SUBSTEPS = 32
"""Decides between the spaces: for any other number nothing may be compiled again."""
EXAMPLE_TILES = 64
"""Enough that inductor writes parallel loops."""
FLOOR = -100.0
"""Least logit below the largest: weights of 2^-100 instead of denormal numbers, which cost a hundred cycles each."""

OPTIONS: dict[str, Any] = {
    "cpp.enable_floating_point_contract_flag": "fast",  # fused multiply-adds
    "max_fusion_size": 1 << 16,  # one loop over pixels, whatever is in it
    "cpp.max_horizontal_fusion_size": 1 << 16,
}
RECOMPUTING: dict[str, Any] = {  # only sums and what is `stored` go to memory
    "realize_reads_threshold": 1 << 16,
    "realize_opcount_threshold": 1 << 16,
    "realize_acc_reads_threshold": 1 << 16,
}


def stored(value: Tensor) -> Tensor:
    """The same value; where inductor would recompute it in each loop that reads it, it writes it to memory."""
    return value.as_strided(value.shape, value.stride())


def total(terms: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return total([a * b for a, b in zip(left, right)])


def in_pairs(operation: Callable[[Tensor, Tensor], Tensor], terms: Sequence[Tensor]) -> Tensor:
    """All terms combined; a chain, each waiting for the last, would take the processor three times as long."""
    while len(terms) > 1:
        terms = [*map(operation, terms[::2], terms[1::2]), *terms[len(terms) // 2 * 2 :]]
    return terms[0]


def centred(means: Tensor) -> tuple[list[Tensor], Tensor]:
    """vt_k, each (T, C, TILE), and vbar."""
    velocities = means.unbind(1)
    vbar = total(velocities) / len(velocities)
    return [v - vbar for v in velocities], vbar


def per_tile_step(steps: Tensor, n: int) -> tuple[Tensor, ...]:
    """A, B, p_h, p_hd, p_m, p_q, p_G of substep n, each (T, 1)."""
    return steps[:, n, :, None].unbind(1)


def combined(states: Tensor, vbar: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """o_s x_src + o_d delta + o_beta vbar + o_y y, (T, C, TILE)."""
    x_src, x_start = states.unbind(1)
    o_s, o_d, o_beta, o_y = out[:, :, None, None].unbind(1)
    return o_s * x_src + o_d * (x_start - x_src) + o_beta * vbar + o_y * y


# Gram space: the components are unrolled, so that a substep is straight-line code on K (K + 1) / 2 + 4 K vectors.


def pairs(n_components: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(n_components) for j in range(i, n_components)]


def gram_prepare(means: Tensor, states: Tensor) -> Tensor:
    """G_ij for i <= j, then h, hd and m: (T, K (K + 1) / 2 + 3 K, TILE)."""
    vt, vbar = centred(means)
    x_src, x_start = states.unbind(1)
    features = [vt[i] * vt[j] for i, j in pairs(len(vt))]
    for state in (x_src, x_start - x_src, vbar):
        features += [v * state for v in vt]
    return torch.stack([feature.sum(1) for feature in features], dim=1)


def gram_advance(features: Tensor, logits: Tensor, steps: Tensor, state: Tensor) -> Tensor:
    """b <- A b + B softmax(L(b)), U times: (T, K, TILE)."""
    b = list(state.unbind(1))
    k = len(b)
    rows = features.unbind(1)
    gram = {(i, j): row for (i, j), row in zip(pairs(k), rows)}
    gram |= {(j, i): row for (i, j), row in gram.items()}
    h, hd, m = (rows[-3 * k :][i * k : (i + 1) * k] for i in range(3))
    for n in range(steps.shape[1]):
        gain, gift, p_h, p_hd, p_m, p_q, p_gram = per_tile_step(steps, n)
        logit = [
            logits[:, i] + p_h * h[i] + p_hd * hd[i] + p_m * m[i] + p_q * gram[i, i]
            + p_gram * dot([gram[i, j] for j in range(k)], b)
            for i in range(k)
        ]  # fmt: skip
        largest = in_pairs(torch.maximum, logit)
        e = [torch.exp2((value - largest).clamp(min=FLOOR)) for value in logit]
        scale = gift / in_pairs(torch.add, e)
        b = [gain * b_i + scale * e_i for b_i, e_i in zip(b, e)]
    return torch.stack(b, dim=1)


def gram_finish(means: Tensor, states: Tensor, b: Tensor, out: Tensor) -> Tensor:
    vt, vbar = centred(means)
    return combined(states, vbar, dot(b[:, :, None].unbind(1), vt), out)


# Channel space: the channels are unrolled and the components are loops, one for the largest logit and one for all
# sums of the softmax, so that a substep is K iterations on 2 C + 2 vectors.


def channel_prepare(means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """vt (T, K, C, TILE), q (T, K, TILE) and vbar (T, C, TILE)."""
    vbar = stored(means.mean(1))
    vt = means - vbar[:, None]
    return vt, vt.square().sum(2), vbar


def channel_advance(
    vt: Tensor, q: Tensor, vbar: Tensor, states: Tensor, logits: Tensor, steps: Tensor, state: Tensor
) -> Tensor:
    """y <- A y + B sum_k softmax(L(y))_k vt_k, U times: (T, C, TILE)."""
    y = list(state.unbind(1))
    channels = vt.unbind(2)
    x_src, x_start = states.unbind(1)
    probes = [(x_src[:, c], x_start[:, c] - x_src[:, c], vbar[:, c]) for c in range(len(y))]
    for n in range(steps.shape[1]):
        gain, gift, p_h, p_hd, p_m, p_q, p_gram = per_tile_step(steps, n)
        z = [stored(dot((p_h, p_hd, p_m, p_gram), (*probe, y_c)))[:, None] for probe, y_c in zip(probes, y)]
        logit = logits + p_q[:, None] * q + dot(channels, z)
        e = torch.exp2((logit - logit.amax(1, keepdim=True)).clamp(min=FLOOR))
        scale = stored(gift / e.sum(1))
        y = [stored(gain * y_c + scale * (e * v_c).sum(1)) for y_c, v_c in zip(y, channels)]
    return torch.stack(y, dim=1)


def wide_advance(
    vt: Tensor, q: Tensor, vbar: Tensor, states: Tensor, logits: Tensor, steps: Tensor, y: Tensor
) -> Tensor:
    """`channel_advance` with loops over the channels too: slower, but compiled in seconds however many there are."""
    x_src, x_start = states.unbind(1)
    for n in range(steps.shape[1]):
        gain, gift, p_h, p_hd, p_m, p_q, p_gram = (p[..., None] for p in per_tile_step(steps, n))
        z = stored(dot((p_h, p_hd, p_m, p_gram), (x_src, x_start - x_src, vbar, y)))
        logit = logits + p_q * q + (vt * z[:, None]).sum(2)
        e = torch.exp2((logit - logit.amax(1, keepdim=True)).clamp(min=FLOOR))
        y = gain * y + gift / e.sum(1, keepdim=True) * (e[:, :, None] * vt).sum(1)
    return y


class Space(NamedTuple):
    """The compiled functions of one (K, C), and U, how many substeps one call of `advance` takes."""

    substeps: int
    prepare: Callable[..., Any]
    advance: Callable[..., Tensor]
    finish: Callable[..., Tensor]
    gram: bool


def check_compiler() -> None:
    from torch._inductor import config

    names = [name for name in config.cpp.cxx if name]
    if not any(shutil.which(name) for name in names):
        raise RuntimeError(
            f"backend: 'inductor' compiles C++ and found no {' or '.join(names)}; install a C++ compiler "
            "(g++, for example with 'apt install g++', or set CXX to one), or use backend='torch'"
        )


def compiled(function: Callable[..., Any], options: dict[str, Any], *shapes: tuple[int, ...]) -> Callable[..., Any]:
    """`function` for tensors (T, *shape), any T >= 2, compiled now."""
    # Dynamo keeps what it compiled with the code object: this one gets its own.
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    # Nothing is checked, because `space` is asked for just these shapes: no setting of the process compiles again.
    unchecked = {"guard_filter_fn": lambda guards: [False] * len(guards)}
    fast = torch.compile(own, fullgraph=True, dynamic=False, options=options | unchecked)

    def call(*tensors: Tensor) -> Any:
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, 0)
        return fast(*tensors)

    call(*(torch.zeros(EXAMPLE_TILES, *shape) for shape in shapes))
    return call


@functools.cache
def space(n_components: int, n_channels: int, n_threads: int) -> Space:
    """Compiles what a policy of K components and C channels needs on so many threads; later calls find it."""
    check_compiler()
    k, c = n_components, n_channels
    means, states, logits, out = (k, c, TILE), (2, c, TILE), (k, TILE), (4,)
    with torch.inference_mode(False), torch.no_grad():
        if k <= LARGEST_UNROLLED and gram_space_is_cheaper(k, c, TYPICAL_SUBSTEPS):
            u = min(max(512 // (k * k), 1), 8)
            features = (k * (k + 1) // 2 + 3 * k, TILE)
            return Space(
                u,
                compiled(gram_prepare, OPTIONS | RECOMPUTING, means, states),
                compiled(gram_advance, OPTIONS, features, logits, (u, 7), logits),
                compiled(gram_finish, OPTIONS | RECOMPUTING, means, states, logits, out),
                gram=True,
            )
        wide = c > LARGEST_UNROLLED
        u = 1 if wide else min(max(16 // c, 1), 4)
        advance, options = (wide_advance, OPTIONS) if wide else (channel_advance, OPTIONS | RECOMPUTING)
        state = (c, TILE)
        return Space(
            u,
            compiled(channel_prepare, OPTIONS | RECOMPUTING, means),
            compiled(advance, options, means, logits, state, states, logits, (u, 7), state),
            compiled(combined, OPTIONS, states, state, state, out),
            gram=False,
        )


def rollout(functions: Space, means: Tensor, states: Tensor, logits: Tensor, steps: Tensor, out: Tensor) -> Tensor:
    """Tiles (see above), steps (N / U, T, U, 7) -> (T, C, TILE)."""
    if functions.gram:
        features = functions.prepare(means, states)
        b = torch.zeros_like(logits)
        for step in steps:
            b = functions.advance(features, logits, step, b)
        return functions.finish(means, states, b, out)
    vt, q, vbar = functions.prepare(means)
    y = torch.zeros_like(vbar)
    for step in steps:
        y = functions.advance(vt, q, vbar, states, logits, step, y)
    return functions.finish(states, vbar, y, out)


def in_tiles(tiles: Tensor, samples: int) -> Tensor:
    """(T, *R, TILE) -> (S, *R, T / S, TILE), a view."""
    return tiles.unflatten(0, (samples, -1)).movedim(1, -2)


def write_tiles(tiles: Tensor, part: Tensor) -> None:
    """(S, *R, P) into (T, *R, TILE); the last tile of a sample may be filled in part."""
    whole, rest = divmod(part.shape[-1], TILE)
    view = in_tiles(tiles, len(part))
    view[..., :whole, :] = part[..., : whole * TILE].unflatten(-1, (whole, TILE))
    if rest:
        view[..., whole, :rest] = part[..., whole * TILE :]


def groups_of_steps(steps: Tensor, substeps: int) -> Tensor:
    """(B, N, 7) -> (ceil(N / U), B, U, 7) in float32 and units of log 2, filled up with substeps that do nothing."""
    idle = steps.new_tensor([1.0, *[0.0] * 6]).expand(len(steps), -steps.shape[1] % substeps, 7)
    filled = torch.cat([steps, idle], dim=1) * steps.new_tensor([1.0, 1.0, *[LOG2_E] * 5])
    return filled.float().unflatten(1, (filled.shape[1] // substeps, substeps)).movedim(1, 0)


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
    """o_s x_src + o_d delta + o_beta vbar + o_y y_N, shaped and laid out as x_start, or its mean square error (B,).

    Arguments as in `torch_path.gm_integrate`, states in float32. The first call of a (K, C) compiles (`space`).
    """
    with torch.inference_mode(False), torch.no_grad():
        batch, k, c, *spatial = means.shape
        result = torch.empty_like(x_start) if target is None else x_start.new_zeros(batch)
        if x_start.numel() == 0:
            return result if target is None else result / 0
        functions = space(k, c, torch.get_num_threads())
        steps, out = groups_of_steps(coefficients.steps, functions.substeps), coefficients.out.float()
        elements_per_pixel = k * (c + 4) * BLOCK_ELEMENTS * torch.get_num_threads() // LARGEST_BLOCK
        for region in regions(batch, tuple(spatial), max(elements_per_pixel, 1)):
            shape = region.of(x_start, 2).shape
            n_samples, n_pixels = shape[0], math.prod(shape[2:])
            per_sample = -(-n_pixels // TILE)
            used = n_samples * per_sample
            n_tiles = max(used, 2)  # of one, Dynamo would make a constant
            # What a last tile has too many is computed on as well: as zeros, because denormal numbers are slow.
            blank = torch.empty if n_tiles * TILE == n_samples * n_pixels else torch.zeros
            tile_means, states, logits = (blank(n_tiles, *rows, TILE) for rows in ((k, c), (2, c), (k,)))
            write_tiles(tile_means[:used], region.of(means, 3).flatten(3))
            write_tiles(states[:used, 0], region.of(x_src, 2).flatten(2))
            write_tiles(states[:used, 1], region.of(x_start, 2).flatten(2))
            raw_logits = region.of(logweights, 3).flatten(2).float() * (LOG2_E / temperature)
            if keep is not None:
                raw_logits.masked_fill_(~keep[region.samples, :, None], -torch.inf)
            write_tiles(logits[:used], raw_logits)
            sample = torch.arange(region.samples.start, region.samples.stop).repeat_interleave(per_sample)
            sample = sample.expand(n_tiles) if used == 1 else sample

            tile_result = rollout(functions, tile_means, states, logits, steps[:, sample], out[sample])
            value = in_tiles(tile_result[:used], n_samples).flatten(2)[..., :n_pixels].unflatten(2, shape[2:])
            if target is None:
                region.of(result, 2).copy_(value)
            else:
                result[region.samples] += (value - region.of(target, 2)).square().flatten(1).sum(1)
        return result if target is None else result / x_start[0].numel()
