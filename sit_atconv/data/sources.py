"""What a model is trained on: the embedded digits, a folder of images, or cached latents."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sit_atconv.data import DEFAULT_VAE, MAX_MEGAPIXELS
from sit_atconv.data.codecs import Codec, IdentityCodec, Precision, VAECodec, open_codec
from sit_atconv.data.images import RULES, Digits, ImageFolder
from sit_atconv.data.latents import CachedLatents


@dataclass(frozen=True)
class DataConfig:
    """What the model is trained on.

    Args:
        images: "digits" (embedded, 8x8), or a folder of images: labels from its dataset.json or its subfolders.
        latents: a folder that encode.py wrote, instead of images; its index knows size, classes and VAE.
        image_size: side in pixels after a centre crop. Not given, it is what the latents have, or 256.
        codec: the hub id or folder of a diffusers AutoencoderKL, or "identity" for pixel space. Not given, it is
            the VAE that made the latents, stabilityai/sd-vae-ft-ema for a folder of images, "identity" for digits.
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

    def open(self, rules: int | None = None) -> tuple[Digits | ImageFolder | CachedLatents, Codec]:
        """Returns the data set, and the codec whose latents the model sees.

        Args:
            rules: the rules by which a run that exists reads a folder of images; classes that are empty there stay.
                None for a new run.

        Raises:
            ValueError: no images or latents there, no codec, or another one, or another size, than the latents have.
        """
        keep_empty = self.keep_empty_classes or rules is not None
        if self.latents is not None:
            if self.images != "digits":
                raise ValueError(f"data.images {self.images} and data.latents {self.latents}: give one of them")
            if self.codec == "identity":
                raise ValueError(f"data.codec identity is pixel space, and {self.latents} holds a VAE's latents")
            with _naming("data.latents"):
                latents = CachedLatents(self.latents, self.mirror, keep_empty_classes=keep_empty)
            if self.image_size not in (None, latents.image_size):
                raise ValueError(f"data.image_size is {self.image_size}, but {self.latents} was encoded at "
                                 f"{latents.image_size}: encode the images at {self.image_size}, or leave it out")
            description = latents.codec | {"source": self.codec or latents.codec["source"]}
            return latents, open_codec(description, f"{self.latents} was encoded", self.codec_precision,
                                       remedy=f"--data.codec says where the VAE of {self.latents} is now")
        if self.images == "digits":
            images, default = Digits(), "identity"
        else:
            with _naming("data.images"):
                images = ImageFolder(self.images, self.image_size or 256, rules=RULES if rules is None else rules,
                                     keep_empty_classes=keep_empty, max_megapixels=self.max_megapixels)
            default = DEFAULT_VAE
        if (codec := self.codec or default) == "identity":
            return images, IdentityCodec(images.channels)
        with _naming("data.codec"):
            return images, VAECodec(codec, self.codec_precision, remedy="Give the folder of a downloaded AutoencoderKL "
                                    "by --data.codec, or a hub id that is cached")

    def find_empty_classes(
        self, data: Digits | ImageFolder | CachedLatents, held_out: np.ndarray, exists: bool
    ) -> list[int]:
        """Returns the labels of which there is no image to train on.

        Args:
            data: the data set.
            held_out: images that are never trained on.
            exists: whether the run exists: it resumes in any case.

        Raises:
            ValueError: `held_out` takes all images of a class of a new run.
        """
        empty = untrained_classes(data, held_out)
        emptied = [label for label in empty if data.class_counts[label]]
        if emptied and not (exists or self.keep_empty_classes):
            raise ValueError(f"data.held_out {self.held_out} takes all images of {name_classes(data, emptied)}: lower "
                             "it, or accept untrained classes with --data.keep_empty_classes true")
        return empty


def untrained_classes(data: Digits | ImageFolder | CachedLatents, left_out: np.ndarray) -> list[int]:
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


def name_classes(data: Digits | ImageFolder | CachedLatents, labels: list[int], most: int = 10) -> str:
    """[0, 7] -> "2 classes: 0 (cat), 7 (dog)"."""
    named = [f"{label} ({data.class_names[label]})" for label in labels[:most]]
    more = [f"and {len(labels) - most} more"] if len(labels) > most else []
    return f"{len(labels)} class{'es' if len(labels) > 1 else ''}: {', '.join([*named, *more])}"


def describe_data(data: Digits | ImageFolder | CachedLatents, codec: Codec) -> dict:
    """What a run must find again to resume exactly, wherever it lies by then."""
    return data.describe() | {"classes": len(data.class_names), "codec": codec.identity()}
