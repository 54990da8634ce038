"""Sets of images to evaluate: a folder, an `.npz`, output of `sample/generate.py`, or the digits."""

import hashlib
import json
import operator
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sit_atconv.data import IDX, IMAGES_AS, MAX_MEGAPIXELS, is_named
from sit_atconv.data.digits import load_digits
from sit_atconv.data.file_store import FileStore, Folder
from sit_atconv.data.idx import IdxImages
from sit_atconv.data.image_npz import ImageNpz
from sit_atconv.data.images import DATASET_JSON, ImageFolder, left_out_line, list_images, scan_images
from sit_atconv.data.pixels import CROP_RULE, Colour, has_transparency, read_image
from sit_atconv.data.stores import archive_of, open_store

LABELS = "arr_1"  # as in ADM's files
MANIFEST, NPZ = "manifest.json", "samples.npz"  # files that sample/generate.py writes beside images/
DRAW = "draw samples from it with sample/generate.py --ckpt and give their folder"
OTHERS = {  # file in a folder that is not a set of images, whatever pictures are in it -> its name and the remedy
    "shard-00000.safetensors": "a folder of latents: give the folder of images that was encoded",
    "checkpoints/step-*": f"a training run: {DRAW}",
    "*/images/000000.png": "a folder with several sets of samples: give one of its folders",
    "diffusion_pytorch_model.safetensors": f"a checkpoint or an exported model: {DRAW}",
    "*/diffusion_pytorch_model.safetensors": f"a checkpoint or an exported model: {DRAW}",
}
SAMPLER = [  # settings of the sampler in manifests that do not list them themselves
    "cfg",
    "cfg_schedule",
    "cfg_channels",
    "cfg_interval",
    "solver",
    "steps",
    "shift",
    "times",
    "diffusion_form",
    "diffusion_norm",
    "last_step",
    "last_step_size",
    "dtype",
    "compile",
]
WEIGHTS = {".pt", ".pth", ".ckpt", ".bin", ".safetensors"}


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, read some at a time.

    Args:
        name: path or word that the user gave.
        images: uint8 (N, H, W, 3), in memory or on disk, or the names of N image files.
        store: where these files are.
        crop_to: side in pixels to crop files to by ADM's rule; None leaves them as they are.
        labels: N integers, or None if unknown.
        manifest: manifest of `sample/generate.py`, or {}.
        max_megapixels: largest accepted file, in millions of pixels.
        background: red, green and blue that transparent pixels of files are composited on; None takes the colours that
            they hold, as ADM does.
        warnings: problems of these images that the user should know.
    """

    name: str
    images: np.ndarray | Sequence[str]
    store: FileStore | None = None
    crop_to: int | None = None
    labels: Sequence[int] | None = None
    manifest: dict = field(default_factory=dict)
    max_megapixels: float = MAX_MEGAPIXELS
    background: Colour | None = None
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def first(self, num: int) -> "ImageSet":
        """Returns the first `num` images. ValueError: there are fewer."""
        if num > len(self):
            raise ValueError(f"{self.holds}, fewer than --num-samples {num}")
        return replace(self, images=self.images[:num], labels=None if self.labels is None else self.labels[:num])

    @property
    def holds(self) -> str:
        """Start of messages: "runs/a/samples/x holds 60 images"."""
        return f"{self.name} holds {len(self)} image{'s' * (len(self) != 1)}"

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the first image, which all must have."""
        height, width = self.read(0, 1).shape[-2:]
        return height, width

    def read(self, start: int, stop: int) -> Tensor:
        """Reads images start ... stop - 1, uint8 (B, 3, H, W).

        ValueError: one cannot be read, or has another size.
        """
        if isinstance(self.images, np.ndarray):
            return torch.from_numpy(np.array(self.images[start:stop])).permute(0, 3, 1, 2)
        with ThreadPoolExecutor() as pool:
            pictures = list(pool.map(self._read_file, self.images[start:stop]))
        expected = pictures[0].shape if start == 0 else (3, *self.size)
        for name, picture in zip(self.images[start:stop], pictures, strict=True):
            if picture.shape != expected:
                (_, h, w), (_, h0, w0) = picture.shape, expected
                raise ValueError(
                    f"{self._where(name)} is {h}x{w}, and the first {h0}x{w0}: give images of one size, or crop "
                    "a reference with --image-size"
                )
        return torch.stack(pictures)

    def _read_file(self, name: str) -> Tensor:
        assert self.store is not None
        try:
            return read_image(self.store.open(name), self.crop_to, self.max_megapixels, self.background)
        except ValueError as error:
            raise ValueError(f"{self._where(name)} {error}") from error

    def _where(self, name: str) -> str:
        return self.store.where(name) if self.store else name

    def content(self, start: int, stop: int) -> str:
        """Returns the digest of images start ... stop - 1: their pixels, or their files' bytes and the crop."""
        if isinstance(self.images, np.ndarray):
            pixels = np.ascontiguousarray(self.images[start:stop])
            return digest_of(str(pixels.shape), hashlib.sha256(pixels.data).hexdigest())
        with ThreadPoolExecutor() as pool:
            assert self.store is not None
            return digest_of(self.crop, *pool.map(self.store.sha256, self.images[start:stop]))

    def num_transparent(self, start: int, stop: int) -> int:
        """Returns how many of the images start ... stop - 1 have transparent pixels; only files can have some."""
        if isinstance(self.images, np.ndarray):
            return 0
        with ThreadPoolExecutor() as pool:
            assert self.store is not None
            return sum(pool.map(has_transparency, map(self.store.open, self.images[start:stop])))

    @property
    def crop(self) -> str:
        """Description of how files are cropped, and of the background of transparent ones."""
        crop = f"{CROP_RULE}, to {self.crop_to}x{self.crop_to}" if self.crop_to else "none"
        return crop if self.background is None else f"{crop}, on {hex_colour(self.background)}"


