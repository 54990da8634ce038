"""Errors and warnings of an evaluation: images, statistics and extractor that do not fit each other."""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sit_atconv.data import is_named
from sit_atconv.data.pixels import Colour
from sit_atconv.evaluation.extractors import Extractor
from sit_atconv.evaluation.features import ExtractedFeatures
from sit_atconv.evaluation.image_sets import ImageSet
from sit_atconv.evaluation.metric_functions import GROUPS, IS_SPLIT, chunks
from sit_atconv.evaluation.metrics import METRICS, Metric, find_metric
from sit_atconv.evaluation.references import NAMES, Reference
from sit_atconv.runtime.commands import is_main_process
from sit_atconv.runtime.files import gigabytes

LOSSY = {"JPEG", "MPO", "JPEG2000", "WEBP", "AVIF", "HEIF", "GIF"}  # Pillow's formats that lose detail or colours
SINGULAR = (
    "no more than the {} features: the covariance is singular and the Frechet distance far too large; use more images"
)


def check_options(
    held_out: str | None, metrics: Sequence[str], background: Colour | None, sets: Iterable[ImageSet | None]
) -> None:
    """Raises ValueError for options that would do nothing: held-out images, or a background."""
    if held_out is not None and "copies" not in metrics:
        raise ValueError(f"--held-out is for --metrics copies: add that, or leave out --held-out {held_out}")
    if background is not None and not any(images is not None and images.store is not None for images in sets):
        raise ValueError("--background is for image files, and there are none: leave it out")


def check_fit(extractor: Extractor, samples: ImageSet, reference: Reference, device: torch.device) -> None:
    """Raises ValueError if extractor, samples and reference do not fit; runs the extractor on one image."""
    if not len(samples):
        raise ValueError(f"{samples.holds}, too few for any metric")
    check_reference(extractor, reference, samples.read(0, 1).to(device))


def check_reference(extractor: Extractor, reference: Reference, image: Tensor) -> None:
    """Raises ValueError if reference was made with another extractor, after one image (1, 3, H, W)."""
    made_with = reference.recipe.get("extractor", {})
    for name, value in extractor.describe().items():
        if made_with.get(name, value) != value:
            raise ValueError(
                f"{reference.name} was made with an extractor of {name} {made_with[name]!r}, and this one "
                f"has {value!r}: give another --reference or --extractor"
            )
    seen = extractor(image)
    for output, gaussian in reference.gaussians.items():
        if output in seen and seen[output].shape[1] != len(gaussian.mu):
            raise ValueError(
                f"{NAMES[output][0]} of {reference.name} has {len(gaussian.mu)} values, but extractor "
                f"{extractor.name!r} gives {seen[output].shape[1]}: give another --reference or "
                "--extractor"
            )


def choose_metrics(asked: Sequence[str], extractor: Extractor, samples: ImageSet, reference: Reference) -> list[Metric]:
    """Returns the metrics to compute, in the order of `METRICS`; reports those left out on stderr.

    Args:
        asked: metrics that the user asked for; empty means all that extractor, samples and reference allow.

    Raises:
        ValueError: a metric that was asked for is unknown or not possible, or no possible metric uses the reference.
    """
    wanted = [find_metric(name) for name in asked]
    names = Counter(name for metric in METRICS.values() for name in {*metric.scores, *metric.scores_elsewhere})
    if names.total() > len(names):
        raise ValueError(f"two metrics have a score {names.most_common(1)[0][0]}: rename the score of yours")
    metrics = {
        name: metric
        for name, metric in METRICS.items()
        if metric in wanted or (not asked and metric.by_default and extractor.name.startswith(metric.extractors))
    }
    obstacles = {name: _obstacle(name, metric, extractor, samples, reference) for name, metric in metrics.items()}
    if not asked and all(reasons := [obstacles[name] for name, metric in metrics.items() if metric.reference]):
        raise ValueError(f"no metric compares {samples.name} with {reference.name}: {reasons[0]}")
    for name, reason in obstacles.items():
        if reason and asked:
            raise ValueError(f"{name} of {samples.name} is not possible: {reason}")
        if reason and is_main_process():
            print(f"left out: {name}, since {reason}", file=sys.stderr)
    return [metric for name, metric in metrics.items() if not obstacles[name]]


def _obstacle(name: str, metric: Metric, extractor: Extractor, samples: ImageSet, reference: Reference) -> str | None:
    """Returns the reason why a metric is not possible, or None."""
    output, from_images = metric.features, metric.reference in ("images", "every image")
    if not extractor.name.startswith(metric.extractors):
        return f"it is defined for an extractor {metric.extractors}..., not {extractor.name}"
    if output not in extractor.outputs:
        return f"extractor {extractor.name!r} has no {output.replace('spatial', 'spatial features')}"
    if metric.reference == "statistics" and reference.gaussians and output not in reference.gaussians:
        return f"{reference.name} has no {' and '.join(NAMES.get(output, ('mean', f'covariance of {output}')))}"
    if from_images and reference.images is None:
        return f"{reference.name} has no images"
    sets = {"": samples}
    if reference.images is not None and metric.reference and (from_images or not reference.gaussians):
        sets["the reference "] = reference.images
    too_small = [role + images.holds for role, images in sets.items() if len(images) < metric.at_least]
    return f"{' and '.join(too_small)}, and {name} needs at least {metric.at_least}" if too_small else None


