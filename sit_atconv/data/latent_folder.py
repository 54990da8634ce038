"""The folder of cached latents that `encode.py` writes and training reads.

    LATENTS/shard-00000.safetensors     moments (n, 2C, h, w), mirrored (the same for the horizontally flipped images),
                                        labels (n,); in the metadata settings, file names and the images left out.
                                        If asked for: pixels (n, 3, S, S), or jpegs (all files in a row) and jpeg_ends
                                        (n,); features and mirrored_features (n, N, width) of an image encoder
    LATENTS/index.json                  settings, class names and counts, size and checksum of each shard
    LATENTS/preview.png                 images, and below them the decoded latents

Image i belongs to shard i // images_per_shard and to a fixed batch there, whichever process encodes it and whatever
shards exist already. Each shard is written atomically and the index last: a folder with an index is complete.

An extended folder consists of parts that follow each other, each with its own shards. The settings of a part list the
parts before it, so any shard of the last part describes the whole folder. While the folder is being extended, the
index still describes the former parts; at the end the index of all parts replaces it.
"""

import bisect
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import mmap
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from sit_atconv import __version__
from sit_atconv.runtime.files import sha256_of, write_aside
from sit_atconv.runtime.names import name_classes
from sit_atconv.runtime.settings import differences

FORMATS = (1, 2, 3)  # 2: with fields that readers before 2026-11-25 do not know; 3: with pixels or features
INDEX = "index.json"
PREVIEW = "preview.png"
SAFETENSORS_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I64": torch.int64,
    "U8": torch.uint8,
}
LATER_SETTINGS = {"rules": 1, "extends": [], "pixels": "", "features": {}}  # values of fields that older shards lack
LATER_FIELDS = {"enlarged": None, "keep_empty_classes": False}
ENCODE_AGAIN = "run the same sit_atconv/encode.py command again"


