"""FID, Inception Score, precision, recall and KID from one pass over the images, by torch-fidelity's own functions.

With Inception the keys are `fid`, `inception_score`, `kid`, `precision` and `recall`; with another extractor they are
`fd_NAME`, `score_NAME` and so on, since such numbers are no Inception numbers.
"""

import contextlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch_fidelity
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
from tqdm import tqdm

from sit_atconv.evaluation.extractors import Extractor, open_extractor
from sit_atconv.evaluation.image_sets import ImageSet, open_image_set

METRICS = ("fid", "is", "kid", "prc")
PRC_NEIGHBOURS = 3      # ADM's k, on the features of FID
IS_SPLIT = 5000         # ADM takes chunks of 5,000 in the order of the file
KID_SUBSET, KID_SUBSETS = 1000, 100


@dataclass(frozen=True)
class Features:
    """What an extractor saw in N images: features (N, D) and logits (N, K), float32 on the CPU."""

    features: Tensor
    logits: Tensor


def evaluate(
    samples: str,
    reference: str,
    *,
    extractor: str = "inception",
    metrics: Sequence[str] = METRICS,
    batch_size: int = 64,
    inception_weights: str | None = None,
    device: torch.device | str | None = None,
) -> dict:
    """Compares samples with a reference; both are anything `open_image_set` takes.

    Args:
        metrics: some of "fid", "is", "kid", "prc" (precision and recall).
        device: None is the accelerator where there is one.

    Returns:
        The metrics, and what they depend on: numbers of images, extractor and its weights, versions.

    Raises:
        ValueError: images or weights that cannot be had, or too few images for a metric.
    """
    if unknown := sorted(set(metrics) - set(METRICS)):
        raise ValueError(f"metrics are {', '.join(METRICS)}, not {unknown[0]!r}")
    sets = [open_image_set(source) for source in (samples, reference)]
    for images in sets:
        if len(images) <= PRC_NEIGHBOURS:
            raise ValueError(f"{images.name} holds {len(images)} images, too few for any metric")
    device = device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    network = open_extractor(extractor, inception_weights, device)
    generated, real = (extract_features(network, images, batch_size, device) for images in sets)
    num_features = real.features.shape[1]
    for images in sets:
        if "fid" in metrics and len(images) <= num_features:
            print(f"warning: {images.name} holds {len(images)} images, no more than the {num_features} features: their "
                  "covariance is singular and the Frechet distance far too large; use more images", file=sys.stderr)
    return compute_metrics(generated, real, extractor, metrics) | {
        "num_samples": len(sets[0]),
        "num_reference": len(sets[1]),
        "samples": samples,
        "reference": reference,
        "extractor": extractor,
        "extractor_sha256": network.sha256,
        "versions": {"torch_fidelity": torch_fidelity.__version__, "torch": torch.__version__},
    }


@torch.inference_mode()
def extract_features(
    extractor: Extractor, images: ImageSet, batch_size: int = 64, device: torch.device | str = "cpu"
) -> Features:
    """One pass over the images, in their order. Raises ValueError where a feature is not finite."""
    parts = []
    with _no_tf32(), tqdm(total=len(images), unit="image", desc=images.name) as progress:
        for batch in images.batches(batch_size):
            parts.append(extractor(batch.to(device)))
            progress.update(len(batch))
    features, logits = (torch.cat(part) for part in zip(*parts, strict=True))
    if not (features.isfinite().all() and logits.isfinite().all()):
        raise ValueError(f"extractor {extractor.name!r} gave features of {images.name} that are not finite")
    return Features(features, logits)


@contextlib.contextmanager
def _no_tf32():
    """cuDNN convolves in TF32 by default, which moves FID; what the caller had chosen comes back afterwards."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    chosen = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, chosen, strict=True):
            backend.allow_tf32 = allowed


def compute_metrics(generated: Features, real: Features, extractor: str, metrics: Sequence[str] = METRICS) -> dict:
    """The metrics under the names they deserve."""
    values = {}
    if "fid" in metrics:
        values["fid"] = frechet_distance(generated.features, real.features)
    if "is" in metrics:
        splits = math.ceil(len(generated.logits) / IS_SPLIT)
        values["inception_score"] = isc_features_to_metric(generated.logits, splits, shuffle=False)[KEY_METRIC_ISC_MEAN]
    if "kid" in metrics:
        subset = min(KID_SUBSET, len(generated.features), len(real.features))
        kid = kid_features_to_metric(
            generated.features, real.features, kid_subsets=KID_SUBSETS, kid_subset_size=subset, verbose=False
        )
        values |= {"kid": kid[KEY_METRIC_KID_MEAN], "kid_subset_size": subset}
    if "prc" in metrics:
        prc = prc_features_to_metric(
            generated.features, real.features, prc_neighborhood=PRC_NEIGHBOURS, save_cpu_ram=True, verbose=False
        )
        values |= {"precision": prc[KEY_METRIC_PRECISION], "recall": prc[KEY_METRIC_RECALL]}
    if extractor == "inception":
        return values
    others = {"fid": "fd", "inception_score": "score", "kid": "kd", "kid_subset_size": "kd_subset_size"}
    return {f"{others.get(name, name)}_{extractor}": value for name, value in values.items()}


def frechet_distance(generated: Tensor, real: Tensor) -> float:
    """Between Gaussians fitted to two sets of features (N, D), in float64."""
    statistics = [
        {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}
        for features in (generated.double().numpy(), real.double().numpy())
    ]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def frechet_jackknife(generated: Tensor, real: Tensor, groups: int = 20) -> tuple[float, float]:
    """The Frechet distance and its standard error for the draw of the samples, by a delete-a-group jackknife.

    Group g holds samples g, g + groups, ...: where labels are balanced, every class in nearly equal parts.

    Raises:
        ValueError: fewer samples than two a group.
    """
    if len(generated) < 2 * groups:
        raise ValueError(f"{len(generated)} samples are too few for {groups} groups of two")
    group = torch.arange(len(generated)) % groups
    without = torch.tensor([frechet_distance(generated[group != g], real) for g in range(groups)]).double()
    error = (without - without.mean()).square().sum().mul((groups - 1) / groups).sqrt()
    return frechet_distance(generated, real), error.item()
