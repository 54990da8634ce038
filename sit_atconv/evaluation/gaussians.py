"""Gaussians fitted to features, from moments that add and subtract."""

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
    """Number, sum and scatter of features (N, D), in float64 about a fixed origin; those of parts add and subtract."""

    origin: Tensor
    num: int
    total: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor, origin: Tensor) -> "Moments":
        centred = features.double() - origin
        return cls(origin, len(centred), centred.sum(0), centred.T @ centred)

    def __sub__(self, part: "Moments") -> "Moments":
        return Moments(self.origin, self.num - part.num, self.total - part.total, self.scatter - part.scatter)

    def __add__(self, part: "Moments") -> "Moments":
        return Moments(self.origin, self.num + part.num, self.total + part.total, self.scatter + part.scatter)

    def gaussian(self) -> Gaussian:
        """With the unbiased covariance, as numpy's and ADM's."""
        mean = self.total / self.num
        sigma = (self.scatter - torch.outer(mean, self.total)) / (self.num - 1)
        return Gaussian((self.origin + mean).numpy(), sigma.numpy())


def fit_gaussian(features: Tensor) -> Gaussian:
    """To features (N, D), N at least 2."""
    return Moments.of(features, features.double().mean(0)).gaussian()
