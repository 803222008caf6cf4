import pytest
import torch

from piflow.evaluation import endpoint_mse, frechet_distance


def gaussian(num_samples, covariance_root, mean, seed):
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(num_samples, len(mean), dtype=torch.float64, generator=generator)
    return white @ covariance_root.T + mean


def with_exact_moments(num_samples, variances, mean, seed):
    """Samples whose empirical mean and covariance are exactly `mean` and diag(variances)."""
    white = gaussian(num_samples, torch.eye(len(mean), dtype=torch.float64), torch.zeros(len(mean)), seed)
    q, _ = torch.linalg.qr(white - white.mean(0))
    return q * (num_samples - 1) ** 0.5 * variances.sqrt() + mean


def test_equal_sets_are_at_distance_zero():
    features = torch.randn(300, 20, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features) < 1e-10
    assert frechet_distance(features, features.flip(0)) < 1e-10


def test_closed_form_of_commuting_gaussians():
    """With diagonal covariances d^2 = |m_a - m_b|^2 + sum (sqrt(v_a) - sqrt(v_b))^2."""
    variances_a, variances_b = torch.tensor([[1.0, 4.0, 0.25], [9.0, 1.0, 0.25]], dtype=torch.float64)
    mean_a, mean_b = torch.tensor([[0.0, 1.0, -2.0], [3.0, 1.0, -1.0]], dtype=torch.float64)
    a = with_exact_moments(50, variances_a, mean_a, seed=0)
    b = with_exact_moments(70, variances_b, mean_b, seed=1)
    assert frechet_distance(a, b) == pytest.approx(10 + 4 + 1 + 0, abs=1e-9)


def test_agrees_with_the_matrix_square_root():
    from scipy.linalg import sqrtm

    generator = torch.Generator().manual_seed(2)
    roots = torch.randn(2, 8, 8, dtype=torch.float64, generator=generator)
    a = gaussian(400, roots[0], torch.zeros(8, dtype=torch.float64), seed=3)
    b = gaussian(300, roots[1], torch.ones(8, dtype=torch.float64), seed=4)
    product = a.T.cov() @ b.T.cov()
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace()
    expected = expected.item() - 2 * sqrtm(product.numpy()).trace().real
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("num_samples", [200, 10], ids=["full rank", "rank-deficient"])
def test_symmetric_and_invariant_to_order(num_samples):
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(num_samples, 32, generator=generator)
    b = 2 * torch.randn(num_samples, 32, generator=generator) + 1
    distance = frechet_distance(a, b)
    assert distance > 1
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-10)
    assert frechet_distance(a.flip(0), b) == pytest.approx(distance, rel=1e-10)


def test_rank_deficient_sets_keep_full_precision():
    """Ten samples in 32 dimensions, one set a shift of the other: the distance is the shift, exactly."""
    a = torch.randn(10, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    assert frechet_distance(a, a) < 1e-12
    assert frechet_distance(a, a + 0.5) == pytest.approx(32 * 0.25, rel=1e-10)
    constant = torch.ones(10, 32)
    assert frechet_distance(constant, constant + 1) == pytest.approx(32)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 4), torch.zeros(5, 4), r"features_a needs at least two samples.*got 1"),
        (torch.zeros(5, 4), torch.zeros(0, 4), r"features_b needs at least two samples.*got 0"),
        (torch.zeros(5, 4), torch.zeros(5, 3), r"same width, got 4 and 3"),
        (torch.zeros(5, 4, 1), torch.zeros(5, 4), r"features_a must be a matrix.*\(5, 4, 1\)"),
        (
            torch.zeros(5, 4),
            torch.tensor([[0.0], [float("nan")]]).expand(2, 4),
            r"b holds NaN.*1 of 2.*sample 1",
        ),
        (torch.full((5, 4), float("inf")), torch.zeros(5, 4), r"features_a holds NaN or infinity in 5 of 5"),
    ],
)
def test_errors_name_the_argument(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


def test_endpoint_mse():
    reference = torch.zeros(3, 1, 2, 2)
    assert endpoint_mse(reference, reference) == 0
    assert endpoint_mse(reference + 0.5, reference) == pytest.approx(0.25)
    with pytest.raises(ValueError, match=r"\(3, 1, 2, 2\) and \(2, 1, 2, 2\)"):
        endpoint_mse(reference, reference[:2])
