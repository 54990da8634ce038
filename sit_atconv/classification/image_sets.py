"""Labelled images by index: the embedded digits, class folders, tar shards, Hugging Face data sets."""

import hashlib
import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.img_extensions import get_img_extensions

from sit_atconv.data.digits import load_digits
from sit_atconv.runtime.names import show_some

HELD_OUT_DIGITS = 5  # every fifth digit is held out


@dataclass(frozen=True)
class ImageSet:
    """Images and labels of one split.

    Args:
        name: name of the set, as the user gave it.
        reader: timm's reader or one like it: `reader[index]` is (image or open file, label).
        labels: class name -> label.
        mode: PIL mode of the images that `read` returns.
    """

    name: str
    reader: Any
    labels: Mapping[str, int]
    mode: str

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, in the order of their labels; None if the images have numbers only."""
        if isinstance(self.reader, TarShards):
            return None
        return sorted(self.labels, key=self.labels.__getitem__)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Returns an image and its label. ValueError: it cannot be read as an image."""
        try:
            image, label = self.reader[index]
            if not isinstance(image, Image.Image):
                image = Image.open(image)
            return image.convert(self.mode), int(label)
        except Exception as error:  # a damaged file raises errors of many types
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"image {index} of {self.name} cannot be read ({reason}): fix or delete it") from error

    def describe(self) -> dict:
        """Returns what identifies the images and their order, for data.json."""
        samples = getattr(self.reader, "samples", None)
        described = {"images": len(self), "classes": len(self.labels)}
        if samples is None:
            return described
        digest = hashlib.sha256()
        for path, label in samples:
            digest.update(f"{Path(path).relative_to(self.reader.root)} {label}\n".encode())
        return {**described, "files": digest.hexdigest()}


class Digits:
    """Reader of scikit-learn's digits; every fifth is held out for validation."""

    def __init__(self, held_out: bool):
        self.class_to_idx = {str(digit): digit for digit in range(10)}
        images, labels = load_digits()
        chosen = (np.arange(len(images)) % HELD_OUT_DIGITS == 0) == held_out
        self.images, self.labels = images[chosen], labels[chosen]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.labels[index]


class TarShards:
    """Reader of webdataset shards by index: tar files with an image and KEY.cls for each KEY.

    (timm's own reader streams shards in an order that could not be resumed.)

    Raises:
        ValueError: the folder has no shards, or a shard holds no image with a label.
    """

    def __init__(self, root: Path):
        self.root, self.samples, places = root, [], []
        suffixes = get_img_extensions(as_set=True)
        for shard in sorted(root.glob("*.tar")):
            labels, images = {}, {}
            try:
                with tarfile.open(shard, "r:") as tar:
                    for member in tar:
                        key, _, suffix = member.name.rpartition(".")
                        if suffix == "cls":
                            labels[key] = int(tar.extractfile(member).read())  # type: ignore[union-attr]
                        elif f".{suffix.lower()}" in suffixes:
                            images[key] = member.offset_data, member.size
            except (tarfile.TarError, OSError, ValueError) as error:
                raise ValueError(f"{shard} is not a webdataset shard ({error})") from error
            if not (keys := [key for key in images if key in labels]):
                raise ValueError(f"{shard} holds no image with a label, KEY.jpg and KEY.cls")
            self.samples += [(f"{shard}/{key}", labels[key]) for key in keys]
            places += [(shard, *images[key]) for key in keys]
        if not places:
            raise ValueError(f"{root} holds no shards (*.tar): give the folder of one split, as wds/FOLDER")
        self.places = places
        self.class_to_idx = {str(label): label for label in range(1 + max(label for _, label in self.samples))}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        shard, offset, size = self.places[index]
        with open(shard, "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size)), self.samples[index][1]


def open_images(name: str | None, split: str, channels: int) -> ImageSet:
    """Opens a set of labelled images.

    Args:
        name: a folder with one subfolder for each class, `wds/FOLDER` (webdataset shards), `hfds/OWNER/NAME` or
            `hfds/OWNER/NAME:SPLIT` (a Hugging Face data set); None for the digits.
        split: "train" or "validation", where the name does not say it.
        channels: 1 for grey images, 3 for colour.

    Raises:
        ValueError: there are no images, no classes or only one class.
    """
    mode = {1: "L", 3: "RGB"}[channels]
    if name is None:
        digits = Digits(held_out=split != "train")
        return ImageSet("the digits", digits, digits.class_to_idx, mode)
    kind, _, rest = name.partition("/")
    if kind == "wds":
        reader: Any = TarShards(Path(rest))
    elif kind == "hfds":
        repository, _, chosen = rest.partition(":")
        try:
            reader = create_dataset(f"hfds/{repository}", split=chosen or split).reader
        except ImportError as error:
            raise ValueError(f"{name} needs the library of Hugging Face data sets: pip install datasets") from error
        except Exception as error:  # whatever that library raises
            raise ValueError(f"{name} cannot be opened ({str(error).splitlines()[0]})") from error
    elif not Path(name).is_dir():
        raise ValueError(
            f"there is no folder {name}: give a folder with one subfolder for each class, wds/FOLDER or hfds/OWNER/NAME"
        )
    else:
        try:
            reader = create_dataset("", root=name, search_split=False).reader
        except RuntimeError as error:
            raise ValueError(f"{name} holds no images in class folders, one subfolder for each class") from error
    labels = dict(reader.class_to_idx)
    if "" in labels:
        raise ValueError(f"{name} has images outside of class folders: put them into one subfolder for each class")
    if not labels:
        raise ValueError(f"{name} does not name its classes: its column label must be of class labels")
    if len(labels) < 2:
        raise ValueError(f"{name} has one class only ({', '.join(labels)}): a classifier needs at least two")
    return ImageSet(name, reader, labels, mode)


def check_same_classes(train: ImageSet, val: ImageSet) -> None:
    """Raises ValueError if a class of the validation images has another label than in training, or none."""
    if wrong := [name for name, label in val.labels.items() if train.labels.get(name) != label]:
        raise ValueError(
            f"data.val {val.name} has {len(val.labels)} classes and data.train {train.name} has {len(train.labels)}, "
            f"and these do not match: {show_some(wrong, 3)}. Give both the same class folders"
        )
