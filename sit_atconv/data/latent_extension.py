"""Finds the place of each image in an existing folder of latents, and adds new images to it.

The shards store the names and labels of their images. Existing images keep their place and label. New images form a
part of their own after them, in the order of the listing, and new classes get the labels after the existing ones.
"""

import copy
import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sit_atconv.data.images import ImageFolder
from sit_atconv.data.latent_folder import LatentFolder, LatentSettings, find_index, newest_settings, open_shard
from sit_atconv.runtime.names import show_some


def arrange(
    images: ImageFolder, settings: LatentSettings, path: Path, *, extend: bool
) -> tuple[ImageFolder, LatentSettings]:
    """Returns the images with the order and labels of the latents, and the settings of the last part.

    Args:
        images: all images.
        settings: those of a new folder with these images.
        path: folder of the latents: complete, incomplete or missing.
        extend: whether images may be added.

    Raises:
        ValueError: the latents have other settings, images are gone or have another label, or there are new images
            that must not or cannot be added.
    """
    known = newest_settings(path)
    if known is None:
        if extend:
            raise ValueError(f"{path} holds no latents to extend: leave --extend out")
        return images, settings
    of_same_images = dataclasses.replace(
        settings, num_images=known.num_images, files=known.files, extends=known.extends
    )
    if changes := of_same_images.differences(known.as_dict()):
        raise ValueError(
            f"{path} was encoded with other settings ({'; '.join(changes)}): use the former settings, or "
            "give another --out"
        )
    if settings.files == known.files and not known.extends:
        return images, settings
    existing = _Existing(images, known, path)
    placed = set(existing.names)
    new = [name for name in existing.where if name not in placed]
    if not new:
        return existing.select(existing.names), known
    if not extend:
        raise ValueError(
            f"{images.where()} holds {len(new)} images that {path} does not have ({show_some(new, 3)}): "
            "add them with --extend, or give another --out"
        )
    part = known.extended(len(new), existing.select(new).files_sha256(), existing.former_classes)
    return existing.select([*existing.names, *new]), part


class _Existing:
    """The images of existing latents, as the shards record them.

    Args:
        images: all images.
        known: settings of the last part of the latents.
        path: folder of the latents.

    Attributes:
        where: name -> position among `images`.
        names: of the latents' images, in order.
        former_classes: class names of the latents.
        class_names: these, and then the new ones in the order of `images`.

    Raises:
        ValueError: images are gone or have another label, or the images of missing shards cannot be identified.
    """

    def __init__(self, images: ImageFolder, known: LatentSettings, path: Path):
        self.images, self.known, self.path = images, known, path
        self.where = {images.name(i): i for i in range(len(images))}
        index = find_index(path)
        self.index = index if index and index.settings == known else None
        names, stored_labels = self._read_shards(LatentFolder(path, known))
        self.former_classes = self._former_classes(stored_labels, all_read=None not in names)
        former = set(self.former_classes)
        self.class_names = [*self.former_classes, *(name for name in images.class_names if name not in former)]
        label = {name: number for number, name in enumerate(self.class_names)}
        self.labels = np.array([label[name] for name in images.class_names])[images.labels]
        self._compare(stored_labels)
        self.names = self._fill(names)

    def select(self, names: Sequence[str], class_names: Sequence[str] | None = None) -> ImageFolder:
        """Returns the images of these names, in this order, with the latents' labels and class names."""
        selected = copy.copy(self.images)
        selected.names = np.array([os.fsencode(name) for name in names])
        # An image that was left out of its shard may be gone by now. It is not encoded, so any label will do.
        selected.labels = np.array([self.labels[self.where[name]] if name in self.where else 0 for name in names])
        selected.class_names = tuple(self.class_names if class_names is None else class_names)
        return selected

    def _read_shards(self, folder: LatentFolder) -> tuple[list[str | None], dict[str, int]]:
        """Returns the names of all images, None in missing shards, and the labels of those that were encoded."""
        missing = set(folder.missing(may_skip=True))
        names, labels = list[str | None](), dict[str, int]()
        for number in range(folder.num_shards):
            if number in missing:
                names += [None] * len(folder.images(number))
                continue
            shard = open_shard(folder.shard(number))
            labels |= dict(zip(shard.names, shard.tensors["labels"].tolist(), strict=True))
            ordered = sorted([*shard.names, *shard.skipped], key=lambda name: self.where.get(name, len(self.where)))
            names += ordered
        return names, labels

    def _former_classes(self, stored_labels: dict[str, int], all_read: bool) -> list[str]:
        """Returns the class names of the latents, from the index or else from settings and labels."""
        if self.index:
            return self.index.class_names
        names = [name for part in self.known.extends for name in part["class_names"]]
        if not all_read:
            return names  # the last part is incomplete, and all other classes are its own
        of_label = {
            label: self.images.class_names[self.images.labels[self.where[name]]]
            for name, label in stored_labels.items()
            if name in self.where
        }
        while len(names) in of_label:
            names.append(of_label[len(names)])
        return names

    def _compare(self, stored_labels: dict[str, int]) -> None:
        """Raises a ValueError that names all images that are gone or have another label."""
        gone = [name for name in stored_labels if name not in self.where]
        changed = [
            name
            for name, label in stored_labels.items()
            if name in self.where and self.labels[self.where[name]] != label
        ]
        faults = [
            f"{len(found)} images of {self.path} {what} {self.images.where()}: {show_some(found)}"
            for found, what in ((gone, "are gone from"), (changed, "have another label in"))
            if found
        ]
        if faults:
            raise ValueError("\n".join([*faults, f"Restore them, {self._otherwise()}"]))

    def _fill(self, names: list[str | None]) -> list[str]:
        """Puts the images that are in no shard into the gaps, if the checksums of the parts confirm it."""
        known = set(names)
        rest = [name for name in self.where if name not in known]
        if names.count(None) in (0, len(rest)):
            fill = iter(rest)
            filled = [next(fill) if name is None else name for name in names]
            wrong = [
                self.select(filled[images], class_names).files_sha256() != part.files
                for part, images, class_names in self._parts()
                if None in names[images]
            ]
            if not any(wrong):
                return filled
            if len(wrong) > 1:
                raise ValueError(
                    f"{self.path} lacks shards of several parts, and it is unknown which images belong to "
                    "which part: restore the shards of all parts but one from a copy, or give another "
                    "--out"
                )
        raise ValueError(
            f"{self.path} is incomplete, and {self.images.where()} does not hold the images that it was "
            "started with: complete it with those alone (move new images away meanwhile) and add the "
            f"others with --extend afterwards, {self._otherwise()}"
        )

    def _parts(self) -> Iterator[tuple[LatentSettings, slice, list[str]]]:
        """Yields the settings of each part, the places of its images, and the class names up to it."""
        end, class_names = 0, list[str]()
        for part, extended in itertools.zip_longest(self.known.parts, self.known.extends):
            start, end = end, end + part.num_images
            class_names = class_names + extended["class_names"] if extended else self.class_names
            yield part, slice(start, end), class_names

    def _otherwise(self) -> str:
        unfinished = self.known.extends and not self.index
        return ("delete the shards that its index.json does not list, " if unfinished else "") + "or give another --out"
