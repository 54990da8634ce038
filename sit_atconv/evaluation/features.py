"""Features of sets of images: extracted by several processes, cached on disk in shards."""

import contextlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import PIL
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from sit_atconv.evaluation.extractors import Extractor
from sit_atconv.evaluation.gaussians import Gaussian, Moments
from sit_atconv.evaluation.image_sets import ImageSet, digest_of, evenly_spaced
from sit_atconv.runtime.files import PARTIAL, write_aside
from sit_atconv.runtime.processes import share, together

TRANSPARENT = "transparent"  # key in a shard's metadata: number of its images with transparent pixels
SHARD = 1024  # images: a kill loses at most one shard per process
DAY = 86_400  # seconds


@torch.inference_mode()
def extract_features(
    extractor: Extractor,
    images: ImageSet,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    start: int = 0,
    stop: int | None = None,
    progress: tqdm | None = None,
) -> dict[str, Tensor]:
    """Runs the extractor on images start ... stop - 1.

    Returns:
        For each output of the extractor, float32 (N, D) on the CPU.

    Raises:
        ValueError: an image cannot be read, or a feature is not finite.
    """
    parts = []
    stop = len(images) if stop is None else stop
    for batch in _read_ahead(images, start, stop, batch_size):
        parts.append(extractor(batch.to(device)))
        if progress is not None:
            progress.update(len(batch))
    features = {name: torch.cat([part[name] for part in parts]) for name in extractor.outputs}
    for name, values in features.items():
        if not values.isfinite().all():
            which = start + int((~values.isfinite().all(1)).nonzero()[0])
            raise ValueError(
                f"extractor {extractor.name!r} gives {name} of image {which} of {images.name} that are "
                "not finite: its weights are damaged, give another file as --weights"
            )
    return features


def _read_ahead(images: ImageSet, start: int, stop: int, batch_size: int) -> Iterator[Tensor]:
    """Yields batches of images, and reads the next one meanwhile."""
    with ThreadPoolExecutor(1) as reader:
        coming = None
        for first in range(start, stop, batch_size):
            ready, coming = coming, reader.submit(images.read, first, min(first + batch_size, stop))
            if ready:
                yield ready.result()
        if coming:
            yield coming.result()


