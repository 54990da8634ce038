"""An extractor that tests register with torch-fidelity."""

from torch_fidelity.feature_extractor_base import FeatureExtractorBase


class Pixels(FeatureExtractorBase):
    """Some pixels as features and as logits, as torch-fidelity's own CLIP has one output for all metrics."""

    seen = 0  # images

    @staticmethod
    def get_provided_features_list():
        return ("pixels",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "pixels"

    def forward(self, x):
        Pixels.seen += len(x)
        return (x[:, 0, 2:5, 2:5].flatten(1).float() / 255,)
