"""Sets of images to be evaluated: a folder, an `.npz`, what `sample/generate.py` wrote, or the embedded digits."""

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

from sit_atconv.data import MAX_MEGAPIXELS
from sit_atconv.data.image_npz import IMAGES, ImageNpz
from sit_atconv.data.images import ImageFolder, left_out_line, list_images, load_digits, scan_images
from sit_atconv.data.pixels import CROP_RULE, read_image
from sit_atconv.runtime.files import sha256_of

LABELS = "arr_1"  # where ADM's sampler puts them
MANIFEST, NPZ = "manifest.json", "samples.npz"  # what sample/generate.py writes beside images/
DRAW = "draw samples from it with sample/generate.py --ckpt and give their folder"
OTHERS = {  # what is in a folder that is no set of images, whatever pictures it shows -> what it is, and the remedy
    "shard-00000.safetensors": "a folder of latents: give the folder of images that was encoded",
    "checkpoints/step-*": f"a training run: {DRAW}",
    "*/images/000000.png": "a folder with several sets of samples: give one of its folders",
    "diffusion_pytorch_model.safetensors": f"a checkpoint or an exported model: {DRAW}",
    "*/diffusion_pytorch_model.safetensors": f"a checkpoint or an exported model: {DRAW}",
}
SAMPLER = [  # the sampler's among the settings of a manifest, where it does not list them itself
    "cfg", "cfg_schedule", "cfg_channels", "cfg_interval", "solver", "steps", "shift", "times", "diffusion_form",
    "diffusion_norm", "last_step", "last_step_size", "dtype", "compile",
]
WEIGHTS = {".pt", ".pth", ".ckpt", ".bin", ".safetensors"}


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, read some at a time.

    Args:
        name: what the user called it.
        images: an array (N, H, W, 3) uint8, in memory or on disk, or the paths of N images.
        crop_to: the side that files are cropped to by ADM's rule; None takes them as they are.
        labels: N whole numbers, or None where they are not known.
        manifest: what `sample/generate.py` wrote about them, {} where it did not.
        max_megapixels: size in millions of pixels above which a file is refused.
        warnings: what the user should know of these images.
    """

    name: str
    images: np.ndarray | Sequence[str]
    crop_to: int | None = None
    labels: Sequence[int] | None = None
    manifest: dict = field(default_factory=dict)
    max_megapixels: float = MAX_MEGAPIXELS
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def first(self, num: int) -> "ImageSet":
        """ValueError: there are fewer."""
        if num > len(self):
            raise ValueError(f"{self.holds}, fewer than --num-samples {num}")
        return replace(self, images=self.images[:num], labels=None if self.labels is None else self.labels[:num])

    @property
    def holds(self) -> str:
        """"runs/a/samples/x holds 60 images", as messages begin."""
        return f"{self.name} holds {len(self)} image{'s' * (len(self) != 1)}"

    @cached_property
    def size(self) -> tuple[int, int]:
        """(H, W) of the first, which all must have."""
        height, width = self.read(0, 1).shape[-2:]
        return height, width

    def read(self, start: int, stop: int) -> Tensor:
        """Images start ... stop - 1, uint8 (B, 3, H, W). ValueError: one cannot be read, or is of another size."""
        if isinstance(self.images, np.ndarray):
            return torch.from_numpy(np.array(self.images[start:stop])).permute(0, 3, 1, 2)
        with ThreadPoolExecutor() as pool:
            pictures = list(pool.map(self._read_file, self.images[start:stop]))
        expected = pictures[0].shape if start == 0 else (3, *self.size)
        for path, picture in zip(self.images[start:stop], pictures, strict=True):
            if picture.shape != expected:
                (_, h, w), (_, h0, w0) = picture.shape, expected
                raise ValueError(f"{path} is {h}x{w}, and the first {h0}x{w0}: give images of one size (of a "
                                 "reference, --image-size crops all to one)")
        return torch.stack(pictures)

    def _read_file(self, path: str) -> Tensor:
        try:
            return read_image(Path(path), self.crop_to, self.max_megapixels)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from error

    def content(self, start: int, stop: int) -> str:
        """Digest of images start ... stop - 1: of their pixels, or of their files' bytes and the crop."""
        if isinstance(self.images, np.ndarray):
            pixels = np.ascontiguousarray(self.images[start:stop])
            return digest_of(str(pixels.shape), hashlib.sha256(pixels.data).hexdigest())
        with ThreadPoolExecutor() as pool:
            return digest_of(self.crop, *pool.map(sha256_of, map(Path, self.images[start:stop])))

    @property
    def crop(self) -> str:
        """How files become images, in words."""
        return f"{CROP_RULE}, to {self.crop_to}x{self.crop_to}" if self.crop_to else "none"


def evenly_spaced(num: int, most: int) -> list[int]:
    """`most` indices from all over `num`, or all of them."""
    return np.linspace(0, num - 1, min(most, num)).astype(int).tolist()


