"""Feature extractors by name: Inception, DINOv2, digits, and those registered with torch-fidelity."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn as nn
from safetensors.torch import load_file
from torch import Tensor
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from sit_atconv.encoders.digit_features import DigitFeatures
from sit_atconv.encoders.dinov2 import PUBLISHED_WIDTH, DINOv2
from sit_atconv.encoders.fashion_features import FashionFeatures
from sit_atconv.encoders.shipped_features import ShippedFeatures
from sit_atconv.runtime.files import sha256_of, sha256_of_state

INCEPTION_SHA256 = "6726825d"  # start of the digest of torch-fidelity's weights file
DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
DINOV2_SHA256 = "d5383ea8"
SPATIAL_CHANNELS = 7  # of Mixed_6d.branch1x1, at 17 x 17: 2,023 values, about as many as `features` has

SHIPPED: dict[str, type[ShippedFeatures]] = {"digits": DigitFeatures, "fashion": FashionFeatures}

for _name in SHIPPED.keys() - FEATURE_EXTRACTORS_REGISTRY.keys():
    register_feature_extractor(_name, SHIPPED[_name])


@dataclass(frozen=True)
class Extractor:
    """A feature network with named outputs.

    Args:
        name: "inception", "dinov2" (with another width than ViT-L "dinov2-384"), "digits" or a registered name.
        network: maps uint8 (B, 3, H, W) to a tuple of `outputs`, or of one tensor that is used for all of them.
        sha256: digest of the weights file, or of the parameters if the network downloaded its weights itself.
        outputs: some of "features" (B, D) for distances, "logits" (B, K) for scores, "spatial" (B, S) for sFID.
        resize: how the network resizes images, in words.
    """

    name: str
    network: Callable[[Tensor], tuple[Tensor, ...]]
    sha256: str | None
    outputs: tuple[str, ...]
    resize: str

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Maps uint8 (B, 3, H, W) to {output: float32 (B, ...) on the CPU}, computed without TF32."""
        with _no_tf32(), torch.inference_mode():
            tensors = self.network(images)
        if len(tensors) == 1:
            tensors *= len(self.outputs)
        return {name: tensor.float().cpu() for name, tensor in zip(self.outputs, tensors, strict=True)}

    def describe(self) -> dict:
        """Returns everything but the images that features depend on, for records and names of caches."""
        return {"name": self.name, "sha256": self.sha256, "outputs": list(self.outputs), "resize": self.resize}


