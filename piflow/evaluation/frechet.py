"""Fréchet distance between two sets of features (Heusel et al. 2017, arXiv 1706.08500, equation 6)."""

import torch
from torch import Tensor


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
    overlap = torch.linalg.svdvals(spread_a @ spread_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + spread_a.square().sum() + spread_b.square().sum() - 2 * overlap
    return max(distance.item(), 0.0)  # rounding may leave -1e-16 for equal sets


def _mean_and_spread(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (D,) and diag(s) V^T (min(N, D), D), a matrix with spread^T spread = covariance."""
    features = features.detach().double()
    mean = features.mean(dim=0)
    _, s, v_t = torch.linalg.svd((features - mean) / (len(features) - 1) ** 0.5, full_matrices=False)
    return mean, s[:, None] * v_t


def _check_features(name: str, features: Tensor) -> None:
    if features.ndim != 2:
        raise ValueError(f"{name} must be a matrix (samples, features), got shape {tuple(features.shape)}.")
    if len(features) < 2:
        raise ValueError(f"{name} needs at least two samples to have a covariance, got {len(features)}.")
    wrong = (~features.isfinite()).any(dim=1).nonzero()
    if len(wrong):
        raise ValueError(
            f"{name} holds NaN or infinity in {len(wrong)} of {len(features)} samples, first in sample {int(wrong[0])}."
        )
