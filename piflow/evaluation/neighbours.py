"""Metrics of nearest neighbours in feature space: precision, recall, coverage; and of pairs: diversity."""

from __future__ import annotations

import torch
from torch import Tensor

from piflow.evaluation.frechet import check_matrix

BLOCK = 2048  # rows: a block of distances has 32 MiB
ROUNDING = 1e-12  # of a squared distance, relative to the squares that it is the difference of


def precision_recall(samples: Tensor, reference: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991) of features (N, D) and (M, D).

    The manifold of a set is the union of balls around its members, each as wide as the distance to the k-th nearest
    other member. Precision is the share of samples in the manifold of the reference, recall that of the reference in
    the manifold of the samples.

    Raises ValueError for other widths, values that are not finite, and sets of k samples or fewer.
    """
    samples, reference = checked(samples, reference, least=k + 1)
    samples, reference = centred(samples, reference)
    return _inside(samples, reference, k).double().mean().item(), _inside(reference, samples, k).double().mean().item()


def coverage(samples: Tensor, reference: Tensor, k: int = 5, *, paired: bool = False) -> float:
    """Share of reference features (M, D) in whose ball, to the k-th nearest other one, a sample of (N, D) lies.

    Naeem et al. 2020, arXiv 2002.09797; 1 - 2^-k is what equal distributions reach. With `paired`, sample i comes from
    the same noise as reference i and does not count for it: it would lie there whatever the others do.

    Raises ValueError as `precision_recall`; one sample is enough, or as many as there are in the reference for pairs.
    """
    samples, reference = checked(samples, reference, least=1)
    if len(reference) <= k:
        raise ValueError(f"reference: coverage with k = {k} needs at least {k + 1} samples, got {len(reference)}.")
    if paired and len(samples) != len(reference):
        raise ValueError(f"pairs need as many samples on both sides, got {len(samples)} and {len(reference)}.")
    samples, reference = centred(samples, reference)
    covered = []
    for i, rows in enumerate(reference.split(BLOCK)):
        radius = _radii(rows, reference, k)
        nearest = torch.full_like(radius, torch.inf)
        for j, columns in enumerate(samples.split(BLOCK)):
            distance = squared_distances(rows, columns) - _rounding(rows, columns)
            if paired and i == j:
                distance.fill_diagonal_(torch.inf)
            nearest = torch.minimum(nearest, distance.amin(dim=1))
        covered.append(nearest <= radius)
    return torch.cat(covered).double().mean().item()


def diversity(features: Tensor, groups: Tensor) -> dict[int, float]:
    """{group: mean Euclidean distance of two of its samples} of features (N, D), groups (N,) being classes or prompts.

    Groups of one sample have no pair and are left out. Raises ValueError for other lengths or values not finite.
    """
    check_matrix("features", features)
    if groups.shape != features.shape[:1]:
        raise ValueError(f"groups must have shape ({len(features)},), one for each sample, got {tuple(groups.shape)}.")
    features, found = features.detach().double(), {}
    for group in groups.unique().tolist():
        members = features[groups == group]
        if (n := len(members)) > 1:
            members = members - members[0]  # exactly zero for equal samples
            total = 0.0
            for i, rows in enumerate(members.split(BLOCK)):
                for j, columns in enumerate(members.split(BLOCK)):
                    distances = squared_distances(rows, columns).sqrt()
                    total += distances.sum().item()
                    if i == j:  # rounding leaves something there
                        total -= distances.diagonal().sum().item()
            found[group] = total / (n * (n - 1))
    return found


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 (N, M) of float64 rows (N, D) and (M, D), from their squares and products."""
    products = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None] - 2 * (a @ b.T)
    return products.clamp(min=0)


def checked(a: Tensor, b: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Both as float64. Raises ValueError unless they are finite matrices of one width with `least` rows or more."""
    for name, features in (("the first set", a), ("the second set", b)):
        check_matrix(name, features)
        if len(features) < least:
            raise ValueError(f"{name} of features: at least {least} samples are needed, got {len(features)}.")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"both sets of features must have the same width, got {a.shape[1]} and {b.shape[1]}.")
    return a.detach().double(), b.detach().double()


def centred(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Around the mean of both: what they share would only cancel in the distances."""
    mean = torch.cat([a.sum(dim=0, keepdim=True), b.sum(dim=0, keepdim=True)]).sum(dim=0) / (len(a) + len(b))
    return a - mean, b - mean


def _inside(points: Tensor, manifold: Tensor, k: int) -> Tensor:
    """Whether each of `points` (N, D) lies in a ball of `manifold` (M, D)."""
    radii = torch.cat([_radii(rows, manifold, k) for rows in manifold.split(BLOCK)])
    found = []
    for rows in points.split(BLOCK):
        inside = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for columns, radius in zip(manifold.split(BLOCK), radii.split(BLOCK)):
            inside |= (squared_distances(rows, columns) <= radius + _rounding(rows, columns)).any(dim=1)
        found.append(inside)
    return torch.cat(found)


def _radii(rows: Tensor, members: Tensor, k: int) -> Tensor:
    """Squared distance (N,) of each row, itself among `members`, to its k-th nearest other member."""
    smallest = torch.empty(len(rows), 0, dtype=rows.dtype, device=rows.device)
    for columns in members.split(BLOCK):
        smallest = torch.cat([smallest, squared_distances(rows, columns)], dim=1)
        smallest = smallest.topk(min(k + 1, smallest.shape[1]), largest=False).values
    return smallest[:, k]


def _rounding(a: Tensor, b: Tensor) -> Tensor:
    """What a squared distance may be off: copies of a sample lie in its ball, also where that has no width."""
    return ROUNDING * (a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None])
