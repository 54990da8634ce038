"""The data that a model is trained on, as a run's configuration names them."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sit_atconv.data import MAX_MEGAPIXELS
from sit_atconv.data.codecs import Codec, Precision, open_codec, typed_codec
from sit_atconv.data.data_source import DataSource
from sit_atconv.data.images import Digits, ImageFolder
from sit_atconv.data.latents import CachedLatents
from sit_atconv.runtime.names import is_object_path, name_classes
from sit_atconv.runtime.tables import Table, import_module_of

SOURCES = Table("data source", type, {"digits": Digits})  # what `data.images` names; all else is a folder


@dataclass(frozen=True)
class DataConfig:
    """What the model is trained on.

    Args:
        images: "digits" (embedded, 8x8), or a folder of images: labels from its dataset.json or its subfolders; or a
            `DataSource` of yours, my_module.MySource.
        latents: a folder that encode.py wrote, instead of images; its index knows size, classes and VAE.
        image_size: side in pixels after a centre crop. Not given, it is what the latents have, or 256.
        codec: the hub id or folder of a diffusers AutoencoderKL, "identity" for pixel space, or a `Codec` of yours,
            my_module.MyCodec. Not given, it is that of the latents, stabilityai/sd-vae-ft-ema for a folder of images,
            "identity" for digits.
        codec_precision: of the VAE's arithmetic.
        mirror: take the mirror image every other time, at random.
        num_workers: processes that load images, for each training process.
        held_out: images that are never trained on; their loss, at fixed noise and times, compares models.
        skip_unreadable: leave images that cannot be read out of their batch, with a loss of weight 0, and record them
            in unreadable.json of the run, instead of ending the run.
        keep_empty_classes: accept classes without images to train on; they are drawn only where asked for.
        max_megapixels: files with more pixels count as unreadable.
    """

    images: str = "digits"
    latents: str | None = None
    image_size: int | None = None
    codec: str | None = None
    codec_precision: Precision = "tf32"
    mirror: bool = False
    num_workers: int = 0
    held_out: int = 0
    skip_unreadable: bool = False
    keep_empty_classes: bool = False
    max_megapixels: float = MAX_MEGAPIXELS

    def __post_init__(self):
        for name in ("num_workers", "held_out"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name} must not be negative: {getattr(self, name)}")
        if not self.max_megapixels > 0:
            raise ValueError(f"data.max_megapixels must be positive, not {self.max_megapixels}")

    def open(self, rules: int | None = None) -> tuple[DataSource, Codec]:
        """Returns the data source, and the codec whose latents the model sees.

        Args:
            rules: the rules by which a run that exists reads a folder of images; classes that are empty there stay.
                None for a new run.

        Raises:
            ValueError: no images or latents there, no codec, or another one, or another size, than the latents have.
        """
        with _naming("data.images" if self.latents is None else "data.latents"):
            data = self._source_class().open(
                self.latents or self.images, image_size=self.image_size, mirror=self.mirror, rules=rules,
                keep_empty_classes=self.keep_empty_classes or rules is not None, max_megapixels=self.max_megapixels)
        made = f"{self.latents or self.images} was encoded" if data.is_encoded else "training begins"
        if data.is_encoded and self.image_size not in (None, data.image_size):
            raise ValueError(f"data.image_size is {self.image_size}, but {made} at {data.image_size}: encode the "
                             f"images at {self.image_size}, or leave it out")
        with _naming("data.codec"):
            described = typed_codec(self.codec, data.channels) if self.codec else data.codec
            codec = open_codec(described, made, self.codec_precision, remedy="--data.codec takes the folder of a "
                               "downloaded AutoencoderKL, or a hub id that is cached")
            if data.is_encoded:
                codec.check(data.codec, made)
        return data, codec

    def _source_class(self) -> type[DataSource]:
        if self.latents is not None:
            if self.images != type(self).images:
                raise ValueError(f"data.images {self.images} and data.latents {self.latents}: give one of them")
            return CachedLatents
        if not (self.images in SOURCES or is_object_path(self.images)):
            return ImageFolder
        found = SOURCES.find(import_module_of(self.images))
        if DataSource not in found.__mro__:
            raise ValueError(f"{self.images} does not inherit sit_atconv.data.sources.DataSource: see "
                             "docs/extending.md")
        return found

    def find_empty_classes(self, data: DataSource, held_out: np.ndarray, exists: bool) -> list[int]:
        """Returns the labels of which there is no image to train on.

        Args:
            data: the data source.
            held_out: images that are never trained on.
            exists: whether the run exists: it resumes in any case.

        Raises:
            ValueError: `held_out` takes all images of a class of a new run.
        """
        empty = untrained_classes(data, held_out)
        emptied = [label for label in empty if data.class_counts[label]]
        if emptied and not (exists or self.keep_empty_classes):
            raise ValueError(f"data.held_out {self.held_out} takes all images of "
                             f"{name_classes(data.class_names, emptied)}: lower it, or accept untrained classes with "
                             "--data.keep_empty_classes true")
        return empty


def untrained_classes(data: DataSource, left_out: np.ndarray) -> list[int]:
    """Returns the labels of which no image is trained on, if the images `left_out` (indices) are not."""
    counts = np.array(data.class_counts)
    taken = np.bincount(data.labels[left_out], minlength=len(counts)) if len(left_out) else np.zeros_like(counts)
    return np.flatnonzero(counts == taken).tolist()


@contextlib.contextmanager
def _naming(option: str) -> Iterator[None]:
    """Lets a ValueError name the option whose value it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def describe_data(data: DataSource, codec: Codec) -> dict:
    """What a run must find again to resume exactly, wherever it lies by then."""
    return data.describe() | {"classes": len(data.class_names), "codec": codec.identity()}