class Warnings(list[str]):
    """Warnings of an evaluation, printed when they are added and kept for the record."""

    def add(self, message: str) -> None:
        self.append(message)
        if is_main_process():
            tqdm.write(f"warning: {message}", file=sys.stderr)


def count_transparent(sets: Mapping[str, ExtractedFeatures | None], warnings: Warnings) -> dict[str, dict[str, int]]:
    """Returns how many images of each set are transparent, for the record; warns without background."""
    counts = {}
    for role, extracted in sets.items():
        if extracted is None or not extracted.num_transparent:
            continue
        images, counts[role] = extracted.shards.images, extracted.num_transparent
        if images.background is None:
            warnings.add(
                f"{counts[role]} of the {len(images)} images of {images.name} have transparent pixels, which count "
                "with the colour that they hold, as in ADM: --background white composites them"
            )
    return {"transparent": counts} if counts else {}


def warn_of_images(samples: ImageSet, reference: Reference, warnings: Warnings) -> None:
    """Adds the warnings that need no features."""
    for images in filter(None, (samples, reference.images)):
        for message in images.warnings:
            warnings.add(message)
        array = images.images
        if isinstance(array, np.ndarray) and not isinstance(array, np.memmap) and not is_named(images.name):
            warnings.add(
                f"{images.name} is compressed or in Fortran order, so every process reads all of it into "
                f"memory ({gigabytes(array.nbytes)}): write it with np.savez to keep it on disk"
            )
    if reference.images is not None and reference.images.size != samples.size:
        warnings.add(
            "the samples are {}x{} and the reference's images {}x{}, and papers never compare two sizes: "
            "--image-size crops a reference folder".format(*samples.size, *reference.images.size)
        )
    paths = () if isinstance(samples.images, np.ndarray) else samples.images
    if lossy := sorted(filter(is_lossy, {Path(path).suffix.lower() for path in paths})):
        warnings.add(
            f"samples are {', '.join(lossy)} files, whose compression changes every score: give PNGs or an .npz"
        )


def is_lossy(suffix: str) -> bool:
    """True if files with this lower-case suffix are of a format that changes pixels."""
    return Image.registered_extensions().get(suffix) in LOSSY


def warn_of_order(samples: ImageSet, all_samples: ImageSet, warnings: Warnings) -> None:
    """Warns of samples sorted by class; `samples` are the first of `all_samples`, or all of them."""
    if samples.labels is None or all_samples.labels is None:
        return
    are_sorted = "the samples are in the order of their labels or class folders, so"
    remedy = "shuffle them (files are read in the order of their names)"
    if _lack_classes([np.arange(len(samples))], all_samples.labels):
        warnings.add(f"{are_sorted} the first {len(samples)} of {len(all_samples)} have few classes: {remedy}")
    if _lack_classes(chunks(len(samples)), samples.labels):
        warnings.add(
            f"{are_sorted} each chunk of {IS_SPLIT} for the Inception Score has few classes and the score is "
            f"far too low: {remedy}"
        )


def _lack_classes(parts: Sequence[np.ndarray], labels: Sequence[int]) -> bool:
    """True if parts of the samples (indices) have far fewer classes each than if they were shuffled.

    It does not matter in which order the classes are, or whether several sorted sets follow each other.
    """
    shuffled = np.random.RandomState(0).permutation(labels)
    here, expected = (np.mean([_entropy(order[part]) for part in parts]) for order in (np.asarray(labels), shuffled))
    return bool(expected - here > 0.1)  # nats: about 10 % of the Inception Score


def _entropy(labels: np.ndarray) -> float:
    share = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(share * np.log(share)).sum())


def warn_of_features(
    features: Tensor, samples: ImageSet, reference: Reference, has_frechet: bool, warnings: Warnings
) -> None:
    """Warns of covariances from too few images, and of copies among the samples."""
    num, width = features.shape
    if has_frechet and num <= width:
        warnings.add(f"{samples.holds}, {SINGULAR.format(width)}")
    if has_frechet and (reference.num_fitted or width + 1) <= width:
        warnings.add(f"{reference.name} is fitted to {reference.num_fitted} images, {SINGULAR.format(width)}")
    num_different = len({hash(row.tobytes()) for row in features.numpy()})
    if num_different == 1 < num:
        warnings.add(f"all {num} images of {samples.name} are equal")
    elif num_different < num:
        warnings.add(f"{num - num_different} of the {num} images of {samples.name} are copies of others")
    if num < 2 * GROUPS:
        warnings.add(f"{num} samples are too few for a standard error, which needs {2 * GROUPS}")