@dataclass(frozen=True)
class LatentSettings:
    """All settings that the bytes of the shards depend on; for an extended folder, those of one part."""

    num_images: int  # of the part
    files: str  # sha256 of the part's file names and labels and of all class names
    image_size: int  # side in pixels
    crop: str  # rule by which images get that size
    codec: dict  # Codec.identity()
    precision: str  # of the codec's arithmetic
    slicing: bool  # True if the codec encodes one image after another
    tiling: bool  # True if the codec encodes large images in tiles
    mirrored: bool  # True if the shards also hold the horizontally flipped images
    dtype: str  # of the stored moments, by its name in torch
    moments_shape: list[int]  # Codec.stored_shape()
    batch_size: int  # images encoded together
    images_per_shard: int  # a multiple of batch_size
    rules: int = 1  # number of the `Rules` by which files became images and labels
    extends: list[dict] = dataclasses.field(default_factory=list)  # num_images, files, class_names of earlier parts
    pixels: str = ""  # "uint8" or "jpeg" if the shards also hold the crops, not flipped
    features: dict = dataclasses.field(default_factory=dict)  # of their features: encoder, weights, grid_size, width

    def as_dict(self) -> dict:
        """Returns the settings as they are stored: without later fields that have their old value."""
        return _without(LATER_SETTINGS, dataclasses.asdict(self))

    @property
    def parts(self) -> list["LatentSettings"]:
        """The settings of all parts up to this one."""
        former = [
            dataclasses.replace(self, num_images=part["num_images"], files=part["files"], extends=self.extends[:i])
            for i, part in enumerate(self.extends)
        ]
        return [*former, self]

    def extended(self, num_images: int, files: str, class_names: list[str]) -> "LatentSettings":
        """Returns the settings of a part that follows this one.

        Args:
            num_images, files: of the new part.
            class_names: all names up to this part.
        """
        known = sum(len(part["class_names"]) for part in self.extends)
        this = {"num_images": self.num_images, "files": self.files, "class_names": list(class_names[known:])}
        return dataclasses.replace(self, num_images=num_images, files=files, extends=[*self.extends, this])

    @property
    def kinds(self) -> list[str]:
        """The names of the tensors of moments in a shard."""
        return ["moments", "mirrored"] if self.mirrored else ["moments"]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def latent_size(self) -> int:
        """Side of the latent grid."""
        return self.image_size // self.codec["downsample"]

    @property
    def bytes_per_image(self) -> int:
        """Bytes that an image takes in a shard, name and label included; a JPEG is taken to be a byte a pixel."""
        moments = math.prod(self.moments_shape) * self.torch_dtype.itemsize
        pixels = {"": 0, "jpeg": 1, "uint8": 3}[self.pixels] * self.image_size**2
        return (moments + self.feature_values * torch.float16.itemsize) * len(self.kinds) + pixels + 128

    @property
    def feature_values(self) -> int:
        """Numbers of the features of one image; 0 without features."""
        return math.prod(self.features["grid_size"]) * self.features["width"] if self.features else 0

    def tensors(self, n: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Returns shape and type of the tensors of a shard of n images, but for labels and JPEGs."""
        found = {kind: ((n, *self.moments_shape), self.torch_dtype) for kind in self.kinds}
        if self.features:
            shape = (n, math.prod(self.features["grid_size"]), self.features["width"])
            found |= {features_of(kind): (shape, torch.float16) for kind in self.kinds}
        if self.pixels == "uint8":
            found["pixels"] = ((n, 3, self.image_size, self.image_size), torch.uint8)
        elif self.pixels == "jpeg":
            found["jpeg_ends"] = ((n,), torch.int64)
        return found

    def differences(self, then: dict) -> list[str]:
        """Returns the differences from the settings of a shard, as `runtime.settings.differences` words them."""
        return differences(LATER_SETTINGS | then, dataclasses.asdict(self))


def features_of(kind: str) -> str:
    """Returns the name of the tensor of features that belongs to "moments" or "mirrored"."""
    return "mirrored_features" if kind == "mirrored" else "features"


def _without(defaults: dict, content: dict) -> dict:
    return {key: value for key, value in content.items() if key not in defaults or value != defaults[key]}


@dataclass(frozen=True)
class Shard:
    """A shard mapped into memory: a tensor is read from disk only where it is used."""

    tensors: dict[str, Tensor]  # moments, labels, and mirrored, pixels, features as the settings say
    names: list[str]  # image files, relative to the folder of images
    skipped: dict[str, str]  # images left out: name -> reason
    settings: dict  # LatentSettings.as_dict()
    enlarged: int | None = None  # number of images whose shorter side is below image_size; None: not counted


@dataclass(frozen=True)
class ShardReport:
    """The result of reading a whole shard."""

    entry: dict  # file, num_images, bytes, sha256, as the index stores them
    class_counts: list[int]
    skipped: dict[str, str]
    enlarged: int | None
    faults: list[str]


@dataclass(frozen=True)
class LatentIndex:
    """The index of a complete folder."""

    num_images: int  # in the shards, without those left out
    vae: str  # hub id or folder
    settings: LatentSettings  # of the last part; they list the other parts
    class_names: list[str]  # of labels 0, 1, ...
    class_counts: list[int]
    skipped: dict[str, str]  # images left out: name -> reason
    shards: list[dict]  # file, num_images, bytes, sha256 of each
    versions: dict[str, str]  # of sit_atconv and the libraries that completed the folder
    enlarged: int | None = None  # as in `Shard`; None if any shard does not say it
    keep_empty_classes: bool = False  # True if the user asked to keep classes without images, and there are some

    @property
    def unwanted_classes(self) -> str:
        """Classes without images that the user did not ask to keep, in words; "" if there are none."""
        return "" if self.keep_empty_classes else show_empty_classes(self.class_names, self.class_counts)

    @property
    def num_bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.shards)

    def identity(self) -> str:
        """Returns a checksum of the data, which does not depend on where they and the VAE are."""
        return _sha256({"settings": self.settings.as_dict(), "class_names": self.class_names, "shards": self.shards})


@dataclass(frozen=True)
class LatentFolder:
    """A folder that is being filled, and the place of each image in it."""

    path: Path
    settings: LatentSettings  # of the last part

    @functools.cached_property
    def places(self) -> list[tuple[LatentSettings, range]]:
        """Returns the settings and image numbers of each shard; numbers continue across parts."""
        places, start = [], 0
        for part in self.settings.parts:
            end = start + part.num_images
            places += [
                (part, range(first, min(first + part.images_per_shard, end)))
                for first in range(start, end, part.images_per_shard)
            ]
            start = end
        return places

    @property
    def num_shards(self) -> int:
        return len(self.places)

    def shard(self, number: int) -> Path:
        return self.path / f"shard-{number:05d}.safetensors"

    def images(self, number: int) -> range:
        """Returns the numbers of the images in a shard."""
        return self.places[number][1]

    def batches(self, number: int) -> list[range]:
        """Returns the numbers of a shard's images, batch by batch as they are encoded."""
        images, size = self.images(number), self.settings.batch_size
        return [images[start : start + size] for start in range(0, len(images), size)]

    def missing(self, may_skip: bool = False) -> list[int]:
        """Returns the shards to encode: missing, damaged, or leaving images out unless `may_skip`.

        Raises:
            ValueError: a shard was encoded with other settings, or does not belong to the folder.
        """
        missing = [number for number in range(self.num_shards) if not self._has(number, may_skip)]
        known = {self.shard(number).name for number in range(self.num_shards)}
        for path in sorted(self.path.glob("shard-*")):
            if path.name not in known:
                raise ValueError(
                    f"{path} is not one of the {self.num_shards} shards of this folder: delete it, or "
                    "give another --out"
                )
        return missing

    def _has(self, number: int, may_skip: bool) -> bool:
        path = self.shard(number)
        try:
            shard = open_shard(path)
            if changes := self.places[number][0].differences(shard.settings):
                open_shard(path, check=True)  # if the header is damaged, the shard is missing and not different
        except (ValueError, OSError):
            return False
        if changes:
            raise ValueError(
                f"{path} was encoded with other settings ({'; '.join(changes)}): use the former settings, "
                "or give another --out"
            )
        return may_skip or not shard.skipped

    def write(
        self,
        number: int,
        tensors: dict[str, Tensor],
        names: list[str],
        skipped: dict[str, str],
        enlarged: int | None = None,
    ) -> None:
        """Writes a shard atomically, from the fields of `Shard`. OSError: the disk is full, ..."""
        from safetensors.torch import save

        content: dict = {"settings": self.places[number][0].as_dict(), "names": names, "skipped": skipped}
        if enlarged is not None:
            content["enlarged"] = enlarged
        # A single entry, because safetensors writes several entries in an order that changes from run to run.
        metadata = {"latents": json.dumps({"content": content, "crc32": _crc32(tensors, content)})}
        write_aside(self.shard(number), save(tensors, metadata), durable=True)

    def write_index(
        self, vae: str, class_names: list[str], reports: list[ShardReport], keep_empty_classes: bool = False
    ) -> None:
        """Completes the folder. `reports` are those of all shards in order; the rest is as in the index."""
        class_counts = sum_counts(reports)
        enlarged = [report.enlarged for report in reports if report.enlarged is not None]
        index = LatentIndex(
            num_images=sum(report.entry["num_images"] for report in reports),
            vae=vae,
            settings=self.settings,
            class_names=class_names,
            class_counts=class_counts,
            skipped={name: why for report in reports for name, why in report.skipped.items()},
            shards=[report.entry for report in reports],
            versions={"sit_atconv": __version__}
            | {name: version(name) for name in ("torch", "diffusers", "pillow", "safetensors")},
            enlarged=sum(enlarged) if len(enlarged) == len(reports) else None,
            keep_empty_classes=keep_empty_classes and 0 in class_counts,
        )
        write_index(self.path, index)


def sum_counts(reports: list[ShardReport]) -> list[int]:
    """Returns the number of images of each class in all shards together."""
    return [sum(counts) for counts in zip(*(report.class_counts for report in reports), strict=True)]


def show_empty_classes(class_names: Sequence[str], class_counts: Sequence[int]) -> str:
    """Returns the number and names of the classes without images, in words; "" if there are none."""
    empty = [label for label, count in enumerate(class_counts) if not count]
    return name_classes(class_names, empty, " without images", most=20) if empty else ""


def newest_settings(folder: Path) -> LatentSettings | None:
    """Returns the settings of the last part of a folder, or None if it has no intact shard."""
    for path in sorted(folder.glob("shard-*"), reverse=True):
        try:
            return LatentSettings(**open_shard(path, check=True).settings)
        except (ValueError, OSError, TypeError):
            continue  # an earlier shard has the same settings, or those of the part before
    return None


def open_shard(path: Path, check: bool = False) -> Shard:
    """Maps a shard into memory; `check` reads all of it and compares its checksums.

    Raises:
        OSError: there is no such file.
        ValueError: it is incomplete or damaged.
    """
    size = os.stat(path).st_size
    try:
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8) if start <= size else b"")
        metadata = json.loads(header.pop("__metadata__")["latents"])
        end = start + max(entry["data_offsets"][1] for entry in header.values())
        if end != size:
            raise ValueError(f"it has {size} bytes, and its header says {end}")
        stored = _map(path, size)
        tensors = {
            name: stored[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
            .view(SAFETENSORS_DTYPES[entry["dtype"]])
            .view(entry["shape"])
            for name, entry in header.items()
        }
        if not {"moments", "labels"} <= tensors.keys():
            raise ValueError(f"it only holds {', '.join(tensors)}, without moments or labels")
        if check and metadata["crc32"] != _crc32(tensors, metadata["content"]):
            raise ValueError("its content does not match its checksum")
        shard = Shard(tensors, **metadata["content"])
        dict(shard.settings["codec"])  # fails if these are not settings
        return shard
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:  # all that a flipped bit can cause
        reason = str(error).splitlines()[0] if type(error) is ValueError else "its header cannot be read"
        raise ValueError(f"{path} is damaged: {reason}") from error


def _map(path: Path, size: int) -> Tensor:
    """Maps a file as uint8 (size,). Unlike Python's mmap, this keeps no file descriptor open."""
    content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    if sys.platform == "linux":  # without reading ahead, 1.6 times as many samples/s come from a disk
        place, length = ctypes.c_void_p(content.data_ptr()), ctypes.c_size_t(size)
        ctypes.CDLL(None).madvise(place, length, mmap.MADV_RANDOM)
    return content


def read_whole(mapped: Tensor) -> Tensor:
    """Returns a copy of a contiguous part of a mapped file, for which the disk reads ahead.

    Without reading ahead, each page of a large part would be a read of its own.
    """
    if sys.platform == "linux" and mapped.nbytes:
        first = mapped.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        length = ctypes.c_size_t(mapped.data_ptr() + mapped.nbytes - first)
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), length, mmap.MADV_WILLNEED)
    return mapped.clone()


