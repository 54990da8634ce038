"""Images as latents on disk: the folder that `encode.py` writes and training reads.

    LATENTS/shard-00000.safetensors     moments (n, 2C, h, w), mirrored (the same, of the mirror images), labels (n,);
                                        in the metadata the settings, the files' names and what was left out
    LATENTS/index.json                  settings, class names and counts, every shard's size and checksum
    LATENTS/preview.png                 images beside what decodes from their latents

Image i belongs to shard i // images_per_shard, and there to a batch fixed by i, whoever encodes it and whatever is
there already. A shard appears whole, and the index last: a folder with an index is complete.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sit_atconv.files import sha256_of, write_aside

FORMAT = 1
INDEX = "index.json"
PREVIEW = "preview.png"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
VIEWS = {"F16": np.float16, "BF16": np.int16, "F32": np.float32, "I64": np.int64}  # numpy has no bfloat16


@dataclass(frozen=True)
class Shard:
    """An opened shard.

    Args:
        arrays: moments, labels and perhaps mirrored; on disk, read where they are touched; bfloat16 as int16.
        names: of the image files, relative to their folder.
        skipped: images left out, name -> why.
        settings: what the shard was made with.
    """

    arrays: dict[str, np.ndarray]
    names: list[str]
    skipped: dict[str, str]
    settings: dict


@dataclass(frozen=True)
class Layout:
    """Which images are in which shard.

    Args:
        folder: LATENTS.
        settings: all that the bytes of the shards depend on. `images`, `images_per_shard` and `batch_size` say where
            each image belongs; `codec`, `image_size`, `dtype`, ... what is stored of it.
    """

    folder: Path
    settings: dict

    @property
    def num_shards(self) -> int:
        return math.ceil(self.settings["images"] / self.settings["images_per_shard"])

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def images(self, shard: int) -> range:
        first = shard * self.settings["images_per_shard"]
        return range(first, min(first + self.settings["images_per_shard"], self.settings["images"]))

    def batches(self, shard: int) -> list[range]:
        """The images of a shard, as they are encoded together."""
        images, size = self.images(shard), self.settings["batch_size"]
        return [images[start : start + size] for start in range(0, len(images), size)]

    def missing(self) -> list[int]:
        """The shards that are not there, or not whole. ValueError: one was made with other settings."""
        return [shard for shard in range(self.num_shards) if not self._holds(shard)]

    def _holds(self, shard: int) -> bool:
        try:
            found = open_shard(self.path(shard)).settings
        except (ValueError, OSError):
            return False
        then, now = _readable(found), _readable(self.settings)
        for key in {**now, **then}:
            if then.get(key) != now.get(key):
                raise ValueError(f"{self.path(shard)} was encoded with {key} {then.get(key)}, now it is "
                                 f"{now.get(key)}: go on with the former, or give another --out")
        return True

    def write(self, shard: int, tensors: dict[str, Tensor], names: list[str], skipped: dict[str, str]) -> None:
        """`tensors` are those of `Shard.arrays`. OSError: the disk is full, ...; nothing is left behind then."""
        from safetensors.torch import save

        # One entry, since safetensors writes several in an order that changes from run to run.
        metadata = {"latents": json.dumps({"settings": self.settings, "names": names, "skipped": skipped})}
        try:
            write_aside(self.path(shard), save(tensors, metadata), durable=True)
        except OSError as error:
            raise OSError(f"{self.path(shard)} cannot be written ({error.strerror}): mend that, and the same command "
                          "goes on from there") from error

    def write_index(self, source: str, class_names: list[str], entries: list[dict], skipped: dict[str, str]) -> None:
        """Completes the folder.

        Args:
            source: hub id or folder of the VAE.
            class_names: names of labels 0, 1, ...
            entries: what `inspect_shard` found, of all shards in order.
            skipped: images left out, name -> why.
        """
        from importlib.metadata import version

        counts = np.sum([np.bincount(entry.pop("labels"), minlength=len(class_names)) for entry in entries], axis=0)
        index = {
            "format": FORMAT,
            "images": int(counts.sum()),
            "vae": source,
            "settings": self.settings,
            "class_names": class_names,
            "class_counts": counts.tolist(),
            "skipped": skipped,
            "shards": entries,
            "versions": {name: version(name) for name in ("torch", "diffusers", "pillow", "safetensors")},
        }
        index["checksum"] = _checksum(index)
        write_aside(self.folder / INDEX, json.dumps(index, indent=1) + "\n", durable=True)


def _readable(settings: dict) -> dict:
    """Settings one by one; of a checksum as much as tells it from another."""
    flat = settings | {f"codec {key}": value for key, value in settings.get("codec", {}).items()}
    return {key: str(value)[:12] for key, value in flat.items() if key != "codec"}


def open_shard(path: Path) -> Shard:
    """OSError: there is none. ValueError: it is not whole. (Whether its values are as written, `verify` says.)"""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8 if start <= size else 0))
            metadata = json.loads(header.pop("__metadata__")["latents"])
            places = {name: (VIEWS[entry["dtype"]], entry["shape"], start + entry["data_offsets"][0])
                      for name, entry in header.items()}
            end = start + max(entry["data_offsets"][1] for entry in header.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: its header cannot be read") from error
        if end != size:
            raise ValueError(f"{path} is damaged: it has {size} bytes, and {end} by its header")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        content.madvise(mmap.MADV_RANDOM)  # reads no neighbours: more samples/s from what is not in memory yet
    arrays = {name: np.frombuffer(content, dtype, math.prod(shape), offset).reshape(shape)
              for name, (dtype, shape, offset) in places.items()}
    return Shard(arrays, metadata["names"], metadata["skipped"], metadata["settings"])


def read_index(folder: str | Path) -> dict:
    """What `Layout.write_index` wrote. ValueError: there is none, or it is damaged."""
    path = Path(folder) / INDEX
    try:
        index = json.loads(path.read_text())
        if index["format"] != FORMAT:
            raise ValueError(f"{path} has format {index['format']}, not {FORMAT}: encode the images again")
        if index["checksum"] != _checksum(index):
            raise ValueError(f"{path} is not as it was written: run the same sit_atconv/encode.py again")
    except OSError as error:
        raise ValueError(f"{folder} holds no {INDEX}: encode images into it with sit_atconv/encode.py, or let that "
                         "finish") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: run the same sit_atconv/encode.py again") from error
    return index


def _checksum(index: dict) -> str:
    content = {key: value for key, value in index.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def inspect_shard(path: Path, settings: dict, num_classes: int) -> tuple[dict, list[str]]:
    """Reads all of a shard: what the index says of it (and its labels), and what is wrong with its values."""
    entry = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    shard = open_shard(path)
    labels, faults = shard.arrays["labels"], []
    for name in ("moments", *(["mirrored"] if settings["mirrored"] else [])):
        values = shard.arrays[name]
        if values.shape != (len(shard.names), *settings["moments_shape"]):
            faults.append(f"{path} holds {name} {values.shape} of {len(shard.names)} images")
            continue
        for start in range(0, len(values), 64):
            finite = as_tensor(values[start : start + 64], settings["dtype"]).isfinite().flatten(1).all(1)
            faults += [f"{path} holds values that are not finite, of {shard.names[start + i]}"
                       for i in (~finite).nonzero()[:, 0].tolist()]
    if len(labels) != len(shard.names) or not all(0 <= label < num_classes for label in labels):
        faults.append(f"{path} holds labels that are not 0 ... {num_classes - 1}, one for each image")
    return entry | {"images": len(shard.names), "labels": labels}, faults


def as_tensor(values: np.ndarray, dtype: str) -> Tensor:
    """A copy of what is on disk, in its true dtype."""
    return torch.from_numpy(np.array(values)).view(DTYPES[dtype])


def verify(folder: Path, after_shard: Callable[[int], object] = lambda size: None) -> list[str]:
    """All that is wrong with a complete folder: checksums, counts, values that are not finite, files too many.

    Args:
        folder: LATENTS.
        after_shard: is told the bytes of each shard read.

    Raises:
        ValueError: the index itself cannot be read.
    """
    index, faults = read_index(folder), []
    counts = np.zeros(len(index["class_names"]), np.int64)

    def compare(entry: dict) -> tuple[np.ndarray | int, list[str]]:
        path = Path(folder, entry["file"])
        try:
            found, wrong = inspect_shard(path, index["settings"], len(counts))
        except FileNotFoundError:
            return 0, [f"{path} is missing"]
        except (ValueError, OSError) as error:
            return 0, [str(error)]
        labels = found.pop("labels")
        in_shard = np.bincount(labels[(labels >= 0) & (labels < len(counts))], minlength=len(counts))
        return in_shard, wrong + [f"{path} has {key} {found[key]}, and {entry[key]} by the index"
                                  for key in entry if found[key] != entry[key]]

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # checksums are most of the work, and leave Python meanwhile
        for entry, (in_shard, wrong) in zip(index["shards"], pool.map(compare, index["shards"]), strict=True):
            counts += in_shard
            faults += wrong
            after_shard(entry["bytes"])
    for name, count, recorded in zip(index["class_names"], counts.tolist(), index["class_counts"], strict=True):
        if count != recorded and not faults:
            faults.append(f"class {name} has {count} images, and {recorded} by the index")
    known = {entry["file"] for entry in index["shards"]}
    faults += [f"{path} is not in the index" for path in sorted(Path(folder).glob("shard-*")) if path.name not in known]
    return faults
