"""Evaluation of samples against a reference, on several processes; an interrupted one resumes."""

import datetime
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from sit_atconv.data import MAX_MEGAPIXELS
from sit_atconv.data.pixels import Colour
from sit_atconv.evaluation import checks
from sit_atconv.evaluation import protocol as record
from sit_atconv.evaluation.extractors import Extractor, open_extractor
from sit_atconv.evaluation.features import Blocks, ExtractedFeatures, FeatureShards, extract_together
from sit_atconv.evaluation.gaussians import Gaussian
from sit_atconv.evaluation.image_sets import ImageSet, open_image_set
from sit_atconv.evaluation.metric_functions import jackknife_groups
from sit_atconv.evaluation.metrics import Metric, MetricInput
from sit_atconv.evaluation.records import Evaluation
from sit_atconv.evaluation.references import COMPARED, NAMES, Reference, open_reference, save_reference
from sit_atconv.evaluation.scores import Score
from sit_atconv.runtime.devices import on_cpu, prepare_device, return_freed_memory
from sit_atconv.runtime.processes import together


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    """The reference and the extraction of features; `eval/fid.py --help` explains each option."""

    reference: str
    image_size: int | None = None
    extractor: str = "inception"
    weights: str | None = None
    batch_size: int = 64
    features: str = "runs/features"
    max_megapixels: float = MAX_MEGAPIXELS
    background: Colour | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ReferenceOptions):
    """The samples to evaluate, and the options of the reference."""

    samples: str
    metrics: Sequence[str] = ()
    num_samples: int | None = None
    held_out: str | None = None
    keep_features: bool = True  # of the samples; those of the reference are kept in any case


def evaluate(options: EvaluateOptions, reference: Reference | None = None) -> Evaluation | None:
    """Compares samples with a reference, on all processes together. After a kill, the same call resumes.

    Args:
        options: those of the command.
        reference: what `fit_reference` returned for these options, if several sets of samples are compared with it.

    Returns:
        The scores with their protocol; None except on rank 0.

    Raises:
        ValueError: images, statistics or weights are not available or do not fit each other, or do not allow a metric.
        OSError: any process failed to read or write a file.
    """
    most, background = options.max_megapixels, options.background
    all_samples = open_image_set(options.samples, None, most, background)
    samples = all_samples.first(options.num_samples) if options.num_samples else all_samples
    reference = reference or open_reference(options.reference, options.image_size, most, background)
    held_out = open_image_set(options.held_out, options.image_size, most, background) if options.held_out else None
    checks.check_options(options.held_out, options.metrics, background, [samples, reference.images])
    state, extractor = _start(options)
    checks.check_fit(extractor, samples, reference, state.device)
    chosen = checks.choose_metrics(options.metrics, extractor, samples, reference)

    warnings = checks.Warnings()
    checks.warn_of_images(samples, reference, warnings)
    checks.warn_of_order(samples, all_samples, warnings)

    ours, theirs = _extract(options, extractor, samples, state), None
    others = _extract(options, extractor, held_out, state) if held_out is not None else None
    compared_with = {metric.reference for metric in chosen}
    is_compared = bool({"images", "every image"} & compared_with)
    is_needed = is_compared or ("statistics" in compared_with and not reference.gaussians)
    if is_needed and reference.images is not None:
        theirs = _extract(options, extractor, reference.images, state)
    if not state.is_main_process:
        return None
    return_freed_memory()
    transparent = checks.count_transparent({"samples": ours, "reference": theirs, "held_out": others}, warnings)
    scores, notes = _measure(chosen, ours, theirs, others, reference, warnings, state.device)
    if not options.keep_features:
        ours.delete()
    return Evaluation(
        scores,
        record.protocol(samples, reference, extractor, theirs, others, is_compared),
        record.subject(samples, reference, ours) | transparent | notes,
        record.environment(state, options.batch_size),
        list(warnings),
    )


def fit_reference(options: ReferenceOptions) -> Reference:
    """Returns the statistics of a reference for the Frechet distance, on all processes together.

    Raises as `evaluate`.
    """
    reference = open_reference(options.reference, options.image_size, options.max_megapixels, options.background)
    if reference.gaussians or reference.images is None:
        return reference
    images = reference.images
    state, extractor = _start(options)
    extracted = _extract(options, extractor, images, state)
    fitted = None
    with together():
        if state.is_main_process:
            fitted = extracted.gaussian("features")
    (fitted,) = broadcast_object_list([fitted])
    recipe = {"num": len(images), "crop": images.crop, "extractor": extractor.describe()}
    return Reference(reference.name, {"features": fitted}, None, recipe)