class FeatureShards:
    """Features of a set of images on disk, `SHARD` images per file.

    The name of a file is the digest of everything that its content depends on: the images themselves, the extractor and
    its weights, batch size, kind of device and versions. So an existing file is always valid, whichever command wrote
    it, and a changed image or setting gives another name.

    Args:
        folder: folder of the files; several commands may share it.
        extractor: the network that computes the features.
        images: the set of images.
        batch_size: number of images per forward pass.
        device: device of the extractor.
    """

    def __init__(
        self, folder: Path, extractor: Extractor, images: ImageSet, batch_size: int, device: torch.device | str
    ):
        self.folder, self.extractor, self.images = folder, extractor, images
        self.batch_size, self.device = batch_size, torch.device(device)
        self._settings = json.dumps(
            {
                "extractor": extractor.describe(),
                "batch_size": batch_size,
                "device": self.device.type,
                "versions": {"torch": torch.__version__, "pillow": PIL.__version__},
            },
            sort_keys=True,
        )

    def __len__(self) -> int:
        return -(-len(self.images) // SHARD)

    def bounds(self, number: int) -> tuple[int, int]:
        """Returns the first image of a shard, and the first one after it."""
        return number * SHARD, min((number + 1) * SHARD, len(self.images))

    def make(self, number: int, progress: tqdm | None = None) -> str:
        """Extracts and writes a shard unless it exists; returns the digest of its images."""
        start, stop = self.bounds(number)
        content = self.images.content(start, stop)
        if self.has(content):
            if progress is not None:
                progress.update(stop - start)
            return content
        num_transparent = self.images.num_transparent(start, stop)
        features = extract_features(self.extractor, self.images, self.batch_size, self.device, start, stop, progress)
        written = save(features, {TRANSPARENT: str(num_transparent)})
        write_aside(self._path(content), written, writer=f"{socket.gethostname()}-{os.getpid()}-")
        return content

    def num_transparent(self, number: int, content: str) -> int:
        """Returns how many images of a shard that exists are transparent."""
        with safe_open(self._path(content), "pt") as file:
            known = (file.metadata() or {}).get(TRANSPARENT)  # None in files of earlier versions
        return self.images.num_transparent(*self.bounds(number)) if known is None else int(known)

    def load(self, name: str, content: str) -> Tensor:
        """Returns one output (N, D) of the shard whose images have this digest. ValueError: it cannot be read."""
        path = self._path(content)
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}): give --features a folder that all processes see, "
                "and run the same command again"
            ) from error

    def delete(self, content: str) -> None:
        """Deletes the shard whose images have this digest, if it exists."""
        self._path(content).unlink(missing_ok=True)

    def has(self, content: str) -> bool:
        """True if the shard whose images have this digest exists and can be read."""
        try:
            with safe_open(self._path(content), "pt") as file:
                return set(file.keys()) == set(self.extractor.outputs)
        except (OSError, SafetensorError):
            return False

    def make_ready(self) -> None:
        """Makes the folder and deletes partial files older than a day. OSError: it cannot be written to."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise OSError(
                f"{self.folder} cannot be written to ({error.strerror or error}): give another --features"
            ) from error
        for partial in self.folder.glob(PARTIAL + "*"):
            with contextlib.suppress(OSError):
                if time.time() - partial.stat().st_mtime > DAY:
                    partial.unlink()

    def _path(self, content: str) -> Path:
        return self.folder / f"{digest_of(self._settings, content)[:32]}.safetensors"


@dataclass(frozen=True)
class ExtractedFeatures:
    """Complete features of a set of images.

    Args:
        shards: the files.
        contents: digests of the images of each shard.
        num_transparent: number of images with transparent pixels.
    """

    shards: FeatureShards
    contents: list[str]
    num_transparent: int = 0

    @property
    def content(self) -> str:
        """Digest of all images of the set."""
        return digest_of(*self.contents)

    def delete(self) -> None:
        """Deletes the files, for images that are not evaluated again."""
        for content in self.contents:
            self.shards.delete(content)

    def load(self, output: str) -> Tensor:
        """Returns one output of all images, (N, D)."""
        return torch.cat([self.shards.load(output, content) for content in self.contents])

    def blocks(self, output: str) -> "Blocks":
        """Returns one output of all images, a shard at a time."""
        return Blocks(self, output)

    def load_spread(self, output: str, most: int) -> Tensor:
        """Returns one output of `most` images, evenly spaced over the set, or of all if there are fewer."""
        return self.blocks(output).spread(most)[1]

    def gaussian(self, output: str) -> Gaussian:
        """Fits a Gaussian to one output of all images, with one shard in memory at a time."""
        first, *others = self.contents
        features = self.shards.load(output, first)
        moments = Moments.of(features, features.double().mean(0))
        for content in others:
            moments += Moments.of(self.shards.load(output, content), moments.origin)
        return moments.gaussian()


@dataclass(frozen=True)
class Blocks(Sequence[Tensor]):
    """One output of all images, read a shard at a time, each (M, D): more than memory may hold."""

    features: ExtractedFeatures
    output: str

    def __len__(self) -> int:
        return len(self.features.contents)

    def __getitem__(self, number):  # an int
        return self.features.shards.load(self.output, self.features.contents[number])

    def spread(self, most: int) -> tuple[Tensor, Tensor]:
        """Returns places (n,) of at most `most` images, evenly spaced over all, and their features (n, D)."""
        shards = self.features.shards
        chosen = torch.tensor(evenly_spaced(len(shards.images), most))
        parts = []
        for number, block in enumerate(self):
            start, stop = shards.bounds(number)
            parts.append(block[chosen[(chosen >= start) & (chosen < stop)] - start])
        return chosen, torch.cat(parts)


def extract_together(shards: FeatureShards, state: PartialState) -> ExtractedFeatures:
    """Extracts missing shards; each process takes every n-th one.

    Raises:
        OSError: any process failed, or they do not see each other's files; raised on all of them.
    """
    mine, made = share(range(len(shards)), state), []
    num_images = sum(stop - start for start, stop in map(shards.bounds, mine))
    with (
        together(),
        tqdm(
            total=num_images, unit="image", desc=Path(shards.images.name).name, disable=not state.is_main_process
        ) as progress,
    ):
        shards.make_ready()
        for number in mine:
            content = shards.make(number, progress)
            made.append((number, content, shards.num_transparent(number, content)))
    made = sorted(gather_object(made))
    contents = [content for _, content, _ in made]
    with together():
        if state.is_main_process and not all(map(shards.has, contents)):
            raise OSError(
                f"{shards.folder} lacks files that other processes wrote: give --features a folder that all of them see"
            )
    return ExtractedFeatures(shards, contents, sum(num for *_, num in made))
