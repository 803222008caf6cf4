"""Maximum mean discrepancy between two sets of features (Gretton et al. 2012) and KID (Binkowski et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from piflow.evaluation.neighbours import centred, checked, squared_distances

BLOCK = 2048  # rows: a block of kernel values has 32 MiB

Kernel = Literal["polynomial", "rbf"]


def mmd_squared(
    features_a: Tensor,
    features_b: Tensor,
    kernel: Kernel = "polynomial",
    bandwidth: float | None = None,
    *,
    paired: bool = False,
) -> float:
    """Unbiased estimate of MMD^2 between (N_a, D) and (N_b, D), in float64 and blocks; it may be below zero.

        mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j)

    Args:
        kernel: "polynomial" is (x . y / D + 1)^3, that of KID; "rbf" is exp(-|x - y|^2 / (2 bandwidth^2)).
        bandwidth: of the RBF kernel, above zero; by default the root mean square distance of two of `features_b`.
        paired: a_i and b_i come from the same noise. They are not independent, so the last mean is over i != j, without
            which the estimate is biased towards equal sets.

    Raises ValueError for fewer than two samples, other widths, values that are not finite, features without spread, a
    bandwidth that is none, or pairs of unequal number.
    """
    a, b = checked(features_a, features_b, least=2)
    if paired and len(a) != len(b):
        raise ValueError(f"pairs need as many samples on both sides, got {len(a)} and {len(b)}.")
    if kernel == "polynomial":
        compare = _polynomial(a.shape[1])
    else:
        compare = _rbf(rms_distance(b) if bandwidth is None else bandwidth)
        a, b = centred(a, b)
    within = sum(_mean(compare, x, x, diagonal=False) for x in (a, b))
    return within - 2 * _mean(compare, a, b, diagonal=not paired)


def kid(
    features_a: Tensor,
    features_b: Tensor,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    *,
    paired: bool = False,
) -> tuple[float, float]:
    """(mean, standard deviation) of MMD^2 with the polynomial kernel over random subsets of `subset_size` samples each.

    The subsets are drawn by a generator of their own. Where a set has no more than `subset_size` samples there is one
    estimate, from all samples of both, and no deviation (NaN). Pairs stay together in a subset. Raises ValueError as
    `mmd_squared`.
    """
    a, b = checked(features_a, features_b, least=2)
    if min(len(a), len(b)) <= subset_size:
        return mmd_squared(a, b, paired=paired), math.nan
    generator = torch.Generator().manual_seed(seed)
    estimates = []
    for _ in range(subsets):
        rows_a = torch.randperm(len(a), generator=generator)[:subset_size].to(a.device)
        rows_b = rows_a if paired else torch.randperm(len(b), generator=generator)[:subset_size].to(b.device)
        estimates.append(mmd_squared(a[rows_a], b[rows_b], paired=paired))
    found = torch.tensor(estimates, dtype=torch.float64)
    return found.mean().item(), found.std(unbiased=False).item()


def rms_distance(features: Tensor) -> float:
    """Root mean square distance of two different rows of (N, D): sqrt(2 tr covariance)."""
    features = features.double() - features[0].double()  # equal rows are then zero, whatever the rounding of a mean
    distance = math.sqrt(2 * features.var(dim=0).sum().item())
    if distance == 0:
        raise ValueError("features_b are all the same: the RBF kernel has no bandwidth. Give one.")
    return distance


def _polynomial(width: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: (x @ y.T / width + 1) ** 3


def _rbf(bandwidth: float) -> Callable[[Tensor, Tensor], Tensor]:
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be above zero, got {bandwidth}.")
    return lambda x, y: (squared_distances(x, y) / (-2 * bandwidth**2)).exp()


def _mean(compare: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, *, diagonal: bool) -> float:
    """Mean of k(x_i, y_j), without i = j unless `diagonal`."""
    total = 0.0
    for i, rows in enumerate(x.split(BLOCK)):
        for j, columns in enumerate(y.split(BLOCK)):
            values = compare(rows, columns)
            total += values.sum().item()
            if not diagonal and i == j:
                total -= values.diagonal().sum().item()
    return total / (len(x) * (len(y) if diagonal else len(y) - 1))
