"""The data source of cached latents."""

import functools
import itertools
from pathlib import Path

import numpy as np
from torch import Tensor

from sit_atconv.data import MAX_MEGAPIXELS
from sit_atconv.data.codecs import Codec
from sit_atconv.data.data_source import DataSource
from sit_atconv.data.file_store import FileStore
from sit_atconv.data.images import scan_images
from sit_atconv.data.latent_folder import (
    ENCODE_AGAIN,
    LatentFolder,
    Shard,
    features_of,
    locate,
    open_shard,
    read_index,
    read_whole,
)
from sit_atconv.data.pixels import CROP_RULE, decode_jpeg, read_image, to_float
from sit_atconv.data.stores import open_store
from sit_atconv.runtime.names import show_some

SAME_IMAGE = 0.1  # relative difference of latents up to which they are of one image, encoded in other precisions


class CachedLatents(DataSource):
    """The latents that `encode.py` wrote, memory-mapped: what `Codec.encode` returned, and an int label.

    Args:
        folder: LATENTS.
        mirror: whether horizontally flipped images will be asked for.
        keep_empty_classes: accept classes without images that the index does not say were kept.

    Raises:
        ValueError: no index, a shard that is missing or has another size, no flipped images, or classes without images.
    """

    is_encoded = True

    def __init__(self, folder: str | Path, mirror: bool = False, *, keep_empty_classes: bool = False):
        self.folder = Path(folder)
        self.index = read_index(folder)
        settings = self.index.settings
        self.places = LatentFolder(self.folder, settings).places
        faults = []
        if (empty := self.index.unwanted_classes) and not keep_empty_classes:
            faults.append(
                f"{folder} has {empty}: the model would never see such a class, and its samples would be "
                "meaningless. Encode images of it, or give --data.keep_empty_classes true"
            )
        if mirror and not settings.mirrored:
            faults.append(
                f"{folder} has no horizontally flipped images: set data.mirror to false, or encode without --no-mirror"
            )
        for entry in self.index.shards:
            path = self.folder / entry["file"]
            if not path.exists():
                faults.append(f"{path} is missing: {ENCODE_AGAIN}")
            elif (size := path.stat().st_size) != entry["bytes"]:
                faults.append(
                    f"{path} has {size} bytes, and the index says {entry['bytes']}: delete it and {ENCODE_AGAIN}"
                )
        if faults:
            raise ValueError("\n".join(faults))
        self.class_names = tuple(self.index.class_names)
        self.image_size = settings.image_size
        self.ends = list(itertools.accumulate(entry["num_images"] for entry in self.index.shards))
        self.shards: dict[int, Shard] = {}  # those opened so far
        self.features = settings.features or None
        self.originals: FileStore | None = None  # the images that the latents were encoded from
        self.max_megapixels = MAX_MEGAPIXELS

    @classmethod
    def open(cls, name: str, **options) -> "CachedLatents":
        return cls(name, options["mirror"], keep_empty_classes=options["keep_empty_classes"])

    def read_originals(self, place: str, max_megapixels: float = MAX_MEGAPIXELS) -> None:
        """Makes `read_pixels` read the images again, by the names in the shards.

        Raises:
            ValueError: the place lacks images of the latents, or this version crops images by another rule.
        """
        settings = self.index.settings
        if settings.crop != CROP_RULE:
            raise ValueError(
                f"{self.folder} was encoded from images cropped by another rule ({settings.crop}), which this version "
                "does not have: encode again"
            )
        store = open_store(place)
        there = set(scan_images(store, settings.rules).names)
        names = [name for entry in self.index.shards for name in open_shard(self.folder / entry["file"]).names]
        if gone := [name for name in names if name not in there]:
            raise ValueError(
                f"{place} lacks {len(gone)} of the {len(names)} images of {self.folder} ({show_some(gone, 3)}): put "
                "them back, or give the folder that was encoded as --data.pixels"
            )
        self.originals, self.max_megapixels = store, max_megapixels

    def check_originals(self, codec: Codec) -> None:
        """Encodes the first and the last image again. ValueError: their latents are of other images."""
        assert self.originals is not None
        for index in {0, len(self) - 1}:
            shard, position = self._find(index)
            moments = codec.encode(to_float(self.read_pixels((index, False)))[None])[0].float()
            stored = shard.tensors["moments"][position].float()
            if (moments.cpu() - stored).norm() > SAME_IMAGE * stored.norm():
                raise ValueError(
                    f"{self.originals.where(shard.names[position])} is not the image that {self.folder} was encoded "
                    "from: give the images that were encoded"
                )

    @property
    def has_pixels(self) -> bool:  # type: ignore[override]
        return bool(self.originals or self.index.settings.pixels)

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def class_counts(self) -> list[int]:
        return list(self.index.class_counts)

    @property
    def codec(self) -> dict:
        """Description of the codec that made the latents."""
        return self.index.settings.codec | {"source": self.index.vae}

    @functools.cached_property
    def labels(self) -> np.ndarray:  # type: ignore[override]  # mypy takes a cached property for read-only
        """Reads the labels of all images, int64 (N,), from the shards."""
        shards = (open_shard(self.folder / entry["file"]) for entry in self.index.shards)
        return np.concatenate([shard.tensors["labels"].numpy() for shard in shards])

    def __getitem__(self, item: tuple[int, bool]) -> tuple[Tensor, int]:
        index, mirrored = item
        shard, position = self._find(index)
        moments = shard.tensors["mirrored" if mirrored else "moments"][position]
        return moments.clone(), int(shard.tensors["labels"][position])

    def read_pixels(self, item: tuple[int, bool]) -> Tensor:
        index, mirrored = item
        shard, position = self._find(index)
        if self.originals is not None:
            name = shard.names[position]
            try:
                pixels = read_image(self.originals.open(name), self.image_size, self.max_megapixels)
            except ValueError as error:
                raise ValueError(
                    f"{self.originals.where(name)} {error}; an image of data.pixels cannot be skipped"
                ) from error
        elif "pixels" in shard.tensors:
            pixels = read_whole(shard.tensors["pixels"][position])
        else:
            ends = shard.tensors["jpeg_ends"]
            start = int(ends[position - 1]) if position else 0
            pixels = decode_jpeg(read_whole(shard.tensors["jpegs"][start : int(ends[position])]))
        return pixels.flip(-1) if mirrored else pixels

    def read_features(self, item: tuple[int, bool]) -> Tensor:
        index, mirrored = item
        shard, position = self._find(index)
        return read_whole(shard.tensors[features_of("mirrored" if mirrored else "moments")][position])

    def _find(self, index: int) -> tuple[Shard, int]:
        """Returns the shard of an image, and its place there."""
        number, position = locate(self.ends, index)
        if number not in self.shards:
            self.shards[number] = self._open(number)
        return self.shards[number], position

    def _open(self, number: int) -> Shard:
        path = self.folder / self.index.shards[number]["file"]
        shard = open_shard(path)
        if changes := self.places[number][0].differences(shard.settings):
            raise ValueError(f"{path} was encoded with other settings ({'; '.join(changes)}): {ENCODE_AGAIN}")
        return shard

    def __getstate__(self) -> dict:
        return self.__dict__ | {"shards": {}}  # each process opens its own

    def describe(self) -> dict:
        return {"kind": "latents", "images": len(self), "index": self.index.identity()}
