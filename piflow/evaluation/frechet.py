"""Fréchet distance between two sets of features (Heusel et al. 2017, arXiv 1706.08500, equation 6)."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1024
"""Rows that `Moments` takes at once, however they arrive: what makes its result independent of the batches."""


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Wasserstein-2 distance between the Gaussians fitted to two feature sets (N_a, D) and (N_b, D).

        d^2 = |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

    With the thin SVD of the centred features, X / sqrt(N - 1) = U diag(s) V^T, the last trace is the nuclear norm of
    diag(s_a) V_a^T V_b diag(s_b). No covariance is formed and no root of a nearly singular matrix is taken, so sets
    with fewer samples than features (rank-deficient covariances) keep full precision. Computed in float64; biased by
    the number of samples, as always: compare sets of equal size.

    Raises:
        ValueError: an argument is not a matrix, the widths differ, a set has fewer than two samples, or a value is not
            finite; the message names the argument.
    """
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        _check_features(name, features)
    if features_a.shape[1] != features_b.shape[1]:
        raise ValueError(
            f"features_a and features_b must have the same width, got {features_a.shape[1]} and {features_b.shape[1]}."
        )
    mean_a, spread_a = _mean_and_spread(features_a)
    mean_b, spread_b = _mean_and_spread(features_b)
    return _distance(mean_a, spread_a, mean_b, spread_b)


class Moments:
    """Mean (D,) and covariance (D, D) of rows that come in batches of any size, in float64 and constant memory.

    Blocks of `BLOCK` rows are merged with the pairwise update of Chan, Golub and LeVeque (1979), which subtracts the
    mean of a block before anything is squared. The same rows give the same bits, whatever the batches.
    """

    def __init__(self) -> None:
        self._state: tuple[int, Tensor, Tensor] | None = None
        self._rest: list[Tensor] = []

    def update(self, features: Tensor) -> None:
        """Take rows (N, D). Raises ValueError where they are no matrix, of another width, or not finite."""
        check_matrix("features", features)
        width = self._width()
        if width is not None and features.shape[1] != width:
            raise ValueError(f"features must have the width of those before, {width}, got {features.shape[1]}.")
        self._rest.append(features.detach().double())
        if sum(map(len, self._rest)) >= BLOCK:
            *blocks, rest = torch.cat(self._rest).split(BLOCK)
            blocks, rest = ([*blocks, rest], rest[:0]) if len(rest) == BLOCK else (blocks, rest)
            for block in blocks:
                self._state = _merged(self._state, block)
            self._rest = [rest.clone()]

    @property
    def count(self) -> int:
        """Rows taken."""
        return (self._state[0] if self._state else 0) + sum(map(len, self._rest))

    def compute(self) -> tuple[Tensor, Tensor]:
        """(mean, covariance) of the rows so far; more may follow. Raises ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"features: at least two samples are needed for a covariance, got {self.count}.")
        rest, state = torch.cat(self._rest), self._state
        count, mean, scatter = _merged(state, rest) if len(rest) or state is None else state
        return mean, scatter / (count - 1)

    def _width(self) -> int | None:
        if self._state is not None:
            return len(self._state[1])
        return self._rest[0].shape[1] if self._rest else None


def frechet_from_moments(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """`frechet_distance` of means (D,) and covariances (D, D), such as those of `Moments` or a reference batch.

    With S = A^T A from an eigendecomposition, the last trace is the nuclear norm of A_a A_b^T. Eigenvalues below
    D eps |S| are rounding of zeros and left out: their roots would not be small.

    Raises ValueError where the shapes do not fit or a value is not finite.
    """
    shape = (*mean_a.shape, *mean_a.shape)
    for name, value, wanted in (
        ("mean_a", mean_a, shape[:1]), ("covariance_a", covariance_a, shape),
        ("mean_b", mean_b, shape[:1]), ("covariance_b", covariance_b, shape),
    ):  # fmt: skip
        if tuple(value.shape) != wanted:
            raise ValueError(f"{name} must have shape {wanted} as mean_a has, got {tuple(value.shape)}.")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinity.")
    return _distance(mean_a.double(), _root(covariance_a.double()), mean_b.double(), _root(covariance_b.double()))


def _distance(mean_a: Tensor, spread_a: Tensor, mean_b: Tensor, spread_b: Tensor) -> float:
    overlap = torch.linalg.svdvals(spread_a @ spread_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + spread_a.square().sum() + spread_b.square().sum() - 2 * overlap
    return max(distance.item(), 0.0)  # rounding may leave -1e-16 for equal sets


def _mean_and_spread(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (D,) and diag(s) V^T (min(N, D), D), a matrix with spread^T spread = covariance."""
    features = features.detach().double()
    mean = features.mean(dim=0)
    _, s, v_t = torch.linalg.svd((features - mean) / (len(features) - 1) ** 0.5, full_matrices=False)
    return mean, s[:, None] * v_t


def _root(covariance: Tensor) -> Tensor:
    """A (rank, D) with A^T A = covariance."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    kept = eigenvalues > len(eigenvalues) * torch.finfo(torch.float64).eps * eigenvalues.abs().max()
    return eigenvalues[kept].sqrt()[:, None] * vectors[:, kept].T


def _merged(state: tuple[int, Tensor, Tensor] | None, block: Tensor) -> tuple[int, Tensor, Tensor]:
    """(count, mean, sum of centred outer products) after one more block."""
    mean = block.mean(dim=0)
    centred = block - mean
    scatter = centred.T @ centred
    if state is None:
        return len(block), mean, scatter
    count, mean_before, scatter_before = state
    total, step = count + len(block), mean - mean_before
    scatter = scatter_before + scatter + torch.outer(step, step) * (count * len(block) / total)
    return total, mean_before + step * (len(block) / total), scatter


def _check_features(name: str, features: Tensor) -> None:
    if features.ndim == 2 and len(features) < 2:
        raise ValueError(f"{name} needs at least two samples to have a covariance, got {len(features)}.")
    check_matrix(name, features)


def check_matrix(name: str, features: Tensor) -> None:
    """Raise a ValueError that names the argument unless it is a matrix (samples, features) of finite numbers."""
    if features.ndim != 2:
        raise ValueError(f"{name} must be a matrix (samples, features), got shape {tuple(features.shape)}.")
    wrong = (~features.isfinite()).any(dim=1).nonzero()
    if len(wrong):
        raise ValueError(
            f"{name} holds NaN or infinity in {len(wrong)} of {len(features)} samples, first in sample {int(wrong[0])}."
        )
