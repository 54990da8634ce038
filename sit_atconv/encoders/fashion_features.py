"""Classifier of Fashion-MNIST (arXiv 1708.07747) at 32x32, and the feature extractor `fashion`."""

from pathlib import Path

import torch.nn as nn
from torch import Tensor

from sit_atconv.encoders.shipped_features import ShippedFeatures

WEIGHTS = Path(__file__).with_name("fashion_features.safetensors")
NUM_FEATURES = 64


class FashionClassifier(nn.Module):
    """Classifier of greyscale images (B, 1, 32, 32) in [-1, 1]: features (B, 64) and logits (B, 10)."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GELU(),  # (B, 32, 32, 32)
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.GELU(),  # (B, 64, 16, 16)
            nn.Conv2d(64, 80, 3, padding=1, stride=2),
            nn.GELU(),  # (B, 80, 8, 8)
            nn.Conv2d(80, 96, 3, padding=1, stride=2),
            nn.GELU(),  # (B, 96, 4, 4)
            nn.Flatten(),
            nn.Linear(96 * 16, NUM_FEATURES),
            nn.GELU(),  # (B, 64)
        )
        self.head = nn.Linear(NUM_FEATURES, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x)
        return features, self.head(features)


class FashionFeatures(ShippedFeatures):
    """Feature extractor for 32x32 Fashion-MNIST: `FashionClassifier` with shipped weights."""

    classifier_class, weights, side = FashionClassifier, WEIGHTS, 32
