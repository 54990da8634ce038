"""Finds the place of each image in a folder of latents that exists, and adds the images that are new.

The shards know the names and labels of their images. Existing images keep their place and label. New ones form a part
of their own after them, in the order of the listing, and new classes get the labels after the existing ones.
"""

import copy
import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sit_atconv.data.images import ImageFolder
from sit_atconv.data.latent_folder import (
    LatentFolder,
    LatentIndex,
    LatentSettings,
    newest_settings,
    open_shard,
    read_index,
)
from sit_atconv.runtime.names import show_some


def arrange(
    images: ImageFolder, settings: LatentSettings, path: Path, *, extend: bool
) -> tuple[ImageFolder, LatentSettings]:
    """Returns the images in the order of the latents, with the latents' labels, and the settings of the last part.

    Args:
        images: all images there are.
        settings: what these would have in a folder of their own.
        path: folder of the latents: complete, or not, or not there yet.
        extend: whether images may be added.

    Raises:
        ValueError: latents of other settings, images that are gone or have another label, or new images that must not
            or cannot be added.
    """
    known = newest_settings(path)
    if known is None:
        if extend:
            raise ValueError(f"{path} holds no latents to extend: leave --extend out")
        return images, settings
    of_same_images = dataclasses.replace(settings, num_images=known.num_images, files=known.files,
                                         extends=known.extends)
    if changes := of_same_images.differences(known.as_dict()):
        raise ValueError(f"{path} was encoded with other settings ({'; '.join(changes)}): resume with those, or give "
                         "another --out")
    if settings.files == known.files and not known.extends:
        return images, settings
    existing = _Existing(images, known, path)
    placed = set(existing.names)
    new = [name for name in existing.where if name not in placed]
    if not new:
        return existing.select(existing.names), known
    if not extend:
        raise ValueError(f"{images.folder} holds {len(new)} images that {path} does not have ({show_some(new, 3)}): "
                         "--extend adds them, or give another --out")
    part = known.extended(len(new), existing.select(new).files_sha256(), existing.former_classes)
    return existing.select([*existing.names, *new]), part


class _Existing:
    """The images that latents were made of, as the shards tell them.

    Args:
        images: all images there are.
        known: settings of the last part of the latents.
        path: their folder.

    Attributes:
        where: name -> position among `images`.
        names: of the latents' images, in order.
        former_classes: those of the latents.
        class_names: these, and the new ones in the order of `images`.

    Raises:
        ValueError: images are gone or have another label, or those of shards that are not there cannot be told.
    """

    def __init__(self, images: ImageFolder, known: LatentSettings, path: Path):
        self.images, self.known, self.path = images, known, path
        self.where = {images.name(i): i for i in range(len(images))}
        stored = self._read_shards(LatentFolder(path, known))
        self.former_classes = self._former_classes(stored)
        former = set(self.former_classes)
        self.class_names = [*self.former_classes, *(name for name in images.class_names if name not in former)]
        label = {name: number for number, name in enumerate(self.class_names)}
        self.labels = np.array([label[name] for name in images.class_names])[images.labels]
        self._compare(stored)
        self.names = self._fill([name for name, _ in stored])

    def select(self, names: Sequence[str], class_names: Sequence[str] | None = None) -> ImageFolder:
        """Returns the images of these names, in this order, with the labels of the latents and all class names, or
        those given."""
        selected = copy.copy(self.images)
        selected.names = np.array([os.fsencode(name) for name in names])
        # An image that was left out of its shard may be gone by now: it has no label, and needs none.
        selected.labels = np.array([self.labels[self.where[name]] if name in self.where else 0 for name in names])
        selected.class_names = tuple(self.class_names if class_names is None else class_names)
        return selected

    def _read_shards(self, folder: LatentFolder) -> list[tuple[str | None, int | None]]:
        """Returns name and label of each image: no label of what was left out, neither if the shard is not there."""
        missing, stored = set(folder.missing(may_skip=True)), []
        for number in range(folder.num_shards):
            if number in missing:
                stored += [(None, None)] * len(folder.images(number))
                continue
            shard = open_shard(folder.shard(number))
            labels = dict(zip(shard.names, shard.tensors["labels"].tolist(), strict=True))
            names = sorted([*shard.names, *shard.skipped], key=lambda name: self.where.get(name, len(self.where)))
            stored += [(name, labels.get(name)) for name in names]
        return stored

    def _former_classes(self, stored: list[tuple[str | None, int | None]]) -> list[str]:
        """The class names of the latents: those before the last part, and its own as index or labels tell them."""
        if index := self._index():
            return index.class_names
        names = [name for part in self.known.extends for name in part["class_names"]]
        if (None, None) in stored:
            return names  # the last part is not complete, and all other classes are its own
        of_label = {label: self.images.class_names[self.images.labels[self.where[name]]]
                    for name, label in stored if label is not None and name in self.where}
        while len(names) in of_label:
            names.append(of_label[len(names)])
        return names

    def _index(self) -> LatentIndex | None:
        try:
            index = read_index(self.path)
        except ValueError:
            return None
        return index if index.settings == self.known else None

    def _compare(self, stored: list[tuple[str | None, int | None]]) -> None:
        """Raises ValueError where images are gone or have another label; it names all of them."""
        gone = [name for name, label in stored if label is not None and name not in self.where]
        changed = [name for name, label in stored
                   if label is not None and name in self.where and self.labels[self.where[name]] != label]
        faults = [f"{len(found)} images of {self.path} {what} {self.images.folder}: {show_some(found)}"
                  for found, what in ((gone, "are gone from"), (changed, "have another label in")) if found]
        if faults:
            raise ValueError("\n".join([*faults, f"Restore them, {self._otherwise()}"]))

    def _fill(self, names: list[str | None]) -> list[str]:
        """Puts the images that are in no shard into the gaps.

        Raises:
            ValueError: they are not those that were there: the checksum of their part says so.
        """
        if None not in names:
            return names
        known = set(names)
        rest = [name for name in self.where if name not in known]
        if len(rest) == names.count(None):
            fill, gaps, wrong = iter(rest), 0, 0
            filled = [next(fill) if name is None else name for name in names]
            for part, images, class_names in self._parts():
                if None in names[images]:
                    gaps += 1
                    wrong += self.select(filled[images], class_names).files_sha256() != part.files
            if not wrong:
                return filled
            if gaps > 1:
                raise ValueError(f"{self.path} lacks shards of several parts, and which images were in which cannot be "
                                 "told: restore those of all parts but one from a copy, or give another --out")
        raise ValueError(f"{self.path} is not complete, and {self.images.folder} does not hold the images it was begun "
                         "with: complete it with those alone (move new ones away meanwhile), --extend adds the others "
                         f"then, {self._otherwise()}")

    def _parts(self) -> Iterator[tuple[LatentSettings, slice, list[str]]]:
        """Yields for each part its settings, the places of its images, and the class names up to it."""
        end, class_names = 0, []
        for part, extended in itertools.zip_longest(self.known.parts, self.known.extends):
            start, end = end, end + part.num_images
            class_names = class_names + extended["class_names"] if extended else self.class_names
            yield part, slice(start, end), class_names

    def _otherwise(self) -> str:
        unfinished = self.known.extends and not self._index()
        return ("delete the shards that its index.json does not list, " if unfinished else "") + "or give another --out"
