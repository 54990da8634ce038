"""From samples and a reference to scores, on several processes, after any kill."""

import contextlib
import datetime
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sit_atconv.data import MAX_MEGAPIXELS
from sit_atconv.evaluation import metrics
from sit_atconv.evaluation import protocol as record
from sit_atconv.evaluation.extraction import ExtractedFeatures, extract_together
from sit_atconv.evaluation.extractors import Extractor, open_extractor
from sit_atconv.evaluation.features import FeatureShards
from sit_atconv.evaluation.gaussians import Gaussian
from sit_atconv.evaluation.image_sets import ImageSet, open_image_set
from sit_atconv.evaluation.records import METRICS, Evaluation, Score, score_name
from sit_atconv.evaluation.references import COMPARED, NAMES, Reference, open_reference, save_reference
from sit_atconv.runtime.commands import is_main_process
from sit_atconv.runtime.devices import on_cpu, prepare_device, return_freed_memory
from sit_atconv.runtime.files import gigabytes

CHOICES = ("fid", "sfid", "is", "kid", "prc")
NEEDS_REFERENCE = {"fid", "sfid", "kid", "prc"}
NEEDS_IMAGES = {"kid", "prc"}  # of the reference
LOSSY = {"JPEG", "MPO", "JPEG2000", "WEBP", "AVIF", "HEIF", "GIF"}  # Pillow's formats that lose detail or colours
SINGULAR = ("no more than the {} features: their covariance is singular and the Frechet distance far too large; use "
            "more images")


@dataclass(frozen=True, kw_only=True)
class ExtractionOptions:
    """How features are extracted; the help of `eval/fid.py` says what each option means."""

    extractor: str = "inception"
    weights: str | None = None
    batch_size: int = 64
    features: str = "runs/features"
    max_megapixels: float = MAX_MEGAPIXELS


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ExtractionOptions):
    """What to evaluate."""

    samples: str
    reference: str
    metrics: Sequence[str] = ()
    num_samples: int | None = None
    image_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions(ExtractionOptions):
    """Of what to write statistics."""

    reference: str
    image_size: int | None = None


def evaluate(options: EvaluateOptions) -> Evaluation | None:
    """Compares samples with a reference, on all processes together. Killed, the same call goes on.

    Returns:
        The scores and how they were measured; None on processes other than the main one.

    Raises:
        ValueError: images, statistics or weights that cannot be had or do not fit each other, a metric that they do
            not allow, or too few images for it.
        OSError: what one of the processes met.
    """
    all_samples = open_image_set(options.samples, max_megapixels=options.max_megapixels)
    samples = all_samples.first(options.num_samples) if options.num_samples else all_samples
    reference = open_reference(options.reference, options.image_size, options.max_megapixels)
    state, extractor = _start(options)
    _check_fit(extractor, samples, reference, state.device)
    chosen = set(choose_metrics(options.metrics, extractor, samples, reference))
    warnings = Warnings()
    _warn_of_images(samples, reference, warnings)
    _warn_of_order(samples, all_samples, warnings)
    ours = _extract(options, extractor, samples, state)
    is_compared = bool(NEEDS_IMAGES & chosen)
    is_needed = is_compared or (NEEDS_REFERENCE & chosen and not reference.gaussians)
    theirs = _extract(options, extractor, reference.images, state) if is_needed else None
    if not state.is_main_process:
        return None
    return_freed_memory()
    scores = _compute(chosen, ours, theirs, reference, samples, warnings, state.device)
    named = {score_name(name, extractor.name, len(samples)): scores[name] for name in METRICS if name in scores}
    return Evaluation(
        named,
        record.protocol(samples, reference, theirs, extractor, is_compared),
        record.subject(samples, reference, ours),
        record.environment(state, options.batch_size),
        warnings.found,
    )


def make_reference(options: ReferenceOptions, path: Path) -> dict | None:
    """Writes the statistics of a set of images, as `open_reference` and ADM's evaluator read them.

    Returns:
        What the file says of itself, and None on processes other than the main one. Raises as `evaluate`.
    """
    images = open_image_set(options.reference, options.image_size, options.max_megapixels)
    if len(images) < 2:
        raise ValueError(f"{images.holds}: statistics need 2 at least")
    state, extractor = _start(options)
    extracted = _extract(options, extractor, images, state)
    if not state.is_main_process:
        return None
    return_freed_memory()
    recipe = {
        "num": len(images), "image_size": list(images.size), "crop": images.crop, "content": extracted.content,
        "extractor": extractor.describe(), "made_from": options.reference,
        "environment": record.environment(state, options.batch_size),
    }
    outputs = [output for output in NAMES if output in extractor.outputs]
    save_reference(path, {output: extracted.gaussian(output) for output in outputs}, images, recipe)
    return recipe


