"""Classifier of 8x8 digits as a torch-fidelity feature extractor: metrics without a download.

Its Frechet distances and scores cannot be compared with those of Inception. The weights next to this file are frozen;
`python -m sit_atconv.evaluation.train_digit_features` creates them.
"""

from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import load_file
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

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


class DigitFeatures(FeatureExtractorBase):
    """Feature extractor of torch-fidelity for uint8 (B, 3, 8, 8): `DigitClassifier` with shipped weights."""

    def __init__(self, name: str, features_list: list[str], **kwargs):
        super().__init__(name, features_list)
        self.classifier = DigitClassifier()
        self.classifier.load_state_dict(load_file(WEIGHTS))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return True

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(4, 3, 8, 8, dtype=torch.uint8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.shape[1:] != (3, 8, 8):
            h, w = x.shape[-2:]
            raise ValueError(f"the extractor 'digits' is for 8x8 images, not {h}x{w}: give --extractor inception")
        grey = x.float().mean(1, keepdim=True) / 127.5 - 1
        outputs = dict(zip(self.get_provided_features_list(), self.classifier(grey), strict=True))
        return tuple(outputs[name] for name in self.features_list)
