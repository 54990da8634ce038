"""The data source of cached latents."""

import functools
import itertools
from pathlib import Path

import numpy as np
from torch import Tensor

from sit_atconv.data.data_source import DataSource
from sit_atconv.data.latent_folder import ENCODE_AGAIN, LatentFolder, locate, open_shard, read_index


class CachedLatents(DataSource):
    """The latents that `encode.py` wrote, memory-mapped: posterior moments (2C, h, w) and an int label.

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
        self.shards: dict[int, dict[str, Tensor]] = {}  # the tensors of the shards opened so far

    @classmethod
    def open(cls, name: str, **options) -> "CachedLatents":
        return cls(name, options["mirror"], keep_empty_classes=options["keep_empty_classes"])

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
        number, position = locate(self.ends, index)
        if number not in self.shards:
            self.shards[number] = self._open(number)
        tensors = self.shards[number]
        moments = tensors["mirrored" if mirrored else "moments"][position]
        return moments.clone(), int(tensors["labels"][position])

    def _open(self, number: int) -> dict[str, Tensor]:
        path = self.folder / self.index.shards[number]["file"]
        shard = open_shard(path)
        if changes := self.places[number][0].differences(shard.settings):
            raise ValueError(f"{path} was encoded with other settings ({'; '.join(changes)}): {ENCODE_AGAIN}")
        return shard.tensors

    def __getstate__(self) -> dict:
        return self.__dict__ | {"shards": {}}  # each process opens its own

    def describe(self) -> dict:
        return {"kind": "latents", "images": len(self), "index": self.index.identity()}
