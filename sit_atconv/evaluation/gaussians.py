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


class Moments:
    """Number, sum and scatter of features (N, D), in float64 about a fixed origin; those of parts add and subtract."""

    def __init__(self, origin: Tensor, num: int = 0, total: Tensor | float = 0.0, scatter: Tensor | float = 0.0):
        self.origin, self.num, self.total, self.scatter = origin.double(), num, total, scatter

    def add(self, features: Tensor) -> None:
        centred = features.double() - self.origin
        self.num += len(centred)
        self.total = self.total + centred.sum(0)
        self.scatter = self.scatter + centred.T @ centred

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
    moments = Moments(features.double().mean(0))
    moments.add(features)
    return moments.gaussian()
