"""Classifiers with shipped weights, as feature extractors of metrics and as image encoders.

Their Frechet distances and scores cannot be compared with those of Inception.
"""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from sit_atconv.encoders.image_encoder import ImageEncoder


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


class ShippedEncoder(ImageEncoder):
    """First convolutions of a shipped classifier: one token for each pixel of their output.

    Args:
        kind: class of the shipped feature extractor.
        weights: file of other weights of its classifier; None takes the shipped ones.
        grid_size: rows and columns of the tokens.
        layers: number of the trunk's layers that are used.
        stride: pixels from one token to the next; images are resized to `stride` times the grid.
    """

    def __init__(
        self, kind: type[ShippedFeatures], weights: Path | None, grid_size: tuple[int, int], layers: int, stride: int
    ):
        super().__init__()
        classifier = kind.classifier_class()
        classifier.load_state_dict(load_file(weights or kind.weights))
        self.trunk = nn.Sequential(*classifier.get_submodule("trunk").children())[:layers]
        self.grid_size = grid_size
        self.input_size = tuple(stride * cells for cells in grid_size)
        self.width = [layer for layer in self.trunk if isinstance(layer, nn.Conv2d)][-1].out_channels

    def forward(self, images: Tensor) -> Tensor:
        grey = images.float().mean(1, keepdim=True)
        if grey.shape[-2:] != self.input_size:
            grey = F.interpolate(grey, size=self.input_size, mode="bicubic")
        return self.trunk(grey).flatten(2).mT  # (B, H * W, width)
