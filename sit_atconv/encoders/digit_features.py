"""Classifier of 8x8 digits, and the feature extractor `digits`."""

from pathlib import Path

import torch.nn as nn
from torch import Tensor

from sit_atconv.encoders.shipped_features import ShippedFeatures

WEIGHTS = Path(__file__).with_name("digit_features.safetensors")
NUM_FEATURES = 48


class DigitClassifier(nn.Module):
    """Classifier of greyscale images (B, 1, 8, 8) in [-1, 1]: returns features (B, 48) and logits (B, 10)."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            nn.GELU(),  # (B, 24, 8, 8)
            nn.Conv2d(24, 48, 3, padding=1, stride=2),
            nn.GELU(),  # (B, 48, 4, 4)
            nn.Conv2d(48, 48, 3, padding=1),
            nn.GELU(),  # (B, 48, 4, 4)
            nn.Flatten(),
            nn.Linear(48 * 16, NUM_FEATURES),
            nn.GELU(),  # (B, 48)
        )
        self.head = nn.Linear(NUM_FEATURES, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x)
        return features, self.head(features)


class DigitFeatures(ShippedFeatures):
    """Feature extractor for 8x8 digits: `DigitClassifier` with shipped weights."""

    classifier_class, weights, side = DigitClassifier, WEIGHTS, 8
