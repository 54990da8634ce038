import numpy as np
import torch

from sit_atconv.evaluation.gaussians import Moments, fit_gaussian


def test_a_gaussian_is_numpys_mean_and_covariance():
    features = torch.randn(300, 7) * 3 + 100
    gaussian = fit_gaussian(features)
    assert gaussian.mu.dtype == gaussian.sigma.dtype == np.float64
    np.testing.assert_allclose(gaussian.mu, features.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(gaussian.sigma, np.cov(features.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)


def test_moments_of_parts_add_and_subtract():
    features = torch.randn(90, 4) + 50
    parts = [Moments.of(piece, features[0].double()) for piece in features.split([20, 30, 40])]
    whole = parts[0] + parts[1] + parts[2]
    for moments, rows in [(whole, features), (whole - parts[1], torch.cat([features[:20], features[50:]]))]:
        gaussian, direct = moments.gaussian(), fit_gaussian(rows)
        np.testing.assert_allclose(gaussian.mu, direct.mu, rtol=1e-12)
        np.testing.assert_allclose(gaussian.sigma, direct.sigma, rtol=1e-9, atol=1e-12)


def test_equal_images_have_no_variance():
    assert np.abs(fit_gaussian(torch.full((50, 3), 1 / 3)).sigma).max() < 1e-30