@contextlib.contextmanager
def _no_tf32():
    """Switches TF32 off, which changes FID and is cuDNN's default, and restores the setting afterwards."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    chosen = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, chosen, strict=True):
            backend.allow_tf32 = allowed


def open_extractor(name: str, weights: str | None = None, device: torch.device | str = "cpu") -> Extractor:
    """Opens an extractor by name.

    Args:
        name: "inception" (as in ADM and torch-fidelity), "dinov2" (as in FD-DINOv2), "digits" (8x8), "fashion" (32x32),
            both shipped, or any name registered with `torch_fidelity.register_feature_extractor`.
        weights: path of its weights; None takes them from torch's hub cache, or downloads them into it.
        device: device to move the network to.

    Raises:
        ValueError: the name is unknown, or the weights are missing, of another network, or cannot be downloaded.
    """
    if name not in (known := {"inception", "dinov2", *FEATURE_EXTRACTORS_REGISTRY}):
        raise ValueError(f"there is no extractor {name!r}: known are {', '.join(sorted(known))}")
    path = Path(weights) if weights else None
    if path and not path.is_file():
        raise ValueError(f"there is no file {path}: give --weights the path of the weights of {name!r}")
    if name in SHIPPED:
        opened = _open_shipped(name, path)
    else:
        openers = {"inception": _open_inception, "dinov2": _open_dinov2}
        opened = openers[name](path) if name in openers else _open_registered(name, path)
    assert isinstance(opened.network, nn.Module)
    opened.network.eval().requires_grad_(False).to(device)
    return opened


class Inception(FeatureExtractorInceptionV3):
    """Inception of torch-fidelity, with ADM's spatial features for sFID (arXiv 2103.03841).

    Maps uint8 (B, 3, H, W) to the features that it was opened for, and spatial features (B, 2023).
    """

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        seen = []
        with self.Mixed_6d.branch1x1.register_forward_hook(lambda *call: seen.append(call[-1])):
            outputs = super().forward(x)
        spatial = seen[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1)  # (B, 17, 17, 7), as in TensorFlow
        return *outputs, spatial.flatten(1)


def _open_inception(path: Path | None) -> Extractor:
    path, sha256 = _published(path, URL_INCEPTION_V3, INCEPTION_SHA256)
    _read(path, URL_INCEPTION_V3)  # checked here, since torch-fidelity unpickles without restriction
    network = _construct(Inception, "inception", ["2048", "logits_unbiased"], path)
    return Extractor(
        "inception", network, sha256, ("features", "logits", "spatial"), "299x299, bilinear as TensorFlow 1"
    )


def _open_dinov2(path: Path | None) -> Extractor:
    path, sha256 = (path, sha256_of(path)) if path else _published(None, DINOV2_URL, DINOV2_SHA256)
    weights = _read(path, DINOV2_URL, may_be_safetensors=True)
    try:
        network = DINOv2(weights)
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be used: {error}; download {DINOV2_URL} and give its path as --weights"
        ) from error
    name = "dinov2" if network.width == PUBLISHED_WIDTH else f"dinov2-{network.width}"  # only ViT-L gives FD-DINOv2
    return Extractor(name, network, sha256, ("features",), "224x224, bicubic, antialiased")


def _open_shipped(name: str, path: Path | None) -> Extractor:
    if path:
        raise ValueError(f"the extractor {name!r} has its own weights: leave out --weights")
    network = SHIPPED[name](name, ["features", "logits"])
    return Extractor(name, network, sha256_of(network.weights), ("features", "logits"), "none")


def _open_registered(name: str, path: Path | None) -> Extractor:
    kind = FEATURE_EXTRACTORS_REGISTRY[name]
    if path and issubclass(kind, FeatureExtractorInceptionV3 | FeatureExtractorVGG16):
        _read(path, "its own weights")  # checked here, since they unpickle without restriction
    layers = [kind.get_default_feature_layer_for_metric(metric) for metric in ("fid", "isc")]
    network = _construct(kind, name, list(dict.fromkeys(layers)), path)  # torch-fidelity refuses duplicates
    sha256, state = sha256_of(path) if path else None, network.state_dict()
    if state and not path:
        sha256 = sha256_of_state(state, lambda name, x: f"{name} {x.dtype} {tuple(x.shape)}")
    return Extractor(name, network, sha256, ("features", "logits"), "its own")


def _construct(
    kind: type[FeatureExtractorBase], name: str, layers: list[str], path: Path | None
) -> FeatureExtractorBase:
    try:
        return kind(name, layers, **({"feature_extractor_weights_path": str(path)} if path else {}))
    except (NotImplementedError, TypeError) as error:
        if not path:
            raise
        raise ValueError(f"the extractor {name!r} takes no weights from a file: leave out --weights") from error
    except (OSError, RuntimeError, UnpicklingError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = (
            f"{path} does not hold its weights; give their path as --weights"
            if path
            else "it downloads its weights itself; open it once on a machine with network and copy torch's hub cache "
            "here, or give the path of the weights as --weights"
        )
        raise ValueError(f"the extractor {name!r} could not be opened ({reason}): {remedy}") from error


def _published(path: Path | None, url: str, sha256: str) -> tuple[Path, str]:
    """Returns the weights published at `url` and their digest; downloads them if `path` is None.

    ValueError: they cannot be downloaded, or their digest does not begin with `sha256`.
    """
    path = path or Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"{path.name} could not be downloaded ({error}): fetch {url} on a machine with network "
                "and give its path as --weights"
            ) from error
    if not (digest := sha256_of(path)).startswith(sha256):
        raise ValueError(
            f"{path} is not {url}: its sha256 begins with {digest[:8]}, not {sha256}; download it again "
            "and give its path as --weights"
        )
    return path, digest


def _read(path: Path, url: str, may_be_safetensors: bool = False) -> dict[str, Tensor]:
    """Reads named tensors without running code in the file. ValueError: it contains anything else."""
    try:
        if may_be_safetensors and path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}): it is cut short, holds no weights, or "
            f"would run code; download {url} and give its path as --weights"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError(f"{path} holds more than named tensors: download {url} and give its path as --weights")
    return weights
