"""From samples and a reference to scores, on several processes, after any kill."""

import datetime
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch_fidelity
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from sit_atconv import __version__
from sit_atconv.commands import is_main_process
from sit_atconv.devices import on_cpu, prepare_device
from sit_atconv.evaluation import metrics
from sit_atconv.evaluation.extractors import Extractor, open_extractor
from sit_atconv.evaluation.features import FeatureShards
from sit_atconv.evaluation.image_sets import ImageSet, digest_of, open_image_set
from sit_atconv.evaluation.records import Evaluation, Score, score_name
from sit_atconv.evaluation.statistics import NAMES, Gaussian, Reference, open_reference, save_reference
from sit_atconv.extraction import Extraction

METRICS = ("fid", "sfid", "is", "kid", "prc")
MOST_COMPARED = 50_000  # reference images for precision, recall and KID, from all over the set: bounds memory
LOSSY = {".jpg", ".jpeg", ".webp"}
NOT_OF_THE_SAMPLER = ("labels", "num_samples", "seed", "size", "weights", "model", "weak", "codec", "uint8_rule")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What to evaluate; the help of `eval/fid.py` says what each option means."""

    reference: str
    samples: str | None = None
    extractor: str = "inception"
    weights: str | None = None
    metrics: Sequence[str] = ()
    num_samples: int | None = None
    image_size: int | None = None
    batch_size: int = 64
    features: str = "runs/features"


def evaluate(options: EvaluateOptions) -> Evaluation | None:
    """Compares samples with a reference, on all processes together. Killed, the same call goes on.

    Returns:
        Scores, protocol and what else there is to say; None on processes other than the main one.

    Raises:
        ValueError: images, statistics or weights that cannot be had or do not fit each other, a metric that they do
            not allow, or too few images for it.
        OSError: what one of the processes met.
    """
    samples = open_image_set(options.samples)
    samples = samples.first(options.num_samples) if options.num_samples else samples
    reference = open_reference(options.reference, options.image_size)
    state, extractor = _start(options)
    _check_fit(extractor, samples, reference, state.device)
    chosen = choose_metrics(options.metrics, extractor, samples, reference)
    ours = _extract(options, extractor, samples, state)
    is_compared = {"kid", "prc"} & set(chosen) or not reference.gaussians
    theirs = _extract(options, extractor, reference.images, state) if is_compared else None
    if not state.is_main_process:
        return None
    found = []

    def warn(message: str) -> None:
        found.append(message)
        tqdm.write(f"warning: {message}", file=sys.stderr)

    scores = _compute(chosen, extractor, ours, theirs, reference, samples, warn, state.device)
    return Evaluation(scores, _protocol(samples, reference, theirs, extractor), _subject(samples, reference, ours),
                      _environment(options, state), found)


def make_reference(options: EvaluateOptions, path: Path) -> dict | None:
    """Writes the statistics of a set of images, as `open_reference` and ADM's evaluator read them.

    Returns:
        What the file says of itself, and None on processes other than the main one. Raises as `evaluate`.
    """
    images = open_image_set(options.reference, options.image_size)
    if len(images) < 2:
        raise ValueError(f"{images.name} holds {len(images)} images: statistics need two at least")
    state, extractor = _start(options)
    extraction = _extract(options, extractor, images, state)
    if not state.is_main_process:
        return None
    recipe = {
        "num": len(images), "image_size": list(images.size), "crop": images.crop, "content": extraction.content,
        "extractor": extractor.describe(), "made_from": options.reference, "environment": _environment(options, state),
    }
    outputs = [output for output in NAMES if output in extractor.outputs]
    save_reference(path, {output: extraction.gaussian(output) for output in outputs}, images, recipe)
    return recipe


def _start(options: EvaluateOptions) -> tuple[PartialState, Extractor]:
    state = PartialState(cpu=on_cpu(), timeout=datetime.timedelta(days=7))  # one may wait long for another's last shard
    prepare_device(state.device, tf32=False)
    return state, open_extractor(options.extractor, options.weights, state.device)


def _extract(options: EvaluateOptions, extractor: Extractor, images: ImageSet, state: PartialState) -> Extraction:
    return Extraction(FeatureShards(options.features, extractor, images, options.batch_size, state.device), state)


def _check_fit(extractor: Extractor, samples: ImageSet, reference: Reference, device: torch.device) -> None:
    """Raises ValueError where the first image shows that extractor, samples and reference do not fit."""
    if not len(samples):
        raise ValueError(f"{samples.name} holds 0 images, too few for any metric")
    made_with = reference.recipe.get("extractor", {})
    for name, value in extractor.describe().items():
        if made_with.get(name, value) != value:
            raise ValueError(f"{reference.name} was made with an extractor of {name} {made_with[name]!r}, and this one "
                             f"has {value!r}: give another --reference or --extractor")
    with torch.inference_mode():
        seen = extractor(samples.read(0, 1).to(device))
    for output, gaussian in reference.gaussians.items():
        if output in seen and seen[output].shape[1] != len(gaussian.mu):
            raise ValueError(f"{NAMES[output][0]} of {reference.name} has {len(gaussian.mu)} values, and of extractor "
                             f"{extractor.name!r} come {seen[output].shape[1]}: give another --reference or extractor")


def choose_metrics(
    asked: Sequence[str], extractor: Extractor, samples: ImageSet, reference: Reference
) -> tuple[str, ...]:
    """Those asked for, or else all that samples, reference and extractor allow; others are named on stderr.

    Raises:
        ValueError: one that was asked for is not possible; the message says why.
    """
    if unknown := sorted(set(asked) - set(METRICS)):
        raise ValueError(f"metrics are {', '.join(METRICS)}, not {unknown[0]!r}")
    few = min(len(samples), len(reference.images) if reference.images is not None else len(samples))
    no_images = reference.images is None and f"{reference.name} holds no images"
    lacking = {
        "fid": few < 2 and "one image has no covariance",
        "sfid": ("spatial" not in extractor.outputs and f"extractor {extractor.name!r} has no spatial features")
        or (bool(reference.gaussians) and "spatial" not in reference.gaussians
            and f"{reference.name} holds no mu_s and sigma_s") or (few < 2 and "one image has no covariance"),
        "is": "logits" not in extractor.outputs and f"extractor {extractor.name!r} has no logits",
        "kid": no_images or (few < 2 and "it needs two images on both sides"),
        "prc": no_images or (few <= metrics.NEIGHBOURS and f"it needs {metrics.NEIGHBOURS + 1} images on both sides"),
    }
    for metric in asked or METRICS:
        if lacking[metric] and asked:
            raise ValueError(f"there is no {metric} of {samples.name}: {lacking[metric]}")
        if lacking[metric] and is_main_process():
            print(f"left out: {metric}, since {lacking[metric]}", file=sys.stderr)
    chosen = tuple(metric for metric in METRICS if metric in (asked or METRICS) and not lacking[metric])
    if not set(chosen) - {"is"} and not asked:
        raise ValueError(f"{samples.name} holds {len(samples)} images, too few for any metric")
    return chosen


def _compute(
    chosen: Sequence[str], extractor: Extractor, ours: Extraction, theirs: Extraction | None, reference: Reference,
    samples: ImageSet, warn: Callable[[str], None], device: torch.device,
) -> dict[str, Score]:
    num, name = len(samples), extractor.name
    group = metrics.jackknife_groups(num, samples.labels)
    scores = {}

    def gaussian(output: str) -> Gaussian:
        return reference.gaussians.get(output) or theirs.gaussian(output)

    if reference.images is not None and reference.images.size != samples.size:
        warn("the samples are {}x{} and the reference's images {}x{}: scores of two sizes are compared by no paper; "
             "--image-size crops a folder of references".format(*samples.size, *reference.images.size))
    if lossy := sorted({path.suffix.lower() for path in _paths(samples)} & LOSSY):
        warn(f"samples are {', '.join(lossy)} files, whose compression changes every score: give PNGs or an .npz")
    if "sfid" in chosen:
        spatial = ours.load("spatial")
        scores["sFID"] = metrics.frechet(spatial, gaussian("spatial"), group, progress=True)
        del spatial
    if "is" in chosen:
        if num > metrics.IS_SPLIT and samples.labels is not None and list(samples.labels) == sorted(samples.labels):
            warn(f"the samples lie in the order of their labels, so that a chunk of {metrics.IS_SPLIT} for the "
                 "Inception Score has few classes and the score is far too low: shuffle them")
        scores["IS"] = metrics.inception_score(ours.load("logits"))
    features = ours.load("features")
    _warn_of_features(features, samples, "fid" in chosen or "sfid" in chosen, warn)
    if "fid" in chosen:
        scores["FID"] = metrics.frechet(features, gaussian("features"), group, progress=True)
    if {"kid", "prc"} & set(chosen):
        real = theirs.load_spread("features", MOST_COMPARED)
        if "kid" in chosen:
            scores["KID"] = metrics.kid(features, real, group, progress=True)
        if "prc" in chosen:
            print(f"precision and recall: {num} samples and {len(real)} images", file=sys.stderr)
            scores["precision"], scores["recall"] = metrics.precision_recall(features, real, device)
    order = ("FID", "sFID", "IS", "precision", "recall", "KID")
    return {score_name(metric, name, num): scores[metric] for metric in order if metric in scores}


def _paths(images: ImageSet) -> Sequence[Path]:
    return () if isinstance(images.images, np.ndarray) else images.images


def _warn_of_features(features: Tensor, samples: ImageSet, has_fid: bool, warn: Callable[[str], None]) -> None:
    num, width = features.shape
    if has_fid and num <= width:
        warn(f"{samples.name} holds {num} images, no more than the {width} features: their covariance is singular and "
             "the Frechet distance far too large; use more images")
    num_different = len({hash(row.tobytes()) for row in features.numpy()})
    if num_different == 1 < num:
        warn(f"all {num} images of {samples.name} are equal")
    elif num_different < num:
        warn(f"{num - num_different} of the {num} images of {samples.name} are copies of others")
    if num < 2 * metrics.GROUPS:
        warn(f"{num} samples are too few for a standard error: it takes {2 * metrics.GROUPS}")


def _protocol(samples: ImageSet, reference: Reference, theirs: Extraction | None, extractor: Extractor) -> dict:
    settings = samples.manifest.get("settings", {})
    labels = settings.get("labels")
    if labels is None and samples.labels is not None:
        labels = "balanced" if metrics.are_balanced(samples.labels) else "as in the file"
    images = reference.images
    return {
        "samples": {
            "num": len(samples),
            "image_size": list(samples.size),
            "labels": labels,
            "uint8_rule": settings.get("uint8_rule"),
            "codec": settings.get("codec"),
            "sampler": {key: settings[key] for key in settings if key not in NOT_OF_THE_SAMPLER} or None,
        },
        "reference": {
            "kind": "statistics" if reference.gaussians else "images",
            "num": reference.recipe.get("num", None if reference.gaussians else len(images)),
            "content": reference.content() or theirs.content,
            "crop": reference.recipe.get("crop", None if reference.gaussians else images.crop),
        },
        **({"compared": {"num": min(len(images), MOST_COMPARED), "content": theirs.content}} if theirs else {}),
        "extractor": extractor.describe(),
        "metrics": metrics.METHOD,
        "versions": {"torch_fidelity": torch_fidelity.__version__},
    }


def _subject(samples: ImageSet, reference: Reference, ours: Extraction) -> dict:
    manifest = samples.manifest
    settings, session = manifest.get("settings", {}), (manifest.get("sessions") or [{}])[-1]
    return {
        "path": samples.name,
        "reference": reference.name,
        "content": ours.content,
        **{key: manifest.get(key) for key in ("ckpt", "step", "images_per_second", "evaluations", "forwards")},
        **{key: session.get(key) for key in ("device", "processes")},
        **{key: settings.get(key) for key in ("seed", "weights", "model", "weak")},
    }


def _environment(options: EvaluateOptions, state: PartialState) -> dict:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": state.device.type,
        "processes": state.num_processes,
        "batch_size": options.batch_size,
        "versions": {"sit_atconv": __version__, "torch": torch.__version__, "numpy": np.__version__},
    }


def default_record(options: EvaluateOptions, evaluation: Evaluation) -> Path:
    """Where an evaluation is written down: beside its samples, under a name of its protocol."""
    key = digest_of(json.dumps(evaluation.protocol, sort_keys=True), evaluation.subject["content"])[:8]
    name = f"scores-{options.extractor}-{key}.json"
    path = Path(options.samples)
    path = path.parent if path.name == "manifest.json" else path
    if path.is_dir():
        return path / name
    return path.with_name(f"{path.stem}.{name}") if path.is_file() else Path("runs", name)
