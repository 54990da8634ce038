"""Gaussians fitted to features, by moments that can be added and subtracted."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D), float64."""

    mu: np.ndarray
    sigma: np.ndarray


@dataclass(frozen=True)
class Moments:
    """Count, sum (D,) and scatter matrix (D, D) of features minus `origin` (D,), in float64."""

    origin: Tensor
    num: int
    total: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor, origin: Tensor) -> "Moments":
        """Returns the moments of features (N, D)."""
        centred = features.double() - origin
        return cls(origin, len(centred), centred.sum(0), centred.T @ centred)

    def __sub__(self, part: "Moments") -> "Moments":
        return Moments(self.origin, self.num - part.num, self.total - part.total, self.scatter - part.scatter)

    def __add__(self, part: "Moments") -> "Moments":
        return Moments(self.origin, self.num + part.num, self.total + part.total, self.scatter + part.scatter)

    def gaussian(self) -> Gaussian:
        """Returns the Gaussian with the unbiased covariance, as numpy and ADM compute it."""
        mean = self.total / self.num
        sigma = (self.scatter - torch.outer(mean, self.total)) / (self.num - 1)
        return Gaussian((self.origin + mean).numpy(), sigma.numpy())


def fit_gaussian(features: Tensor) -> Gaussian:
    """Fits a Gaussian to features (N, D), where N is at least 2."""
    return Moments.of(features, features.double().mean(0)).gaussian()