def _crc32(tensors: dict[str, Tensor], content: dict) -> dict[str, int]:
    sums = {
        name: zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data) for name, tensor in sorted(tensors.items())
    }
    return sums | {"content": zlib.crc32(json.dumps(content).encode())}


def locate(ends: list[int], index: int) -> tuple[int, int]:
    """Returns the shard of an image and its place there; `ends` are running totals of images."""
    number = bisect.bisect_right(ends, index)
    return number, index - (ends[number - 1] if number else 0)


def inspect_shard(path: Path, settings: LatentSettings, num_classes: int) -> ShardReport:
    """Reads a whole shard and reports its faults; a shard that cannot be read is one of them."""
    try:
        entry = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        shard, faults = open_shard(path, check=True), list[str]()
    except (ValueError, OSError) as error:
        fault = f"{path} is missing" if isinstance(error, FileNotFoundError) else str(error)
        return ShardReport({"file": path.name}, [0] * num_classes, {}, None, [fault])
    labels, n = shard.tensors["labels"], len(shard.names)
    for kind, expected in settings.tensors(n).items():
        values = shard.tensors.get(kind, torch.empty(0))
        found = (tuple(values.shape), values.dtype)
        if found != expected:
            faults.append(f"{path} holds {kind} {found[0]} {found[1]}, and must hold {expected[0]} {expected[1]}")
            continue
        if not values.is_floating_point():
            continue
        for start in range(0, n, 64):
            finite = values[start : start + 64].isfinite().flatten(1).all(1)
            faults += [
                f"{path} holds values that are not finite, of {shard.names[start + i]}"
                for i in (~finite).nonzero()[:, 0].tolist()
            ]
    if settings.pixels == "jpeg":
        ends, jpegs = (shard.tensors.get(name, torch.empty(0)) for name in ("jpeg_ends", "jpegs"))
        if ends[-1:].tolist() != [len(jpegs)][:n]:
            faults.append(f"{path} must hold one JPEG for each image")
    known = labels[(labels >= 0) & (labels < num_classes)]
    if len(known) != n:
        faults.append(f"{path} must hold one label from 0 to {num_classes - 1} for each image")
    counts = known.bincount(minlength=num_classes).tolist()
    return ShardReport(entry | {"num_images": n}, counts, shard.skipped, shard.enlarged, faults)


