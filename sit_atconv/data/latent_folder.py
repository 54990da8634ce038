"""Images as latents on disk: the folder that `encode.py` writes and training reads.

    LATENTS/shard-00000.safetensors     moments (n, 2C, h, w), mirrored (the same, of the mirror images), labels (n,);
                                        in the metadata the settings, the files' names and what was left out
    LATENTS/index.json                  settings, class names and counts, every shard's size and checksum
    LATENTS/preview.png                 images above what decodes from their latents

Image i belongs to shard i // images_per_shard, and there to a batch fixed by i, whoever encodes it and whatever is
there already. A shard appears whole, and the index last: a folder with an index is complete.

A folder that was extended consists of parts, one after another, each with shards of its own. The settings of a part
list the parts before it, so any shard of the last part describes the whole folder. The index of the former parts stays
until that of all parts replaces it.
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
from pathlib import Path

import torch
from torch import Tensor

from sit_atconv.runtime.files import sha256_of, write_aside
from sit_atconv.runtime.names import name_classes
from sit_atconv.runtime.settings import differences

FORMATS = (1, 2)  # 2: with fields that readers before 2026-11-25 do not know
INDEX = "index.json"
PREVIEW = "preview.png"
SAFETENSORS_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
LATER_SETTINGS = {"rules": 1, "extends": []}  # values of fields that a shard or an index does not have
LATER_FIELDS = {"enlarged": None, "keep_empty_classes": False}


@dataclass(frozen=True)
class LatentSettings:
    """All that the bytes of the shards depend on; of an extended folder, those of one part.

    Args:
        num_images: images that the part was made of.
        files: sha256 of their names and labels and of all class names.
        image_size: side of the images in pixels.
        crop: how they came to that size.
        codec: what `Codec.identity()` said.
        precision: of the codec's arithmetic.
        slicing, tiling: whether it took images one by one, and in tiles.
        mirrored: whether mirror images are there too.
        dtype: in which the moments are stored, by its name in torch.
        moments_shape: what `Codec.stored_shape()` said.
        batch_size: images encoded together.
        images_per_shard: a multiple of that.
        rules: by which files become images and labels, as `ImageFolder` has them.
        extends: num_images, files and new class_names of each part before this one.
    """

    num_images: int
    files: str
    image_size: int
    crop: str
    codec: dict
    precision: str
    slicing: bool
    tiling: bool
    mirrored: bool
    dtype: str
    moments_shape: list[int]
    batch_size: int
    images_per_shard: int
    rules: int = 1
    extends: list[dict] = dataclasses.field(default_factory=list)

    def as_dict(self) -> dict:
        """Returns the settings as shards and index hold them: without options that older folders do not have."""
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
        """The tensors of moments in a shard."""
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
        """In a shard, name and label included."""
        return math.prod(self.moments_shape) * self.torch_dtype.itemsize * len(self.kinds) + 128

    def differences(self, then: dict) -> list[str]:
        """Returns what differs from the settings of a shard, as `runtime.settings.differences` puts it."""
        return differences(LATER_SETTINGS | then, dataclasses.asdict(self))


def _without(defaults: dict, content: dict) -> dict:
    return {key: value for key, value in content.items() if key not in defaults or value != defaults[key]}


@dataclass(frozen=True)
class Shard:
    """A shard, mapped into memory: a tensor is read from disk where it is touched.

    Args:
        tensors: moments, labels and perhaps mirrored.
        names: of the image files, relative to their folder.
        skipped: images left out, name -> why.
        settings: what the shard was made with.
        enlarged: number of images whose shorter side is below `image_size`; None where it was not counted.
    """

    tensors: dict[str, Tensor]
    names: list[str]
    skipped: dict[str, str]
    settings: dict
    enlarged: int | None = None


@dataclass(frozen=True)
class ShardReport:
    """What is in a shard, having read all of it.

    Args:
        entry: file, num_images, bytes, sha256, as the index has it.
        class_counts: images of each class.
        skipped: images left out, name -> why.
        enlarged: as `Shard` has it.
        faults: what is wrong with it.
    """

    entry: dict
    class_counts: list[int]
    skipped: dict[str, str]
    enlarged: int | None
    faults: list[str]


@dataclass(frozen=True)
class LatentIndex:
    """The index of a complete folder.

    Args:
        num_images: images that are in the shards.
        vae: hub id or folder of the VAE.
        settings: those of the last part, which list the others.
        class_names: names of labels 0, 1, ...
        class_counts: images of each.
        skipped: images left out, name -> why.
        shards: file, num_images, bytes, sha256 of each.
        versions: of the libraries that completed it.
        enlarged: number of images that were smaller than `image_size`; None where some shard does not say it.
        keep_empty_classes: whether it has classes without images, by the user's wish.
    """

    num_images: int
    vae: str
    settings: LatentSettings
    class_names: list[str]
    class_counts: list[int]
    skipped: dict[str, str]
    shards: list[dict]
    versions: dict[str, str]
    enlarged: int | None = None
    keep_empty_classes: bool = False

    @property
    def unwanted_classes(self) -> str:
        """Classes without images that nobody asked to keep, as a user would say it; "" if there are none."""
        return "" if self.keep_empty_classes else show_empty_classes(self.class_names, self.class_counts)

    @property
    def num_bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.shards)

    def identity(self) -> str:
        """The same for the same data, wherever they and the VAE lie."""
        return _sha256({"settings": self.settings.as_dict(), "class_names": self.class_names,
                        "shards": self.shards})


@dataclass(frozen=True)
class LatentFolder:
    """A folder that is being filled, and which images belong where in it.

    Args:
        path: of the folder.
        settings: those of its last part.
    """

    path: Path
    settings: LatentSettings

    @functools.cached_property
    def places(self) -> list[tuple[LatentSettings, range]]:
        """The settings and the images of each shard. (Images count on from part to part; a part begins a shard.)"""
        places, start = [], 0
        for part in self.settings.parts:
            end = start + part.num_images
            places += [(part, range(first, min(first + part.images_per_shard, end)))
                       for first in range(start, end, part.images_per_shard)]
            start = end
        return places

    @property
    def num_shards(self) -> int:
        return len(self.places)

    def shard(self, number: int) -> Path:
        return self.path / f"shard-{number:05d}.safetensors"

    def images(self, number: int) -> range:
        """The images that belong to a shard."""
        return self.places[number][1]

    def batches(self, number: int) -> list[range]:
        """The images of a shard, as they are encoded together."""
        images, size = self.images(number), self.settings.batch_size
        return [images[start : start + size] for start in range(0, len(images), size)]

    def missing(self, may_skip: bool = False) -> list[int]:
        """The shards to be made: not there, not whole, or, unless they may, leaving images out.

        Raises:
            ValueError: a shard was made with other settings, or there is one too many.
        """
        missing = [number for number in range(self.num_shards) if not self._has(number, may_skip)]
        known = {self.shard(number).name for number in range(self.num_shards)}
        for path in sorted(self.path.glob("shard-*")):
            if path.name not in known:
                raise ValueError(f"{path} is none of the {self.num_shards} shards that this will have: delete it, or "
                                 "give another --out")
        return missing

    def _has(self, number: int, may_skip: bool) -> bool:
        path = self.shard(number)
        try:
            shard = open_shard(path)
            if changes := self.places[number][0].differences(shard.settings):
                open_shard(path, check=True)  # or it is damaged, and missing
        except (ValueError, OSError):
            return False
        if changes:
            raise ValueError(f"{path} was encoded with other settings ({'; '.join(changes)}): resume with those, or "
                             "give another --out")
        return may_skip or not shard.skipped

    def write(
        self, number: int, tensors: dict[str, Tensor], names: list[str], skipped: dict[str, str],
        enlarged: int | None = None,
    ) -> None:
        """Writes a shard; the arguments are those of `Shard`. OSError: the disk is full, ...; nothing is left then."""
        from safetensors.torch import save

        content = {"settings": self.places[number][0].as_dict(), "names": names, "skipped": skipped}
        content |= {} if enlarged is None else {"enlarged": enlarged}
        # One entry, since safetensors writes several in an order that changes from run to run.
        metadata = {"latents": json.dumps({"content": content, "crc32": _crc32(tensors, content)})}
        write_aside(self.shard(number), save(tensors, metadata), durable=True)

    def write_index(
        self, vae: str, class_names: list[str], reports: list[ShardReport], keep_empty_classes: bool = False
    ) -> None:
        """Completes the folder.

        Args:
            vae: where the VAE is.
            class_names: of labels 0, 1, ...
            reports: those of all shards in order.
            keep_empty_classes: whether classes without images were asked for.
        """
        from importlib.metadata import version

        class_counts = sum_counts(reports)
        enlarged = [report.enlarged for report in reports]

        index = LatentIndex(
            num_images=sum(report.entry["num_images"] for report in reports),
            vae=vae,
            settings=self.settings,
            class_names=class_names,
            class_counts=class_counts,
            skipped={name: why for report in reports for name, why in report.skipped.items()},
            shards=[report.entry for report in reports],
            versions={name: version(name) for name in ("torch", "diffusers", "pillow", "safetensors")},
            enlarged=None if None in enlarged else sum(enlarged),
            keep_empty_classes=keep_empty_classes and 0 in class_counts,
        )
        write_index(self.path, index)


def sum_counts(reports: list[ShardReport]) -> list[int]:
    """Returns the images of each class in all shards together."""
    return [sum(counts) for counts in zip(*(report.class_counts for report in reports), strict=True)]


def show_empty_classes(class_names: Sequence[str], class_counts: Sequence[int]) -> str:
    """Returns how many classes have no images, and which; "" if there are none."""
    empty = [label for label, count in enumerate(class_counts) if not count]
    return name_classes(class_names, empty, " without images", most=20) if empty else ""


def newest_settings(folder: Path) -> LatentSettings | None:
    """Returns the settings of the last part of a folder, complete or not, or None if it has no whole shard."""
    for path in sorted(folder.glob("shard-*"), reverse=True):
        try:
            return LatentSettings(**open_shard(path, check=True).settings)
        except (ValueError, OSError, TypeError):
            continue  # the shard before it knows the same, or the part before
    return None


def open_shard(path: Path, check: bool = False) -> Shard:
    """Maps a shard into memory.

    Args:
        path: of the shard.
        check: read all of it, and compare with the checksums written with it.

    Raises:
        OSError: there is none.
        ValueError: it is not whole, or not as it was written.
    """
    size = os.stat(path).st_size
    try:
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8) if start <= size else b"")
        metadata = json.loads(header.pop("__metadata__")["latents"])
        end = start + max(entry["data_offsets"][1] for entry in header.values())
        if end != size:
            raise ValueError(f"it has {size} bytes, and {end} by its header")
        stored = _map(path, size)
        tensors = {
            name: stored[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
            .view(SAFETENSORS_DTYPES[entry["dtype"]]).view(entry["shape"])
            for name, entry in header.items()
        }
        if not {"moments", "labels"} <= tensors.keys():
            raise ValueError(f"it holds {', '.join(tensors)} only")
        if check and metadata["crc32"] != _crc32(tensors, metadata["content"]):
            raise ValueError("its content is not as it was written")
        shard = Shard(tensors, **metadata["content"])
        dict(shard.settings["codec"])  # they are settings at all
        return shard
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:  # whatever a flipped byte leads to
        reason = str(error).splitlines()[0] if type(error) is ValueError else "its header cannot be read"
        raise ValueError(f"{path} is damaged: {reason}") from error


def _map(path: Path, size: int) -> Tensor:
    """A file as uint8 (size,). Unlike Python's own mappings, a tensor's keeps no descriptor of the file open."""
    content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    if sys.platform == "linux":  # read no neighbours: 1.6 times the samples/s from a disk
        place, length = ctypes.c_void_p(content.data_ptr()), ctypes.c_size_t(size)
        ctypes.CDLL(None).madvise(place, length, mmap.MADV_RANDOM)
    return content


def _crc32(tensors: dict[str, Tensor], content: dict) -> dict[str, int]:
    sums = {name: zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy()) for name, tensor in sorted(tensors.items())}
    return sums | {"content": zlib.crc32(json.dumps(content).encode())}


def locate(ends: list[int], index: int) -> tuple[int, int]:
    """Which shard, and which of its images: `ends` are the running totals of images in them."""
    number = bisect.bisect_right(ends, index)
    return number, index - (ends[number - 1] if number else 0)


def inspect_shard(path: Path, settings: LatentSettings, num_classes: int) -> ShardReport:
    """Reads all of a shard. OSError, ValueError: as `open_shard`."""
    entry = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    shard, faults = open_shard(path, check=True), []
    labels, n = shard.tensors["labels"], len(shard.names)
    for kind in settings.kinds:
        values = shard.tensors.get(kind, torch.empty(0))
        expected = (n, *settings.moments_shape), settings.torch_dtype
        if (values.shape, values.dtype) != expected:
            faults.append(f"{path} holds {kind} {tuple(values.shape)} {values.dtype}, and not {expected}")
            continue
        for start in range(0, n, 64):
            finite = values[start : start + 64].isfinite().flatten(1).all(1)
            faults += [f"{path} holds values that are not finite, of {shard.names[start + i]}"
                       for i in (~finite).nonzero()[:, 0].tolist()]
    known = labels[(labels >= 0) & (labels < num_classes)]
    if len(known) != n:
        faults.append(f"{path} holds labels that are not 0 ... {num_classes - 1}, one for each image")
    counts = known.bincount(minlength=num_classes).tolist()
    return ShardReport(entry | {"num_images": n}, counts, shard.skipped, shard.enlarged, faults)


def read_index(folder: str | Path) -> LatentIndex:
    """What `write_index` wrote. ValueError: there is none, or it is damaged."""
    path = Path(folder) / INDEX
    again = "run the same sit_atconv/encode.py again"
    try:
        content = json.loads(path.read_bytes())
        if content.pop("format") not in FORMATS:
            raise ValueError(f"{path} is of another version: encode the images again")
        if content.pop("sha256") != _sha256(content):
            raise ValueError(f"{path} is not as it was written: {again}")
        return LatentIndex(**content | {"settings": LatentSettings(**content["settings"])})
    except OSError as error:
        raise ValueError(f"{folder} holds no {INDEX}: encode images into it with sit_atconv/encode.py, or let that "
                         "finish") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {again}") from error


def write_index(folder: Path, index: LatentIndex) -> None:
    content = _without(LATER_FIELDS, dataclasses.asdict(index) | {"settings": index.settings.as_dict()})
    later = LATER_FIELDS.keys() & content or LATER_SETTINGS.keys() & content["settings"]
    stamped = {"format": 2 if later else 1, **content, "sha256": _sha256(content)}
    write_aside(folder / INDEX, json.dumps(stamped, indent=1) + "\n", durable=True)


def _sha256(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verify(folder: Path, after_shard: Callable[[int], object] = lambda size: None) -> list[str]:
    """All that is wrong with a complete folder: checksums, counts, values that are not finite, files too many.

    Args:
        folder: LATENTS.
        after_shard: is told the bytes of each shard read.

    Raises:
        ValueError: the index itself cannot be read.
    """
    index, faults = read_index(folder), []
    counts = torch.zeros(len(index.class_names), dtype=torch.int64)

    def compare(entry: dict) -> tuple[list[int], list[str]]:
        path = Path(folder, entry["file"])
        try:
            report = inspect_shard(path, index.settings, len(counts))
        except FileNotFoundError:
            return [0] * len(counts), [f"{path} is missing"]
        except (ValueError, OSError) as error:
            return [0] * len(counts), [str(error)]
        return report.class_counts, report.faults + [
            f"{path} has {key} {report.entry[key]}, and {entry[key]} by the index"
            for key in entry if report.entry[key] != entry[key]
        ]

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # checksums are most of the work, and leave Python meanwhile
        for entry, (of_shard, wrong) in zip(index.shards, pool.map(compare, index.shards), strict=True):
            counts += torch.tensor(of_shard)
            faults += wrong
            after_shard(entry["bytes"])
    if not faults:
        faults += [f"class {name} has {count} images, and {recorded} by the index" for name, count, recorded
                   in zip(index.class_names, counts.tolist(), index.class_counts, strict=True) if count != recorded]
    if empty := index.unwanted_classes:
        faults.append(f"{folder} has {empty}: encode with --keep-empty-classes if they shall stay")
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
