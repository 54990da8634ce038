"""Classifiers with shipped weights as torch-fidelity feature extractors: metrics without a download.

Their Frechet distances and scores cannot be compared with those of Inception.
"""

from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import load_file
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase


class ShippedFeatures(FeatureExtractorBase):
    """Feature extractor for uint8 (B, 3, side, side): a classifier of greyscale images.

    Attributes:
        classifier_class: maps images (B, 1, side, side) in [-1, 1] to features (B, D) and logits (B, K).
        weights: file of the classifier's weights, frozen; docs/evaluation.md has the command that made it.
        side: height and width of the images in pixels.
    """

    classifier_class: type[nn.Module]
    weights: Path
    side: int

    def __init__(self, name: str, features_list: list[str], **kwargs):
        super().__init__(name, features_list)
        self.classifier = self.classifier_class()
        self.classifier.load_state_dict(load_file(self.weights))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return True

    @classmethod
    def get_dummy_input_for_compile(cls) -> Tensor:
        return torch.zeros(4, 3, cls.side, cls.side, dtype=torch.uint8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.shape[1:] != (3, self.side, self.side):
            h, w = x.shape[-2:]
            raise ValueError(
                f"the extractor {self.get_name()!r} is for {self.side}x{self.side} images, not {h}x{w}: give "
                "--extractor inception"
            )
        grey = x.float().mean(1, keepdim=True) / 127.5 - 1
        outputs = dict(zip(self.get_provided_features_list(), self.classifier(grey), strict=True))
        return tuple(outputs[name] for name in self.features_list)
