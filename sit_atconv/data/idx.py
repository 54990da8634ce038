"""Data source of IDX files, the format of MNIST, Fashion-MNIST, KMNIST and EMNIST."""

import gzip
import hashlib
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from sit_atconv.data import IDX
from sit_atconv.data.data_source import InMemory
from sit_atconv.data.image_rules import KEEP_EMPTY
from sit_atconv.runtime.names import show_some

IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
UNSIGNED_BYTES = 8  # code of the only kind of values that images and labels have
MULTIPLE = 8  # sides are padded to a multiple of this by default, so that patches of 2, 4 and 8 fit


class IdxImages(InMemory):
    """Greyscale images and labels of IDX files, centred on black squares.

    Args:
        place: the folder of `train-images-idx3-ubyte`, or the path of a file with images, such as
            `t10k-images-idx3-ubyte`. Files may be gzipped (.gz). The labels are in the file beside it whose name has
            `labels-idx1` in place of `images-idx3`.
        image_size: side in pixels after padding; None takes the next multiple of 8 (28 becomes 32).
        keep_empty_classes: accept unused labels below the largest one as classes.

    Raises:
        ValueError: a file is missing, truncated or of another kind, the numbers of images and labels differ, a class
            is empty, or the images are larger than `image_size`.
    """

    channels = 1
    takes_place = True

    def __init__(self, place: str | Path, image_size: int | None = None, *, keep_empty_classes: bool = False):
        path = _find_images(Path(place))
        images, self.labels = read_idx(path, 3), read_idx(_labels_beside(path), 1).astype(np.int64)
        if len(images) != len(self.labels) or not len(images):
            raise ValueError(f"{path} holds {len(images)} images, and the file of labels {len(self.labels)} labels")
        counts = np.bincount(self.labels)
        empty = np.flatnonzero(counts == 0).tolist()
        if empty and not keep_empty_classes:
            raise ValueError(
                f"{path} has no images of the labels {show_some(list(map(str, empty)))}: keep these classes with "
                f"{KEEP_EMPTY}"
            )
        largest = max(images.shape[1:])
        self.image_size = image_size or math.ceil(largest / MULTIPLE) * MULTIPLE
        if self.image_size < largest:
            raise ValueError(f"{path} holds images of {largest} pixels, which do not fit into {self.image_size}")
        self.images = torch.from_numpy(pad(images, self.image_size))[:, None]
        self.class_names = tuple(map(str, range(len(counts))))

    @classmethod
    def open(cls, name: str, *, image_size: int | None, keep_empty_classes: bool, **options) -> "IdxImages":
        return cls(name.removeprefix(IDX), image_size, keep_empty_classes=keep_empty_classes)

    def describe(self) -> dict:
        digest = hashlib.sha256(self.images.numpy().data)
        digest.update(self.labels.astype("<i8").tobytes())
        return {"kind": "idx", "images": len(self), "image_size": self.image_size, "content": digest.hexdigest()}


def _find_images(place: Path) -> Path:
    if place.is_file():
        if IMAGES not in place.name:
            raise ValueError(f"{place} is not called ...{IMAGES}[.gz]: give the file of images, or its folder")
        return place
    for name in (f"train-{IMAGES}", f"train-{IMAGES}.gz"):
        if (place / name).is_file():
            return place / name
    raise ValueError(f"{place} holds no train-{IMAGES}[.gz]: give the folder, or the path of another file of images")


def _labels_beside(images: Path) -> Path:
    name = images.name.replace(IMAGES, LABELS)
    for path in (images.with_name(name), images.with_name(name.removesuffix(".gz")), images.with_name(f"{name}.gz")):
        if path.is_file():
            return path
    raise ValueError(f"{images} has no labels: put {name} beside it")


def read_idx(path: Path, num_dimensions: int) -> np.ndarray:
    """Reads the uint8 array of an IDX file, gzipped or not. ValueError: it is damaged or of another kind."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): copy or download it again") from error
    header = 4 + 4 * num_dimensions
    if content[:4] != bytes([0, 0, UNSIGNED_BYTES, num_dimensions]) or len(content) < header:
        raise ValueError(f"{path} is not an IDX file of bytes in {num_dimensions} dimensions")
    shape = tuple(np.frombuffer(content[4:header], ">u4").tolist())
    if len(content) != header + math.prod(shape):
        raise ValueError(
            f"{path} has {len(content)} bytes, and its header says {header + math.prod(shape)}: copy or download it "
            "again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def pad(images: np.ndarray, side: int) -> np.ndarray:
    """Centres images (N, H, W) on black squares (N, side, side)."""
    top, left = ((side - length) // 2 for length in images.shape[1:])
    padded = np.zeros((len(images), side, side), np.uint8)
    padded[:, top : top + images.shape[1], left : left + images.shape[2]] = images
    return padded