def make_reference(options: ReferenceOptions, path: Path) -> dict | None:
    """Writes the statistics of a set of images for `open_reference` and ADM's evaluator.

    Returns:
        The recipe stored in the file; None except on rank 0. Raises as `evaluate`.
    """
    images = open_image_set(options.reference, options.image_size, options.max_megapixels, options.background)
    if len(images) < 2:
        raise ValueError(f"{images.holds}: statistics need at least 2")
    state, extractor = _start(options)
    extracted = _extract(options, extractor, images, state)
    if not state.is_main_process:
        return None
    return_freed_memory()
    transparent = checks.count_transparent({"reference": extracted}, checks.Warnings())
    recipe = {
        **transparent,
        "num": len(images),
        "image_size": list(images.size),
        "crop": images.crop,
        "content": extracted.content,
        "extractor": extractor.describe(),
        "made_from": options.reference,
        "environment": record.environment(state, options.batch_size),
    }
    outputs = [output for output in NAMES if output in extractor.outputs]
    save_reference(path, {output: extracted.gaussian(output) for output in outputs}, images, recipe)
    return recipe


def _start(options: ReferenceOptions) -> tuple[PartialState, Extractor]:
    state = PartialState(cpu=on_cpu(), timeout=datetime.timedelta(days=7))  # ranks wait for the slowest one
    prepare_device(state.device, tf32=False)  # changes FID, precision and recall
    opened = functools.partial(open_extractor, options.extractor, options.weights, state.device)
    if state.num_processes == 1:
        return state, opened()
    extractors = []
    for is_turn in (state.is_local_main_process, not state.is_local_main_process):  # one of them downloads
        with together():
            if is_turn:
                extractors.append(opened())
    return state, extractors[0]


def _extract(
    options: ReferenceOptions, extractor: Extractor, images: ImageSet, state: PartialState
) -> ExtractedFeatures:
    folder = Path(options.features)
    return extract_together(FeatureShards(folder, extractor, images, options.batch_size, state.device), state)


def _measure(
    chosen: Sequence[Metric],
    ours: ExtractedFeatures,
    theirs: ExtractedFeatures | None,
    held_out: ExtractedFeatures | None,
    reference: Reference,
    warnings: checks.Warnings,
    device: torch.device,
) -> tuple[dict[str, Score], dict]:
    """Returns the scores of the chosen metrics by name, in the order of `chosen`, and their notes."""
    samples, extractor = ours.shards.images, ours.shards.extractor
    are_random = samples.manifest.get("settings", {}).get("labels") == "random"  # even if they come out balanced
    group = jackknife_groups(len(samples), None if are_random else samples.labels)

    @functools.cache
    def real(kind: str | None, output: str) -> Gaussian | Tensor | Blocks | None:
        if kind == "statistics" and reference.gaussians:
            return reference.gaussians[output]
        if kind is None or theirs is None:
            return None
        if kind == "every image":
            return theirs.blocks(output)
        return theirs.gaussian(output) if kind == "statistics" else theirs.load_spread(output, COMPARED)

    scores, notes = dict[str, Score](), dict[str, Any]()
    for output in dict.fromkeys(["features", *(metric.features for metric in chosen)]):
        generated = ours.load(output)
        if output == "features":
            has_frechet = any(metric.reference == "statistics" for metric in chosen)
            checks.warn_of_features(generated, samples, reference, has_frechet, warnings)
        for metric in chosen:
            if metric.features == output:
                others = held_out.load(output) if held_out is not None else None
                inputs = MetricInput(generated, real(metric.reference, output), group, device, others, notes)
                found = metric.measure(inputs)
                scores |= zip(metric.score_names(extractor.name, len(samples)), found, strict=True)
        del generated  # frees its memory before the next output is loaded
    ordered = [name for metric in chosen for name in metric.score_names(extractor.name, len(samples))]
    return {name: scores[name] for name in ordered}, notes