class Warnings:
    """What was found wrong on the way: said at once, and kept for the record."""

    def __init__(self):
        self.found: list[str] = []

    def add(self, message: str) -> None:
        self.found.append(message)
        if is_main_process():
            tqdm.write(f"warning: {message}", file=sys.stderr)


def _start(options: ExtractionOptions) -> tuple[PartialState, Extractor]:
    state = PartialState(cpu=on_cpu(), timeout=datetime.timedelta(days=7))  # one may wait long for another's last shard
    prepare_device(state.device, tf32=False)  # nor in the distances of precision and recall
    with state.local_main_process_first() if state.num_processes > 1 else contextlib.nullcontext():  # one downloads
        return state, open_extractor(options.extractor, options.weights, state.device)


def _extract(
    options: ExtractionOptions, extractor: Extractor, images: ImageSet, state: PartialState
) -> ExtractedFeatures:
    return extract_together(FeatureShards(options.features, extractor, images, options.batch_size, state.device), state)


def _check_fit(extractor: Extractor, samples: ImageSet, reference: Reference, device: torch.device) -> None:
    """Raises ValueError where the first image shows that extractor, samples and reference do not fit."""
    if not len(samples):
        raise ValueError(f"{samples.holds}, too few for any metric")
    made_with = reference.recipe.get("extractor", {})
    for name, value in extractor.describe().items():
        if made_with.get(name, value) != value:
            raise ValueError(f"{reference.name} was made with an extractor of {name} {made_with[name]!r}, and this one "
                             f"has {value!r}: give another --reference or --extractor")
    seen = extractor(samples.read(0, 1).to(device))
    for output, gaussian in reference.gaussians.items():
        if output in seen and seen[output].shape[1] != len(gaussian.mu):
            raise ValueError(f"{NAMES[output][0]} of {reference.name} has {len(gaussian.mu)} values, and of extractor "
                             f"{extractor.name!r} come {seen[output].shape[1]}: give another --reference or extractor")


def choose_metrics(
    asked: Sequence[str], extractor: Extractor, samples: ImageSet, reference: Reference
) -> list[str]:
    """Those asked for, or else all that samples, reference and extractor allow; others are named on stderr.

    Raises:
        ValueError: one that was asked for is not possible, and why; or none is that compares.
    """
    if unknown := sorted(set(asked) - set(CHOICES)):
        raise ValueError(f"metrics are {', '.join(CHOICES)}, not {unknown[0]!r}")
    lacking = {metric: _what_lacks(metric, extractor, samples, reference) for metric in asked or CHOICES}
    chosen = [metric for metric, reason in lacking.items() if not reason]
    if not asked and not NEEDS_REFERENCE & set(chosen):
        raise ValueError(f"no metric compares {samples.name} with {reference.name}: {lacking['fid']}")
    for metric, reason in lacking.items():
        if reason and asked:
            raise ValueError(f"there is no {metric} of {samples.name}: {reason}")
        if reason and is_main_process():
            print(f"left out: {metric}, since {reason}", file=sys.stderr)
    return chosen


def _what_lacks(metric: str, extractor: Extractor, samples: ImageSet, reference: Reference) -> str | None:
    """Why a metric is not possible, or None."""
    output = {"sfid": "spatial", "is": "logits"}.get(metric, "features")
    if output not in extractor.outputs:
        return f"extractor {extractor.name!r} has no {output.replace('spatial', 'spatial features')}"
    if metric == "sfid" and reference.gaussians and "spatial" not in reference.gaussians:
        return f"{reference.name} holds no mu_s and sigma_s"
    if metric in NEEDS_IMAGES and reference.images is None:
        return f"{reference.name} holds no images"
    is_fitted = not reference.gaussians and metric in NEEDS_REFERENCE
    compared = [samples, reference.images] if metric in NEEDS_IMAGES or is_fitted else [samples]
    needed = {"is": 1, "prc": metrics.NEIGHBOURS + 1}.get(metric, 2)
    too_small = ["the reference " * (images is not samples) + images.holds
                 for images in compared if len(images) < needed]
    return f"{' and '.join(too_small)}, and {metric} needs {needed} at least" if too_small else None