def digest_of(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def open_image_set(source: str, crop_to: int | None = None, max_megapixels: float = MAX_MEGAPIXELS) -> ImageSet:
    """The images that a path, or the word "digits", stands for.

    Args:
        source: a folder of images, whose labels are those of its dataset.json or of its subfolders; an `.npz` with
            `arr_0` uint8 (N, H, W, 3) and optionally labels `arr_1`; a folder that `sample/generate.py` wrote, or the
            manifest or samples.npz in it (its samples.npz, or else its images/, and never the grid picture); or
            "digits", scikit-learn's 1,797 as RGB.
        crop_to: side that the images of a folder are cropped to, by ADM's rule.
        max_megapixels: size in millions of pixels above which a file is refused.

    Raises:
        ValueError: nothing readable is there, the array is of another kind, or the folder is a training run, latents
            or a checkpoint; the message says what was expected.
    """
    check_is_images(source)
    path = folder_of(Path(source))
    is_generated = (path / MANIFEST).is_file() and ((path / "images").is_dir() or (path / NPZ).is_file())
    if crop_to and (is_generated or not path.is_dir()):
        raise ValueError(f"--image-size crops the images of a folder, and {source} is none")
    if source == "digits":
        return ImageSet(source, np.repeat(load_digits()[0][..., None], 3, axis=-1))
    if is_generated:
        return replace(_open_generated(source, path), max_megapixels=max_megapixels)
    if path.is_dir():
        return replace(_open_folder(source, path), crop_to=crop_to, max_megapixels=max_megapixels)
    if path.is_file():
        return _open_npz(source, ImageNpz(path))
    raise ValueError(f"{source} does not exist: give a folder of images, an .npz with {IMAGES}, or the word digits")


def folder_of(path: Path) -> Path:
    """Returns the folder that `sample/generate.py` wrote, for its manifest and its samples.npz; other paths stay."""
    is_part = path.name == MANIFEST or (path.name == NPZ and path.with_name(MANIFEST).is_file())
    return path.parent if is_part else path


def check_is_images(source: str) -> None:
    """Raises ValueError for latents, a training run or a checkpoint in the place of images."""
    path = Path(source)
    if path.is_file() and path.suffix.lower() in WEIGHTS:
        raise ValueError(f"{source} is a file of weights: {DRAW}")
    if path.is_dir():
        for pattern, what in OTHERS.items():
            if next(path.glob(pattern), None):
                raise ValueError(f"{source} is {what}")


def _open_npz(source: str, npz: ImageNpz) -> ImageSet:
    images = npz.images()
    if LABELS not in npz.names:
        return ImageSet(source, images)
    labels = npz.read(LABELS)
    if labels.dtype.kind not in "iu" or labels.size != len(images):
        return ImageSet(source, images, warnings=(
            f"the labels of {source} are not known: {LABELS} is {labels.dtype} {labels.shape}, not {len(images)} whole "
            "numbers",))
    return ImageSet(source, images, labels=labels.ravel().tolist())


def _open_folder(source: str, folder: Path) -> ImageSet:
    listing = scan_images(folder)
    others = {suffix: count for suffix, count in listing.all_left_out().items() if suffix != ".json"}  # our records
    warnings = [f"{source}: {left_out_line(others)}"] if others else []
    labels: list[int] | None = None
    if (folder / "dataset.json").is_file():
        try:
            labels = ImageFolder(folder, 1, keep_empty_classes=True).labels.tolist()
        except ValueError as error:
            warnings.append(f"the labels of {source} are not known: {' '.join(str(error).split())}")
    else:
        labels = _labels_of_subfolders(listing.names)
    labels = labels if labels and len(set(labels)) > 1 else None
    paths = [os.path.join(folder, name) for name in listing.names]
    return ImageSet(source, paths, labels=labels, warnings=tuple(warnings))


def _labels_of_subfolders(names: Sequence[str]) -> list[int] | None:
    """Returns a number for each image's subfolder; None if there are images outside, or no subfolder is a class."""
    folders = [name.split(os.sep)[0] for name in names if os.sep in name]
    if len(folders) < len(names) or _are_parts_of_a_sequence(folders, names):
        return None
    label = {folder: index for index, folder in enumerate(dict.fromkeys(folders))}
    return [label[folder] for folder in folders]


def _are_parts_of_a_sequence(folders: Sequence[str], names: Sequence[str]) -> bool:
    """True if subfolders have the number of their first file, as in 001000/001000.png ... 001000/001999.png.

    EDM's `--subdirs` writes samples so: each subfolder has all classes.
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
        raise ValueError(f"{folder / MANIFEST} is damaged ({error}): give the folder images/ alone, or run the "
                         "same sample/generate.py again") from error
    if num_samples is None:
        raise ValueError(f"the samples in {folder} are not complete: run the same sample/generate.py again")
    npz = folder / NPZ
    images = ImageNpz(npz).images() if npz.exists() else [
        os.path.join(folder, "images", name) for name in list_images(folder / "images")]  # a million Paths: 0.5 GB
    if len(images) != num_samples:
        raise ValueError(f"{folder} holds {len(images)} images, and its manifest says {num_samples}: run the same "
                         "sample/generate.py again")
    manifest |= {"sessions": sessions, "sampler": sampler}
    return ImageSet(source, images, labels=labels or None, manifest=manifest)
