"""Record of an evaluation: its protocol, subject and environment, and the file it is written to."""

import contextlib
import datetime
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch_fidelity
from accelerate import PartialState

from sit_atconv import __version__
from sit_atconv.data import is_named
from sit_atconv.evaluation.extractors import Extractor
from sit_atconv.evaluation.features import ExtractedFeatures
from sit_atconv.evaluation.image_sets import ImageSet, digest_of, folder_of, hex_colour
from sit_atconv.evaluation.metric_functions import METHOD, are_balanced
from sit_atconv.evaluation.records import Evaluation, read_evaluation
from sit_atconv.evaluation.references import COMPARED, Reference


def protocol(
    samples: ImageSet,
    reference: Reference,
    extractor: Extractor,
    theirs: ExtractedFeatures | None,
    held_out: ExtractedFeatures | None,
    is_compared: bool,
) -> dict:
    """Returns how an evaluation is measured: everything that must agree to compare two of them."""
    settings, images = samples.manifest.get("settings", {}), reference.images
    sampler = {name: settings[name] for name in samples.manifest.get("sampler", ()) if name in settings}
    compared = {}
    if is_compared and images is not None and theirs is not None:
        compared = {"compared": {"num": min(len(images), COMPARED), "content": theirs.content}}
    if held_out is not None:
        compared["held_out"] = {"num": len(held_out.shards.images), "content": held_out.content}
    return {
        "samples": {
            "num": len(samples),
            "image_size": list(samples.size),
            "labels": settings.get("labels", _labels(samples)),
            "uint8_rule": settings.get("uint8_rule"),
            "codec": settings.get("codec"),
            "sampler": sampler or None,
            **_background(samples),
        },
        "reference": {
            "kind": "statistics" if reference.gaussians else "images",
            "num": reference.num_fitted,
            "content": reference.content() or (theirs.content if theirs else None),
            "crop": reference.recipe.get("crop") if reference.gaussians or images is None else images.crop,
        },
        **compared,
        "extractor": extractor.describe(),
        "metrics": METHOD,
        "versions": {"torch_fidelity": torch_fidelity.__version__},
    }


def _background(samples: ImageSet) -> dict:
    """Returns the background of transparent samples, if one was chosen."""
    return {} if samples.background is None else {"background": hex_colour(samples.background)}


def _labels(samples: ImageSet) -> str | None:
    if samples.labels is None:
        return None
    if are_balanced(samples.labels):
        return "balanced"
    return "as in the file" if isinstance(samples.images, np.ndarray) else "as in the folder"


def subject(samples: ImageSet, reference: Reference, ours: ExtractedFeatures) -> dict:
    """Returns what is measured, as far as it is known."""
    manifest = samples.manifest
    settings, session = manifest.get("settings", {}), (manifest.get("sessions") or [{}])[-1]
    known = {
        "path": _absolute(samples.name),
        "reference": _absolute(reference.name),
        "content": ours.content,
        **{
            key: manifest.get(key)
            for key in ("ckpt", "step", "ema_decay", "training", "images_per_second", "evaluations", "forwards")
        },
        **{key: session.get(key) for key in ("device", "processes")},
        **{key: settings.get(key) for key in ("seed", "weights", "model", "weak", "prediction")},
    }
    return {key: value for key, value in known.items() if value is not None}


def _absolute(source: str) -> str:
    """Returns the absolute path of a source, and one like "digits" unchanged."""
    return source if is_named(source) else os.path.abspath(source)


def environment(state: PartialState, batch_size: int) -> dict:
    """Returns date, hardware and versions, which should not matter."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": state.device.type,
        "processes": state.num_processes,
        "batch_size": batch_size,
        "versions": {"sit_atconv": __version__, "torch": torch.__version__, "numpy": np.__version__},
    }


def write_record(evaluation: Evaluation, out: str | None = None) -> Path:
    """Writes an evaluation to OUT, or beside its samples as scores-EXTRACTOR-KEY.json; returns the path.

    The key depends on samples and protocol, so that other evaluations are kept. From a record with the same key, scores
    that were not measured this time are kept. OSError: the file cannot be written.
    """
    path = Path(out) if out else _beside_the_samples(evaluation)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not out:
        with contextlib.suppress(ValueError):  # a damaged record is replaced
            evaluation = evaluation.with_scores_of(read_evaluation(path))
    evaluation.save(path)
    return path


def _beside_the_samples(evaluation: Evaluation) -> Path:
    identity = {part: facts for part, facts in evaluation.protocol.items() if part != "compared"}
    key = digest_of(json.dumps(identity, sort_keys=True), evaluation.subject["content"])[:8]
    name = f"scores-{evaluation.protocol['extractor']['name']}-{key}.json"
    path = folder_of(Path(evaluation.subject["path"]))
    if path.is_dir():
        return path / name
    return path.with_name(f"{path.stem}.{name}") if path.is_file() else Path("runs", name)
