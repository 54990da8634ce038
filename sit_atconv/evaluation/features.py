"""Features of sets of images, kept on disk in shards that are named by what they were made of."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from sit_atconv.evaluation.extractors import Extractor
from sit_atconv.evaluation.image_sets import ImageSet, digest_of
from sit_atconv.files import PARTIAL, write_aside

SHARD = 1024  # images: what a kill may cost each process
DAY = 86_400  # seconds


@torch.inference_mode()
def extract_features(
    extractor: Extractor, images: ImageSet, batch_size: int = 64, device: torch.device | str = "cpu",
    start: int = 0, stop: int | None = None, progress: tqdm | None = None,
) -> dict[str, Tensor]:
    """One pass over images start ... stop - 1, in their order and without TF32.

    Returns:
        By output of the extractor, float32 (N, D) on the CPU.

    Raises:
        ValueError: an image that cannot be read, or a feature that is not finite.
    """
    parts = []
    stop = len(images) if stop is None else stop
    with _no_tf32():
        for batch in _read_ahead(images, start, stop, batch_size):
            parts.append(extractor(batch.to(device)))
            if progress is not None:
                progress.update(len(batch))
    features = {name: torch.cat([part[name] for part in parts]) for name in extractor.outputs}
    for name, values in features.items():
        if not values.isfinite().all():
            which = start + int((~values.isfinite().all(1)).nonzero()[0])
            raise ValueError(f"extractor {extractor.name!r} gives {name} of image {which} of {images.name} that are "
                             "not finite: its weights are damaged")
    return features


def _read_ahead(images: ImageSet, start: int, stop: int, batch_size: int) -> Iterator[Tensor]:
    """The batches of images; the next is read while one is worked on."""
    with ThreadPoolExecutor(1) as reader:
        coming = None
        for first in range(start, stop, batch_size):
            ready, coming = coming, reader.submit(images.read, first, min(first + batch_size, stop))
            if ready:
                yield ready.result()
        if coming:
            yield coming.result()


@contextlib.contextmanager
def _no_tf32():
    """cuDNN convolves in TF32 by default, which moves FID; what the caller had chosen comes back afterwards."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    chosen = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, chosen, strict=True):
            backend.allow_tf32 = allowed


class FeatureShards:
    """The features of a set of images, `SHARD` images a file.

    A file's name is the digest of everything its content depends on: the images themselves, the extractor and its
    weights, batch size, kind of device and versions. So what is found under that name is right, whoever wrote it, for
    whichever set of images; and one image or setting changed is another name.

    Args:
        folder: of the files; several commands may share it.
        extractor: what sees the images.
        images: what is seen.
        batch_size: images at a time.
        device: where the extractor lives.
    """

    def __init__(
        self, folder: Path, extractor: Extractor, images: ImageSet, batch_size: int, device: torch.device | str
    ):
        self.folder, self.extractor, self.images = Path(folder), extractor, images
        self.batch_size, self.device = batch_size, torch.device(device)
        versions = {"torch": torch.__version__, "pillow": PIL.__version__}
        self._settings = json.dumps({"extractor": extractor.describe(), "batch_size": batch_size,
                                     "device": self.device.type, "versions": versions}, sort_keys=True)

    def __len__(self) -> int:
        return -(-len(self.images) // SHARD)

    def make(self, number: int, progress: tqdm | None = None) -> str:
        """Sees to it that a shard is there; returns the digest of its images."""
        start, stop = number * SHARD, min((number + 1) * SHARD, len(self.images))
        content = self.images.content(start, stop)
        path = self._path(content)
        if self._is_whole(path, stop - start):
            if progress is not None:
                progress.update(stop - start)
            return content
        features = extract_features(self.extractor, self.images, self.batch_size, self.device, start, stop, progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, save(features), writer=f"{socket.gethostname()}-{os.getpid()}-")
        return content

    def load(self, name: str, contents: Sequence[str]) -> Tensor:
        """One output, (N, D), of the shards whose images have these digests, one after another.

        Raises:
            ValueError: a shard is missing or damaged: other processes write to another disk, or somebody deletes.
        """
        parts = []
        for content in contents:
            path = self._path(content)
            try:
                with safe_open(path, "pt") as file:
                    parts.append(file.get_tensor(name))
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} cannot be read ({error}): give --features a folder that all processes see, "
                                 "and run the same command again") from error
        return torch.cat(parts)

    def clear_partial(self) -> None:
        """What was left half written by a process killed more than a day ago; others may be at work."""
        for partial in self.folder.glob(PARTIAL + "*"):
            with contextlib.suppress(OSError):
                if time.time() - partial.stat().st_mtime > DAY:
                    partial.unlink()

    def _path(self, content: str) -> Path:
        return self.folder / f"{digest_of(self._settings, content)[:32]}.safetensors"

    def _is_whole(self, path: Path, num_images: int) -> bool:
        try:
            with safe_open(path, "pt") as file:
                shapes = [file.get_slice(name).get_shape() for name in self.extractor.outputs]
            return all(shape[0] == num_images for shape in shapes)
        except (OSError, SafetensorError):
            return False