def _compute(
    chosen: set[str], ours: ExtractedFeatures, theirs: ExtractedFeatures | None, reference: Reference,
    samples: ImageSet, warnings: Warnings, device: torch.device,
) -> dict[str, Score]:
    """By name of the metric."""
    group = metrics.jackknife_groups(len(samples), _balanced_labels(samples))
    scores = {}

    def gaussian(output: str) -> Gaussian:
        return reference.gaussians.get(output) or theirs.gaussian(output)

    if "sfid" in chosen:
        scores["sFID"] = metrics.frechet(ours.load("spatial"), gaussian("spatial"), group, progress=True)
    if "is" in chosen:
        scores["IS"] = metrics.inception_score(ours.load("logits"))
    features = ours.load("features")
    _warn_of_features(features, samples, reference, bool({"fid", "sfid"} & chosen), warnings)
    if "fid" in chosen:
        scores["FID"] = metrics.frechet(features, gaussian("features"), group, progress=True)
    real = theirs.load_spread("features", COMPARED) if NEEDS_IMAGES & chosen else None
    if "kid" in chosen:
        scores["KID"] = metrics.kid(features, real, group, progress=True)
    if "prc" in chosen:
        print(f"precision and recall: {len(features)} samples and {len(real)} images", file=sys.stderr)
        scores["precision"], scores["recall"] = metrics.precision_recall(features, real, device)
    return scores


def _balanced_labels(samples: ImageSet) -> Sequence[int] | None:
    """None where they were drawn at random, even if they came out even."""
    drawn = samples.manifest.get("settings", {}).get("labels", "balanced") == "random"
    return None if drawn else samples.labels


def _warn_of_images(samples: ImageSet, reference: Reference, warnings: Warnings) -> None:
    """Warns of what can be known before any feature is extracted."""
    for images in filter(None, (samples, reference.images)):
        for message in images.warnings:
            warnings.add(message)
        in_memory = isinstance(images.images, np.ndarray) and not isinstance(images.images, np.memmap)
        if in_memory and len(images) and images.name != "digits":
            warnings.add(f"{images.name} is compressed, or in Fortran's order, and so read into the memory of every "
                         f"process, {gigabytes(images.images.nbytes)}: written by np.savez it would stay on disk")
    if reference.images is not None and reference.images.size != samples.size:
        warnings.add("the samples are {}x{} and the reference's images {}x{}: scores of two sizes are compared by no "
                     "paper; --image-size crops a folder of references".format(*samples.size, *reference.images.size))
    paths = () if isinstance(samples.images, np.ndarray) else samples.images
    if lossy := sorted(filter(is_lossy, {Path(path).suffix.lower() for path in paths})):
        warnings.add(f"samples are {', '.join(lossy)} files, whose compression changes every score: give PNGs or an "
                     ".npz")


def _warn_of_order(samples: ImageSet, all_samples: ImageSet, warnings: Warnings) -> None:
    """Warns of sorted classes: `samples` are the first of `all_samples`, or all of them."""
    if samples.labels is None:
        return
    are_sorted = "the samples are in the order of their labels or class folders, so that"
    remedy = "shuffle them (files are read in the order of their names)"
    if _lack_classes([np.arange(len(samples))], all_samples.labels):
        warnings.add(f"{are_sorted} the first {len(samples)} of {len(all_samples)} have few classes: {remedy}")
    if _lack_classes(metrics.chunks(len(samples)), samples.labels):
        warnings.add(f"{are_sorted} a chunk of {metrics.IS_SPLIT} for the Inception Score has few classes and the "
                     f"score is far too low: {remedy}")


def is_lossy(suffix: str) -> bool:
    """True for the suffixes, in small letters, of formats that change pixels when they are written."""
    return Image.registered_extensions().get(suffix) in LOSSY


def _lack_classes(parts: Sequence[np.ndarray], labels: Sequence[int]) -> bool:
    """True if parts of the samples, given by indices, have far fewer classes each than if the samples were shuffled.

    That is so in whichever order the classes are, and also for several sorted sets one after another.
    """
    labels = np.asarray(labels)
    shuffled = np.random.RandomState(0).permutation(labels)
    here, expected = (np.mean([_entropy(order[part]) for part in parts]) for order in (labels, shuffled))
    return bool(expected - here > 0.1)  # nats: about 10 % of the Inception Score


def _entropy(labels: np.ndarray) -> float:
    share = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(share * np.log(share)).sum())


def _warn_of_features(
    features: Tensor, samples: ImageSet, reference: Reference, has_fid: bool, warnings: Warnings
) -> None:
    """Warns of covariances of too few images, and of copies among the samples."""
    num, width = features.shape
    if has_fid and num <= width:
        warnings.add(f"{samples.holds}, {SINGULAR.format(width)}")
    if has_fid and (reference.num_fitted or width + 1) <= width:
        warnings.add(f"{reference.name} is fitted to {reference.num_fitted} images, {SINGULAR.format(width)}")
    num_different = len({hash(row.tobytes()) for row in features.numpy()})
    if num_different == 1 < num:
        warnings.add(f"all {num} images of {samples.name} are equal")
    elif num_different < num:
        warnings.add(f"{num - num_different} of the {num} images of {samples.name} are copies of others")
    if num < 2 * metrics.GROUPS:
        warnings.add(f"{num} samples are too few for a standard error: it takes {2 * metrics.GROUPS}")
