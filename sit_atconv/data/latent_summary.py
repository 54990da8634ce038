"""Says what an encoding sees in the images, and how to train on the latents that it wrote."""

import itertools
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from sit_atconv.data.images import RULES, ImageFolder, left_out_line
from sit_atconv.data.latent_folder import LatentIndex, LatentSettings
from sit_atconv.data.order import hold_out
from sit_atconv.models.presets import PATCHES
from sit_atconv.training.config import TrainConfig

TRAIN = Path(__file__).parents[1] / "train.py"
CONFIGS = Path(__file__).parents[2] / "configs"
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}  # no names of classes
SMALL_PRESET = "SiT-ATConv-S/2"  # for sizes without a configuration of their own


def describe_images(images: ImageFolder, settings: LatentSettings) -> list[str]:
    """Returns line by line what is known of the images before they are read.

    Args:
        images: all images, in the order of the latents.
        settings: of the last part of the latents.
    """
    names = images.class_names
    lines = [f"{images.folder}: {len(images)} images, {describe_classes(names, images.class_counts)}"]
    if images.left_out:
        lines.append(left_out_line(images.left_out))
    if settings.rules < RULES:
        lines.append(f"rules of its first shards (version {settings.rules} of {RULES}): class folders in text order, "
                     "fewer suffixes")
    if settings.extends:
        former, known = (sum(part) for part in zip(*((part["num_images"], len(part["class_names"]))
                                                     for part in settings.extends), strict=True))
        added = [f"{label} is {names[label]!r}" for label in range(known, len(names))]
        lines.append(f"extension: images {former} to {len(images) - 1}; new labels: {', '.join(added) or 'none'}")
    if len(names) > 1 and {name.lower() for name in names} <= SPLITS:
        train = next((name for name in names if name.lower().startswith("train")), names[0])
        lines.append(f"warning: the classes {' and '.join(map(repr, names))} have the names of a data set's splits: "
                     f"if that is what they are, give --images {shlex.quote(str(images.folder / train))}")
    if not has_patch(settings):
        side = settings.moments_shape[-1]
        lines.append(f"warning: latents of {side}x{side}, and no preset's patch ({', '.join(map(str, PATCHES))}) "
                     "divides that: give another --image-size, or train with another --model.patch_size")
    return lines


def describe_classes(names: Sequence[str], counts: Sequence[int], most: int = 10) -> str:
    """Returns the images of each class, or those of the smallest and the largest class if there are many."""
    if len(names) <= most:
        each = ", ".join(f"{name!r} {count}" for name, count in zip(names, counts, strict=True))
        return f"{len(names)} {'class' if len(names) == 1 else 'classes'}: {each}"
    by_count = sorted(range(len(names)), key=lambda label: counts[label])
    smallest, largest = (f"{counts[label]} ({names[label]!r})" for label in (by_count[0], by_count[-1]))
    return f"{len(names)} classes of {smallest} to {largest}"


def describe_latents(index: LatentIndex) -> list[str]:
    """Returns line by line what reading the images has shown."""
    lines = [describe_classes(index.class_names, index.class_counts)]
    if index.enlarged:
        lines.append(f"{index.enlarged} of {index.num_images} images are smaller than {index.settings.image_size} px "
                     "and were enlarged")
    return lines


def training_command(index: LatentIndex, labels: np.ndarray, out: Path) -> str:
    """Returns a command that trains on these latents as it is printed: a shipped recipe, fitted to what there is.

    Args:
        index: of the latents.
        labels: of all their images.
        out: their folder.
    """
    settings, options = index.settings, {"data.latents": out}
    config = CONFIGS / f"imagenet{settings.image_size}.yaml"
    if not config.exists():
        config = CONFIGS / "imagenet256.yaml"
        options |= {"preset": SMALL_PRESET, "data.image_size": settings.image_size}
    if not has_patch(settings):
        options["model.patch_size"] = 1
    if not settings.mirrored:
        options["data.mirror"] = "false"
    if len(index.class_names) == 1:  # unconditional
        options |= {"model.has_null_label": "false", "flow.class_dropout_prob": 0, "preview.cfg": 1}
    recipe = yaml.safe_load(config.read_text())
    if (held_out := recipe["data"]["held_out"]) > index.num_images // 10:
        options["data.held_out"] = held_out = index.num_images // 10
    if len(np.unique(np.delete(labels, hold_out(len(labels), held_out)))) < len(np.unique(labels)):
        options["data.held_out"] = held_out = 0  # it would take all images of a class
    if recipe["train"].get("batch_size", TrainConfig.batch_size) > (rest := index.num_images - held_out):
        options["train.batch_size"] = 1 << (rest.bit_length() - 1)  # a power of two suits several processes
    names = (out.resolve().name + (f"-{number}" if number > 1 else "") for number in itertools.count(1))
    options["out"] = next(path for path in (Path("runs", name) for name in names) if not path.exists())
    given = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in options.items())
    return f"accelerate launch {_relative(TRAIN)} --config {_relative(config)} {given}"


def has_patch(settings: LatentSettings) -> bool:
    """Whether the patch of some preset divides the side of the latents."""
    return any(settings.moments_shape[-1] % patch == 0 for patch in PATCHES)


def _relative(path: Path) -> str:
    return shlex.quote(os.path.relpath(path))
