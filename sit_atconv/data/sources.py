"""The `data` section of a run's configuration, and how it opens a data source and a codec."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sit_atconv.data import MAX_MEGAPIXELS
from sit_atconv.data.codecs import Codec, Precision, open_codec, typed_codec
from sit_atconv.data.data_source import DataSource
from sit_atconv.data.digits import Digits
from sit_atconv.data.idx import IdxImages
from sit_atconv.data.images import ImageFolder
from sit_atconv.data.latents import CachedLatents
from sit_atconv.data.stores import STORES, archive_of, kind_of
from sit_atconv.runtime.commands import warn_if_hidden
from sit_atconv.runtime.names import is_object_path, name_classes
from sit_atconv.runtime.tables import Table, import_module_of

# Named by NAME or NAME:PLACE; anything else is a place of image files, see `open_store`.
SOURCES: Table[type[DataSource]] = Table("data source", type, {"digits": Digits, "idx": IdxImages})


@dataclass(frozen=True)
class DataConfig:
    """Settings of the training data.

    Args:
        images: "digits" (embedded, 8x8); a folder, .zip or .tar of images with labels from its dataset.json or its
            subfolders; wids:PLACE, the tar archives of a WebDataset, by folder, pattern or index.json; hf:NAME, a data
            set of Hugging Face, on the hub or local, hf:NAME:SPLIT:image=COLUMN,label=COLUMN; idx:FOLDER with the IDX
            files of MNIST or Fashion-MNIST, padded to 32 pixels; or your own `DataSource`, my_module.MySource.
        latents: a folder written by encode.py, instead of images; it determines size, classes and VAE.
        pixels: the images that the latents were encoded from, named as in images, and read again for an auxiliary loss
            that sees them; not needed if the latents hold pixels or features (encode.py --pixels, --features).
        image_size: side in pixels after a centre crop; by default, that of the latents, or 256.
        codec: hub id or folder of a diffusers AutoencoderKL or AutoencoderDC, "identity" for pixel space, or your own
            `Codec`, my_module.MyCodec; by default, the codec of the latents, stabilityai/sd-vae-ft-ema for image files,
            "identity" for digits and IDX files.
        codec_precision: precision of the VAE's arithmetic.
        mirror: flip images horizontally with probability 0.5.
        num_workers: number of processes that load images, for each training process.
        held_out: number of images that are never trained on; their loss, at fixed noise and times, compares models.
        skip_unreadable: skip images that cannot be read (loss weight 0) and record them in the run's unreadable.json,
            instead of ending the run.
        keep_empty_classes: accept classes without training images; they are sampled only if you ask for them.
        max_megapixels: largest image file that is read, in millions of pixels; larger files count as unreadable.
    """

    images: str = "digits"
    latents: str | None = None
    pixels: str | None = None
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
        if self.pixels is not None and self.latents is None:
            raise ValueError(f"data.pixels {self.pixels} is for data.latents: leave it out, images hold their pixels")
        if not self.max_megapixels > 0:
            raise ValueError(f"data.max_megapixels must be positive, not {self.max_megapixels}")

    def open(self, rules: int | None = None) -> tuple[DataSource, Codec]:
        """Returns the data source, and the codec whose latents the model sees.

        Args:
            rules: number of the rules by which an existing run reads its image folder, which keep empty classes; None
                for a new run.

        Raises:
            ValueError: no images, latents or codec found, or codec or size differ from those of the latents.
        """
        with _naming("data.images" if self.latents is None else "data.latents"):
            data = self._source_class().open(
                self.latents or self.images,
                image_size=self.image_size,
                mirror=self.mirror,
                rules=rules,
                keep_empty_classes=self.keep_empty_classes or rules is not None,
                max_megapixels=self.max_megapixels,
            )
        if isinstance(data, CachedLatents) and self.pixels is not None:
            with _naming("data.pixels"):
                data.read_originals(self.pixels, self.max_megapixels)
        made = f"{self.latents or self.images} was encoded" if data.is_encoded else "training begins"
        if data.is_encoded and self.image_size not in (None, data.image_size):
            raise ValueError(
                f"data.image_size is {self.image_size}, but {made} at {data.image_size}: encode the "
                f"images at {self.image_size}, or omit data.image_size"
            )
        with _naming("data.codec"):
            described = typed_codec(self.codec, data.channels) if self.codec else data.codec
            codec = open_codec(
                described,
                made,
                self.codec_precision,
                remedy="Set --data.codec to the folder of a downloaded VAE, or to a hub id that is cached",
            )
            if data.is_encoded:
                codec.check(data.codec, made)
        if isinstance(data, CachedLatents) and data.originals is not None:
            with _naming("data.pixels"):
                data.check_originals(codec)
        return data, codec

    def _source_class(self) -> type[DataSource]:
        if self.latents is not None:
            if self.images != type(self).images:
                raise ValueError(f"data.images {self.images} and data.latents {self.latents}: give one of them")
            return CachedLatents
        name, colon, _ = self.images.partition(":")
        if name in SOURCES and getattr(SOURCES[name], "takes_place", False) == bool(colon):
            warn_if_hidden("data.images", self.images)
        elif kind_of(self.images) not in STORES and not archive_of(Path(self.images)) and is_object_path(self.images):
            name = import_module_of(self.images)
        else:
            return ImageFolder
        found = SOURCES.find(name)
        if DataSource not in found.__mro__:
            raise ValueError(
                f"{self.images} does not inherit sit_atconv.data.sources.DataSource: see docs/extending.md"
            )
        return found

    def find_empty_classes(self, data: DataSource, held_out: np.ndarray, exists: bool) -> list[int]:
        """Returns the labels without training images.

        Args:
            data: the data source.
            held_out: indices of the images that are never trained on.
            exists: True if the run exists; it may then resume in any case.

        Raises:
            ValueError: `held_out` takes all images of a class of a new run.
        """
        empty = untrained_classes(data, held_out)
        emptied = [label for label in empty if data.class_counts[label]]
        if emptied and not (exists or self.keep_empty_classes):
            raise ValueError(
                f"data.held_out {self.held_out} takes all images of "
                f"{name_classes(data.class_names, emptied)}: lower it, or accept untrained classes with "
                "--data.keep_empty_classes true"
            )
        return empty


def untrained_classes(data: DataSource, left_out: np.ndarray) -> list[int]:
    """Returns the labels without training images if the images with indices `left_out` are not used."""
    counts = np.array(data.class_counts)
    taken = np.bincount(data.labels[left_out], minlength=len(counts)) if len(left_out) else np.zeros_like(counts)
    return np.flatnonzero(counts == taken).tolist()


@contextlib.contextmanager
def _naming(option: str) -> Iterator[None]:
    """Adds the option's name to a ValueError about its value."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def describe_data(data: DataSource, codec: Codec) -> dict:
    """Returns what must be unchanged for a run to resume exactly; places are not included."""
    return data.describe() | {"classes": len(data.class_names), "codec": codec.identity()}