def hex_colour(colour: Colour) -> str:
    return "#" + bytes(colour).hex()


def evenly_spaced(num: int, most: int) -> list[int]:
    """Returns `most` indices, evenly spaced over `num`, or all if there are fewer."""
    return np.linspace(0, num - 1, min(most, num)).astype(int).tolist()


def digest_of(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def open_image_set(
    source: str,
    crop_to: int | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
    background: Colour | None = None,
) -> ImageSet:
    """Opens the images at a path, or the digits.

    Args:
        source: a folder, archive or other place of image files, as `open_store` takes it; an `.npz` with `arr_0` uint8
            (N, H, W, 3) and optionally labels `arr_1`; a folder that `sample/generate.py` wrote, or the manifest or
            samples.npz in it (reads samples.npz, or else images/, never the grid picture); "digits", scikit-learn's
            1,797 digits as RGB; or "idx:FOLDER", IDX files as RGB, see `IdxImages`.
        crop_to: side in pixels to crop the images of a folder to, by ADM's rule, or to pad IDX files to.
        max_megapixels: largest accepted file, in millions of pixels.
        background: as in `ImageSet`.

    Raises:
        ValueError: nothing there can be read, the array is of another kind, or the folder is a training run, latents
            or a checkpoint; the message says what was expected.
    """
    if source.startswith(IDX):
        data = IdxImages(source.removeprefix(IDX), crop_to, keep_empty_classes=True)
        return ImageSet(source, _as_rgb(data.images[:, 0].numpy()), labels=data.labels.tolist())
    check_is_images(source)
    path = folder_of(Path(source))
    is_generated = (path / MANIFEST).is_file() and ((path / "images").is_dir() or (path / NPZ).is_file())
    of_files = path.is_dir() or archive_of(path) is not None or is_named(source)
    if crop_to and (is_generated or source == "digits" or not of_files):
        raise ValueError(f"--image-size crops files of images, and {source} has none: leave it out")
    if source == "digits":
        return ImageSet(source, _as_rgb(load_digits()[0]))
    if is_generated:
        return replace(_open_generated(source, path), max_megapixels=max_megapixels)
    if of_files:
        images = _open_files(source, open_store(source))
        return replace(images, crop_to=crop_to, max_megapixels=max_megapixels, background=background)
    if path.is_file():
        return _open_npz(source, ImageNpz(path))
    raise ValueError(f"{source} does not exist: give {IMAGES_AS}, or an .npz")


def _as_rgb(images: np.ndarray) -> np.ndarray:
    return np.repeat(images[..., None], 3, axis=-1)  # (N, H, W) -> (N, H, W, 3)


def folder_of(path: Path) -> Path:
    """Returns the folder of samples for its manifest or samples.npz, and any other path unchanged."""
    is_part = path.name == MANIFEST or (path.name == NPZ and path.with_name(MANIFEST).is_file())
    return path.parent if is_part else path


def check_is_images(source: str) -> None:
    """Raises ValueError if the path is latents, a training run or a checkpoint instead of images."""
    path = Path(source)
    if path.is_file() and path.suffix.lower() in WEIGHTS:
        raise ValueError(f"{source} is a file of weights: {DRAW}")
    if path.is_dir():
        for pattern, kind in OTHERS.items():
            if next(path.glob(pattern), None):
                raise ValueError(f"{source} is {kind}")


def _open_npz(source: str, npz: ImageNpz) -> ImageSet:
    images = npz.images()
    if LABELS not in npz.names:
        return ImageSet(source, images)
    labels = npz.read(LABELS)
    if labels.dtype.kind not in "iu" or labels.size != len(images):
        found = f"{LABELS} is {labels.dtype} {labels.shape}, not {len(images)} integers"
        return ImageSet(source, images, warnings=(f"the labels of {source} are unknown: {found}",))
    return ImageSet(source, images, labels=labels.ravel().tolist())


def _open_files(source: str, store: FileStore) -> ImageSet:
    listing = scan_images(store)
    others = {suffix: count for suffix, count in listing.all_left_out().items() if suffix != ".json"}  # records
    warnings = [f"{source}: {left_out_line(others)}"] if others else []
    labels: list[int] | None = None
    if store.read(DATASET_JSON) is not None or store.labels(listing.names):
        try:
            labels = ImageFolder(store, 1, keep_empty_classes=True).labels.tolist()
        except ValueError as error:
            warnings.append(f"the labels of {source} are unknown: {' '.join(str(error).split())}")
    else:
        labels = _labels_of_subfolders(listing.names)
    labels = labels if labels and len(set(labels)) > 1 else None
    return ImageSet(source, listing.names, store, labels=labels, warnings=tuple(warnings))


def _labels_of_subfolders(names: Sequence[str]) -> list[int] | None:
    """Returns each image's subfolder as a number; None if one has no subfolder or these are not classes."""
    folders = [name.split(os.sep)[0] for name in names if os.sep in name]
    if len(folders) < len(names) or _are_parts_of_a_sequence(folders, names):
        return None
    label = {folder: index for index, folder in enumerate(dict.fromkeys(folders))}
    return [label[folder] for folder in folders]


def _are_parts_of_a_sequence(folders: Sequence[str], names: Sequence[str]) -> bool:
    """True if each subfolder has the number of its first file: 001000/001000.png ... 001000/001999.png.

    EDM's `--subdirs` writes such folders, which contain all classes.
    """
    stems = [os.path.splitext(os.path.basename(name))[0] for name in names]
    if not all(text.isascii() and text.isdigit() for text in (*set(folders), *stems)):
        return False
    own, numbers = np.array(list(map(int, folders))), np.array(list(map(int, stems)))
    first = np.unique(own)
    return bool((numbers >= first[0]).all() and (first[np.searchsorted(first, numbers, "right") - 1] == own).all())


def _open_generated(source: str, folder: Path) -> ImageSet:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        num_samples = int(manifest["settings"]["num_samples"]) if manifest.get("complete") else None
        labels = [operator.index(label) for label in manifest.get("labels", ())]
        sessions = [dict(session) for session in manifest.get("sessions", ())]
        sampler = list(map(str, manifest.get("sampler", SAMPLER)))
        if num_samples is not None and len(labels) not in (0, num_samples):
            raise ValueError(f"{len(labels)} labels for {num_samples} samples")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{folder / MANIFEST} is damaged ({error}): give the folder images/ alone, or run the "
            "same sample/generate.py again"
        ) from error
    if num_samples is None:
        raise ValueError(f"the samples in {folder} are incomplete: run the same sample/generate.py again")
    images: np.ndarray | list[str]
    store = None
    if (folder / NPZ).exists():
        images = ImageNpz(folder / NPZ).images()
    else:
        images, store = list_images(folder / "images"), Folder(folder / "images")
    if len(images) != num_samples:
        raise ValueError(
            f"{folder} holds {len(images)} images, and its manifest says {num_samples}: run the same "
            "sample/generate.py again"
        )
    manifest |= {"sessions": sessions, "sampler": sampler}
    return ImageSet(source, images, store, labels=labels or None, manifest=manifest)
