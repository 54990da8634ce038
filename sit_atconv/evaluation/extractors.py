"""Feature extractors by name: Inception, the digits', and whatever was registered with torch-fidelity."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from sit_atconv.evaluation.digit_features import WEIGHTS, DigitFeatures

INCEPTION_SHA256 = "6726825d"  # how the digest of torch-fidelity's Inception begins, and its file's name ends

if "digits" not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor("digits", DigitFeatures)


@dataclass(frozen=True)
class Extractor:
    """A network and which of its outputs the metrics use.

    Args:
        name: "inception", "digits" or a registered name.
        network: uint8 (B, 3, H, W) -> a tuple of features (B, D) for distances and logits (B, K) for scores, or of one
            tensor that serves as both.
        sha256: digest of the weights file, where there is one.
    """

    name: str
    network: FeatureExtractorBase
    sha256: str | None
    outputs: tuple = ("features", "logits")
    resize: str = "none"

    def __call__(self, images: Tensor):
        outputs = [output.float().cpu() for output in self.network(images)]
        return {"features": outputs[0], "logits": outputs[-1]}

    def describe(self):
        return {"name": self.name, "sha256": self.sha256, "outputs": list(self.outputs), "resize": self.resize}


def open_extractor(name: str, inception_weights: str | None = None, device: torch.device | str = "cpu") -> Extractor:
    """Opens an extractor by name.

    Args:
        name: "inception" (of ADM and torch-fidelity), "digits" (8x8, shipped), or any name registered with
            `torch_fidelity.register_feature_extractor`.
        inception_weights: path of torch-fidelity's Inception weights; None takes them from torch's hub cache, or
            downloads them into it.

    Raises:
        ValueError: an unknown name, or Inception weights that are missing, of another file, or not to be downloaded.
    """
    if name == "inception":
        path = Path(inception_weights) if inception_weights else _cached_inception()
        network = _load_inception(path)
        return Extractor(name, network.to(device), _sha256(path))
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        known = ", ".join(sorted({"inception", *FEATURE_EXTRACTORS_REGISTRY}))
        raise ValueError(f"there is no extractor {name!r}: known are {known}")
    kind = FEATURE_EXTRACTORS_REGISTRY[name]
    layers = [kind.get_default_feature_layer_for_metric(metric) for metric in ("fid", "isc")]
    layers = list(dict.fromkeys(layers))  # torch-fidelity refuses a repetition
    network = kind(name, layers).eval().requires_grad_(False)
    return Extractor(name, network.to(device), _sha256(WEIGHTS) if name == "digits" else None)


def _load_inception(path: Path) -> FeatureExtractorInceptionV3:
    if not path.is_file():
        raise ValueError(f"there are no Inception weights at {path}: download {URL_INCEPTION_V3}")
    if not (digest := _sha256(path)).startswith(INCEPTION_SHA256):
        raise ValueError(
            f"{path} is not torch-fidelity's Inception: its sha256 begins with {digest[:8]}, not {INCEPTION_SHA256}; "
            f"download {URL_INCEPTION_V3}"
        )
    torch.load(path, weights_only=True, map_location="cpu")  # torch-fidelity unpickles without restriction: we go first
    return FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path))


def _cached_inception() -> Path:
    path = Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rsplit("/", 1)[1])
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"the Inception weights could not be downloaded ({error}): fetch {URL_INCEPTION_V3} "
                "on a machine with network and give its path as --inception-weights"
            ) from error
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
