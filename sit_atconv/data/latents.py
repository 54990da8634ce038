"""The data source of cached latents."""

import itertools
from pathlib import Path

import numpy as np
from torch import Tensor

from sit_atconv.data.data_source import DataSource
from sit_atconv.data.latent_folder import LatentFolder, locate, open_shard, read_index


class CachedLatents(DataSource):
    """What `encode.py` wrote, mapped into memory: yields posterior moments (2C, h, w) and an int label.

    Args:
        folder: LATENTS.
        mirror: whether mirror images will be asked for.
        keep_empty_classes: accept classes without images that the index does not say were kept.

    Raises:
        ValueError: no index, a shard that is missing or of another size than it had, no mirror images, or classes
            without images.
    """

    is_encoded = True

    def __init__(self, folder: str | Path, mirror: bool = False, *, keep_empty_classes: bool = False):
        self.folder = Path(folder)
        self.index = read_index(folder)
        settings = self.index.settings
        self.places = LatentFolder(self.folder, settings).places
        faults = []
        if (empty := self.index.unwanted_classes) and not keep_empty_classes:
            faults.append(f"{folder} has {empty}: a class that was never trained gives no images of its kind. Encode "
                          "images for it, or give --data.keep_empty_classes true")
        if mirror and not settings.mirrored:
            faults.append(f"{folder} has no mirror images: set data.mirror to false, or encode with them")
        for entry in self.index.shards:
            path = self.folder / entry["file"]
            if not path.exists():
                faults.append(f"{path} is missing: run the same sit_atconv/encode.py again")
            elif (size := path.stat().st_size) != entry["bytes"]:
                faults.append(f"{path} has {size} bytes, and {entry['bytes']} by the index: delete it and run the same "
                              "sit_atconv/encode.py again")
        if faults:
            raise ValueError("\n".join(faults))
        self.class_names = tuple(self.index.class_names)
        self.image_size = settings.image_size
        self.ends = list(itertools.accumulate(entry["num_images"] for entry in self.index.shards))
        self.shards: dict[int, dict[str, Tensor]] = {}  # opened so far, without their names

    @classmethod
    def open(cls, name: str, *, mirror: bool, keep_empty_classes: bool, **options) -> "CachedLatents":
        return cls(name, mirror, keep_empty_classes=keep_empty_classes)

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def class_counts(self) -> list[int]:
        return list(self.index.class_counts)

    @property
    def codec(self) -> dict:
        """Description of the codec that made the latents."""
        return self.index.settings.codec | {"source": self.index.vae}

    @property
    def labels(self) -> np.ndarray:
        """Labels of all images, (N,); reads them from the shards."""
        shards = (open_shard(self.folder / entry["file"]) for entry in self.index.shards)
        return np.concatenate([shard.tensors["labels"].numpy() for shard in shards])

    def __getitem__(self, item: tuple[int, bool]) -> tuple[Tensor, int]:
        index, mirrored = item
        shard, position = locate(self.ends, index)
        if shard not in self.shards:
            self.shards[shard] = self._open(shard)
        tensors = self.shards[shard]
        moments = tensors["mirrored" if mirrored else "moments"][position]
        return moments.clone(), int(tensors["labels"][position])

    def _open(self, number: int) -> dict[str, Tensor]:
        path = self.folder / self.index.shards[number]["file"]
        shard = open_shard(path)
        if changes := self.places[number][0].differences(shard.settings):
            raise ValueError(f"{path} was encoded with other settings ({'; '.join(changes)}): run the same "
                             "sit_atconv/encode.py again")
        return shard.tensors

    def __getstate__(self) -> dict:
        return self.__dict__ | {"shards": {}}  # each process opens its own

    def describe(self) -> dict:
        return {"kind": "latents", "images": len(self), "index": self.index.identity()}