class LaterVersionError(ValueError):
    """An index that a later version of sit_atconv wrote."""


def read_index(folder: str | Path) -> LatentIndex:
    """Reads the index. ValueError: it is missing or damaged, or a later version wrote it."""
    path = Path(folder) / INDEX
    try:
        content = json.loads(path.read_bytes())
        if (number := content.pop("format")) not in FORMATS:
            wrote = dict(content.get("versions") or {}).get("sit_atconv")
            raise LaterVersionError(
                f"{path} has format {number}, and sit_atconv {__version__} reads formats "
                f"{FORMATS[0]} to {FORMATS[-1]}: it was written by "
                f"{f'sit_atconv {wrote}' if wrote else 'a later version'}; install that version or a "
                "later one, or encode the images again into another folder"
            )
        if content.pop("sha256") != _sha256(content):
            raise ValueError(f"{path} does not match its checksum: {ENCODE_AGAIN}")
        return LatentIndex(**content | {"settings": LatentSettings(**content["settings"])})
    except OSError as error:
        raise ValueError(
            f"{folder} holds no {INDEX}: encode images into it with sit_atconv/encode.py, or resume that "
            "command if it was stopped"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {ENCODE_AGAIN}") from error


def find_index(folder: Path) -> LatentIndex | None:
    """Returns the index, or None if it is missing or damaged. LaterVersionError: a later version wrote it."""
    try:
        return read_index(folder)
    except LaterVersionError:
        raise
    except ValueError:
        return None


def write_index(folder: Path, index: LatentIndex) -> None:
    content = _without(LATER_FIELDS, dataclasses.asdict(index) | {"settings": index.settings.as_dict()})
    later = LATER_FIELDS.keys() & content or LATER_SETTINGS.keys() & content["settings"]
    number = 3 if {"pixels", "features"} & content["settings"].keys() else 2 if later else 1
    stamped = {"format": number, **content, "sha256": _sha256(content)}
    write_aside(folder / INDEX, json.dumps(stamped, indent=1) + "\n", durable=True)


def _sha256(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verify(folder: Path, after_shard: Callable[[int], object] = lambda size: None) -> list[str]:
    """Returns all faults of a complete folder: checksums, counts, non-finite values, unknown shards.

    Args:
        folder: LATENTS.
        after_shard: called with the number of bytes of each shard that was read.

    Raises:
        ValueError: the index itself cannot be read.
    """
    index = read_index(folder)
    faults, reports = list[str](), list[ShardReport]()
    paths = [Path(folder, entry["file"]) for entry in index.shards]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads help: checksums take most time and release the GIL
        found = pool.map(lambda path: inspect_shard(path, index.settings, len(index.class_names)), paths)
        for path, entry, report in zip(paths, index.shards, found, strict=True):
            faults += report.faults
            faults += [
                f"{path} has {key} {value}, and the index says {entry[key]}"
                for key, value in report.entry.items()
                if value != entry[key]
            ]
            reports.append(report)
            after_shard(entry["bytes"])
    if not faults:
        faults += [
            f"class {name} has {count} images, and the index says {recorded}"
            for name, count, recorded in zip(index.class_names, sum_counts(reports), index.class_counts, strict=True)
            if count != recorded
        ]
    if empty := index.unwanted_classes:
        faults.append(f"{folder} has {empty}: encode with --keep-empty-classes to keep them")
    known = {entry["file"] for entry in index.shards} | unfinished_shards(folder, index)
    faults += [f"{path} is not in the index" for path in sorted(Path(folder).glob("shard-*")) if path.name not in known]
    return faults


def unfinished_shards(folder: Path, index: LatentIndex) -> set[str]:
    """Returns the names of shards that belong to an extension which has no index yet."""
    newest = newest_settings(folder)
    if newest is None or index.settings not in newest.parts[:-1]:
        return set()
    shards = {path.name for path in folder.glob("shard-*")} - {entry["file"] for entry in index.shards}
    places = LatentFolder(folder, newest)
    return shards & {places.shard(number).name for number in range(places.num_shards)}
