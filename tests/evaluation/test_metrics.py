"""Metrics against closed forms and against plain numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from piflow.evaluation import endpoint_errors, endpoint_mse, frechet_distance
from piflow.evaluation.frechet import BLOCK, Moments, frechet_from_moments
from piflow.evaluation.inception_score import inception_score
from piflow.evaluation.mmd import kid, mmd_squared, rms_distance
from piflow.evaluation.neighbours import coverage, diversity, precision_recall


def features(count: int, width: int = 6, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + shift


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=2))


# Moments and the Fréchet distance of them


def streamed(rows: torch.Tensor, *sizes: int) -> Moments:
    moments = Moments()
    for block in rows.split(list(sizes)):
        moments.update(block)
    return moments


def test_moments_are_those_of_numpy() -> None:
    rows = features(2 * BLOCK + 300, shift=1e4)
    mean, covariance = streamed(rows, 1000, 1100, len(rows) - 2100).compute()
    assert np.allclose(mean, rows.numpy().mean(axis=0), rtol=1e-14)
    assert np.allclose(covariance, np.cov(rows.numpy(), rowvar=False), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("count", [2, 5, BLOCK, BLOCK + 1, 2 * BLOCK + 7])
def test_moments_do_not_depend_on_the_batches(count: int) -> None:
    rows = features(count).float()
    whole = streamed(rows, count).compute()
    pieces = streamed(rows, *[1] * (count % 7), *[7] * (count // 7)).compute()
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces))
    assert streamed(rows, 1, count - 1).count == count


def test_moments_refuse_what_has_none() -> None:
    with pytest.raises(ValueError, match="at least two samples are needed for a covariance, got 1"):
        streamed(features(1), 1).compute()
    with pytest.raises(ValueError, match="width of those before, 6, got 5"):
        streamed(features(10), 10).update(features(3, 5))
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 2 samples, first in sample 1"):
        Moments().update(torch.tensor([[0.0], [torch.nan]]))


@pytest.mark.parametrize("count", [40, 4], ids=["full rank", "rank-deficient"])
def test_distance_of_moments_is_that_of_features(count: int) -> None:
    a, b = features(count), 2 * features(count, seed=1) + 0.5
    of_moments = frechet_from_moments(*streamed(a, count).compute(), *streamed(b, count).compute())
    assert of_moments == pytest.approx(frechet_distance(a, b), rel=1e-9)
    assert frechet_from_moments(*streamed(a, count).compute(), *streamed(a.flip(0), count).compute()) < 1e-9


def test_distance_of_gaussians() -> None:
    """With diagonal covariances d^2 = |m_a - m_b|^2 + sum (sqrt(v_a) - sqrt(v_b))^2."""
    mean_a, mean_b = torch.tensor([0.0, 1.0]), torch.tensor([3.0, 1.0])
    found = frechet_from_moments(mean_a, torch.diag(torch.tensor([4.0, 0])), mean_b, torch.diag(torch.tensor([1.0, 9])))
    assert found == pytest.approx(9 + 1 + 9, rel=1e-12)
    with pytest.raises(ValueError, match=r"covariance_b must have shape \(2, 2\) as mean_a has, got \(3, 3\)"):
        frechet_from_moments(mean_a, torch.eye(2), mean_b, torch.eye(3))
    with pytest.raises(ValueError, match="covariance_a holds NaN"):
        frechet_from_moments(mean_a, torch.full((2, 2), torch.nan), mean_b, torch.eye(2))


# MMD and KID


def naive_mmd(a: torch.Tensor, b: torch.Tensor, kernel: str, paired: bool = False) -> float:
    x, y = a.numpy(), b.numpy()
    bandwidth = math.sqrt(2 * np.var(y, axis=0, ddof=1).sum())

    def values(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        if kernel == "polynomial":
            return (p @ q.T / p.shape[1] + 1) ** 3
        return np.exp(-(distances(p, q) ** 2) / (2 * bandwidth**2))

    def off_diagonal(k: np.ndarray) -> float:
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    cross = values(x, y)
    return (
        off_diagonal(values(x, x)) + off_diagonal(values(y, y)) - 2 * (off_diagonal(cross) if paired else cross.mean())
    )


@pytest.mark.parametrize("kernel", ["polynomial", "rbf"])
@pytest.mark.parametrize("paired", [False, True])
def test_mmd_is_numpys(kernel: str, paired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("piflow.evaluation.mmd.BLOCK", 7)  # several blocks, the last one smaller
    a, b = features(30, seed=1), features(30 if paired else 23, shift=0.7)
    found = mmd_squared(a, b, kernel, paired=paired)
    assert found == pytest.approx(naive_mmd(a, b, kernel, paired), rel=1e-11)
    assert found > 0.01
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    permuted = (a[order], b[order]) if paired else (a[order], b)
    assert mmd_squared(*permuted, kernel, paired=paired) == pytest.approx(found, rel=1e-11)


def test_mmd_of_gaussians() -> None:
    """k = (x y + 1)^3 in one dimension is a sum of moments: N(0, 1) against N(m, 1) has a closed form."""
    shift = 0.5
    a, b = features(6000, 1), features(6000, 1, seed=1, shift=shift)
    moments_a, moments_b = (1, 0, 1, 0), (1, shift, 1 + shift**2, shift**3 + 3 * shift)
    expected = sum(math.comb(3, n) * (moments_a[n] - moments_b[n]) ** 2 for n in range(4))
    assert mmd_squared(a, b) == pytest.approx(expected, rel=0.2)
    repeated = [mmd_squared(features(20, seed=2 * n), features(20, seed=2 * n + 1), "rbf") for n in range(200)]
    assert abs(np.mean(repeated)) < 4 * np.std(repeated) / 200**0.5  # unbiased


def test_pairs_of_one_noise_are_not_mistaken_for_equality() -> None:
    """Paired sets of one distribution: the estimate for independent sets is far below zero, that for pairs is not."""
    paired, unpaired = [], []
    for n in range(100):
        a = features(20, seed=n)
        b = a + 0.01 * features(20, seed=1000 + n)
        paired.append(mmd_squared(a, b, "rbf", paired=True))
        unpaired.append(mmd_squared(a, b, "rbf"))
    assert abs(np.mean(paired)) < 4 * np.std(paired) / 10
    assert np.mean(unpaired) < -20 * abs(np.mean(paired))


def test_kid_draws_its_subsets_itself() -> None:
    a, b = features(60), features(50, seed=1, shift=1.0)
    mean, std = kid(a, b, subsets=8, subset_size=20)
    torch.manual_seed(1)  # has no part in it
    assert kid(a, b, subsets=8, subset_size=20) == (mean, std)
    assert kid(a, b, subsets=8, subset_size=20, seed=1)[0] != mean
    assert mean == pytest.approx(mmd_squared(a, b), rel=0.3)
    assert std > 0
    whole, none = kid(a, b, subset_size=50)
    assert whole == mmd_squared(a, b)
    assert math.isnan(none)
    copies = kid(a, a, subsets=3, subset_size=20, paired=True)  # the same rows on both sides
    assert copies[0] == pytest.approx(0, abs=1e-12)


def test_rbf_mmd_does_not_depend_on_the_origin() -> None:
    a, b = features(30), features(30, seed=1, shift=0.5)
    assert mmd_squared(a + 1e6, b + 1e6, "rbf") == pytest.approx(mmd_squared(a, b, "rbf"), rel=1e-8)


def test_mmd_errors() -> None:
    with pytest.raises(ValueError, match="at least 2 samples are needed, got 1"):
        mmd_squared(features(1), features(5))
    with pytest.raises(ValueError, match="same width, got 6 and 5"):
        mmd_squared(features(9), features(9, 5))
    with pytest.raises(ValueError, match="RBF kernel has no bandwidth"):
        mmd_squared(features(9), torch.ones(9, 6), "rbf")
    with pytest.raises(ValueError, match="RBF kernel has no bandwidth"):
        mmd_squared(features(9), torch.full((7, 6), 0.1, dtype=torch.float64), "rbf")
    with pytest.raises(ValueError, match="bandwidth must be above zero, got 0"):
        mmd_squared(features(9), features(9), "rbf", 0.0)
    with pytest.raises(ValueError, match="pairs need as many samples on both sides, got 9 and 8"):
        mmd_squared(features(9), features(8), paired=True)
    pairs = distances(features(9).numpy(), features(9).numpy()) ** 2
    assert rms_distance(features(9)) == pytest.approx(math.sqrt(pairs.sum() / 72), rel=1e-12)


# Neighbours


def naive_precision(samples: np.ndarray, reference: np.ndarray, k: int) -> float:
    radii = np.sort(distances(reference, reference), axis=1)[:, k]
    return float((distances(samples, reference) <= radii).any(axis=1).mean())


def test_precision_and_recall_are_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("piflow.evaluation.neighbours.BLOCK", 9)
    a, b = features(40, 3), features(31, 3, seed=1, shift=0.8)
    expected = naive_precision(a.numpy(), b.numpy(), 3), naive_precision(b.numpy(), a.numpy(), 3)
    assert precision_recall(a, b) == pytest.approx(expected, abs=1e-12)
    assert 0.2 < expected[0] < 1
    assert precision_recall(a.flip(0), b.flip(0)) == pytest.approx(expected, abs=1e-12)
    assert precision_recall(a + 1e5, b + 1e5) == pytest.approx(expected, abs=1e-12)


def test_precision_and_recall_of_special_sets() -> None:
    a = features(20)
    assert precision_recall(a, a) == (1, 1)
    assert precision_recall(a, a + 100) == (0, 0)
    copies = torch.ones(6, 4) * 0.1  # balls without width
    assert precision_recall(copies, copies) == (1, 1)
    collapsed = a[:1].repeat(20, 1)
    assert precision_recall(collapsed, a) == (1, 0.05)
    with pytest.raises(ValueError, match="second set of features: at least 4 samples are needed, got 3"):
        precision_recall(a, a[:3])


def test_coverage_is_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("piflow.evaluation.neighbours.BLOCK", 9)
    samples, reference = features(25, 3), features(25, 3, seed=1, shift=0.5)
    between = distances(reference.numpy(), samples.numpy())
    radii = np.sort(distances(reference.numpy(), reference.numpy()), axis=1)[:, 2]
    assert coverage(samples, reference, 2) == pytest.approx((between.min(axis=1) <= radii).mean())
    np.fill_diagonal(between, np.inf)
    assert coverage(samples, reference, 2, paired=True) == pytest.approx((between.min(axis=1) <= radii).mean())
    assert coverage(reference[:1], reference, 2) < 0.5
    with pytest.raises(ValueError, match="coverage with k = 5 needs at least 6 samples, got 5"):
        coverage(samples, reference[:5])
    with pytest.raises(ValueError, match="as many samples on both sides, got 24 and 25"):
        coverage(samples[:24], reference, paired=True)


def test_coverage_of_equal_distributions() -> None:
    """1 - 2^-k (Naeem et al. 2020, section 3)."""
    values = [coverage(features(200, 4, seed=n), features(200, 4, seed=100 + n), 3) for n in range(10)]
    assert np.mean(values) == pytest.approx(1 - 2**-3, abs=0.02)


def test_diversity_is_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("piflow.evaluation.neighbours.BLOCK", 9)
    rows, groups = features(41, shift=50), torch.tensor([3] * 30 + [7] * 10 + [9])
    found = diversity(rows, groups)
    assert found.keys() == {3, 7}
    for group, value in found.items():
        pairs = distances(rows[groups == group].numpy(), rows[groups == group].numpy())
        assert value == pytest.approx(pairs.sum() / (len(pairs) * (len(pairs) - 1)), rel=1e-9)
    assert diversity(torch.full((7, 3), 0.1, dtype=torch.float64), torch.zeros(7))[0] == 0
    with pytest.raises(ValueError, match=r"groups must have shape \(41,\)"):
        diversity(rows, groups[:5])


# Inception score and endpoints


def test_inception_score_is_numpys() -> None:
    logits = 3 * features(25, 4)
    p = np.exp(logits.numpy())
    p /= p.sum(axis=1, keepdims=True)
    splits = [
        np.exp((part * np.log(part / part.mean(axis=0))).sum(axis=1).mean()) for part in (p[:10], p[10:20], p[20:])
    ]
    expected = pytest.approx((np.mean(splits), np.std(splits)), rel=1e-12)
    assert inception_score(logits.split(7), split_size=10) == expected
    assert inception_score(logits.split(25), split_size=10) == expected


def test_inception_score_of_certain_classifiers() -> None:
    one_hot = 200 * torch.eye(5).repeat(4, 1)
    assert inception_score([one_hot])[0] == pytest.approx(5, rel=1e-12)
    assert inception_score([one_hot[:1].repeat(4, 1)]) == (pytest.approx(1), 0)
    with pytest.raises(ValueError, match="no sample"):
        inception_score([])
    with pytest.raises(ValueError, match="NaN"):
        inception_score([torch.full((2, 2), torch.nan)])


def test_endpoint_errors() -> None:
    reference = torch.zeros(3, 1, 2, 2)
    samples = torch.tensor([0.0, 1.0, 2.0])[:, None, None, None].expand_as(reference)
    assert endpoint_errors(samples, reference).tolist() == [0, 1, 4]
    assert endpoint_mse(samples, reference) == pytest.approx(5 / 3)
