"""Lines that `encode.py` prints about images and latents."""

import shlex
from collections.abc import Sequence

from sit_atconv.data.image_rules import RULES
from sit_atconv.data.images import ImageFolder, left_out_line
from sit_atconv.data.latent_folder import LatentIndex, LatentSettings

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}  # unlikely as names of classes


def describe_images(images: ImageFolder, settings: LatentSettings, patch_sizes: Sequence[int] = ()) -> list[str]:
    """Returns lines about the images that can be printed before they are read.

    Args:
        images: all images, in the order of the latents.
        settings: of the last part of the latents.
        patch_sizes: those of the presets; a warning is given if none of them divides the latents.
    """
    names = images.class_names
    lines = [f"{images.where()}: {len(images)} images, {describe_classes(names, images.class_counts)}"]
    if images.left_out:
        lines.append(left_out_line(images.left_out))
    if settings.rules < RULES:
        lines.append(
            f"the rules of the first shards stay (version {settings.rules} of {RULES}): class folders in text "
            "order, fewer suffixes"
        )
    if settings.extends:
        former, known = (
            sum(part)
            for part in zip(*((part["num_images"], len(part["class_names"])) for part in settings.extends), strict=True)
        )
        added = [f"{label} is {names[label]!r}" for label in range(known, len(names))]
        lines.append(f"extension: images {former} to {len(images) - 1}; new labels: {', '.join(added) or 'none'}")
    if len(names) > 1 and {name.lower() for name in names} <= SPLITS:
        train = next((name for name in names if name.lower().startswith("train")), names[0])
        lines.append(
            f"warning: the classes {' and '.join(map(repr, names))} are named like the splits of a data set: "
            f"if they are splits, give --images {shlex.quote(images.where(train))}"
        )
    side = settings.latent_size
    if patch_sizes and all(side % patch for patch in patch_sizes):
        lines.append(
            f"warning: no preset's patch size ({', '.join(map(str, patch_sizes))}) divides the latents' size "
            f"{side}x{side}: give another --image-size, or train with another --model.patch_size"
        )
    return lines


def describe_classes(names: Sequence[str], counts: Sequence[int], most: int = 10) -> str:
    """Returns the number of images of each class, or of the smallest and largest class if there are many."""
    if len(names) <= most:
        each = ", ".join(f"{name!r} {count}" for name, count in zip(names, counts, strict=True))
        return f"{len(names)} {'class' if len(names) == 1 else 'classes'}: {each}"
    by_count = sorted(range(len(names)), key=lambda label: counts[label])
    smallest, largest = (f"{counts[label]} ({names[label]!r})" for label in (by_count[0], by_count[-1]))
    return f"{len(names)} classes of {smallest} to {largest}"


def describe_latents(index: LatentIndex) -> list[str]:
    """Returns lines about the images that are known once they were read."""
    lines = [describe_classes(index.class_names, index.class_counts)]
    if index.enlarged:
        lines.append(
            f"{index.enlarged} of {index.num_images} images are smaller than {index.settings.image_size} px "
            "and were enlarged"
        )
    settings = index.settings
    if settings.pixels:
        lines.append(f"with their pixels ({settings.pixels}, {settings.image_size}x{settings.image_size})")
    if settings.features:
        rows, columns = settings.features["grid_size"]
        lines.append(
            f"with features of {settings.features['encoder']}: {rows}x{columns} tokens of width "
            f"{settings.features['width']}"
        )
    return lines
