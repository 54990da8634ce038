"""Data sets of images: the embedded digits, and folders.

Every data set is indexed by (image, mirrored), as `order.py` draws them, and yields what is stored of it and an int
label: here pixels, uint8 (C, H, W), a quarter of what floats would be to hand on. It has `class_names`, `image_size`;
`is_encoded` says whether it yields what `Codec.encode` returns, and `describe()` what a run must find again to resume.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sit_atconv.data.pixels import CROP_RULE, MAX_MEGAPIXELS, read_image, to_uint8

MOST_CLASSES = 10**6  # beyond that a label is no class
RULES = 2  # by which files become images and labels; 1 is that of data sets begun before 2026-11-25
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's bundled handwritten digits: uint8 images (1797, 8, 8) and labels (1797,)."""
    from sklearn.datasets import load_digits as load

    pixels, labels = load(return_X_y=True)  # grey levels 0 ... 16
    images = to_uint8(torch.from_numpy(pixels / 8 - 1)).numpy()
    return images.reshape(-1, 8, 8), labels.astype(np.int64)


class Digits(Dataset):
    """The embedded data set: 1,797 real 8x8 greyscale images of ten classes, no download."""

    class_names = tuple("0123456789")
    channels = 1
    image_size = 8
    is_encoded = False

    def __init__(self):
        images, self.labels = load_digits()
        self.images = torch.from_numpy(images)[:, None]
        self.class_counts = np.bincount(self.labels).tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, bool]) -> tuple[Tensor, int]:
        index, mirrored = item
        image = self.images[index]
        return image.flip(-1) if mirrored else image, int(self.labels[index])

    def describe(self) -> dict:
        return {"kind": "digits", "images": len(self)}


class ImageFolder(Dataset):
    """A folder of images and their labels.

    Labels are those of `dataset.json` where the folder holds one, as StyleGAN, EDM2 and REPA write it:
    `{"labels": [["00000/img00000000.png", 6], ...]}`, or null for one class. Else every subfolder is a class, in the
    order of their names, and a folder without subfolders is one class.

    Args:
        folder: where the images lie.
        image_size: side in pixels after ADM's centre crop.
        rules: by which files become images and labels: RULES, or 1 for what was begun under it.
        keep_empty_classes: keep labels below the largest that no image has, instead of refusing them.
        max_megapixels: files of more pixels than that are not read.

    Raises:
        ValueError: no such folder, no images, images both beside and inside subfolders, a class without images, or a
            `dataset.json` that does not fit the images.
    """

    channels = 3
    is_encoded = False

    def __init__(
        self,
        folder: str | Path,
        image_size: int,
        *,
        rules: int = RULES,
        keep_empty_classes: bool = False,
        max_megapixels: float = MAX_MEGAPIXELS,
    ):
        self.folder = Path(folder)
        self.image_size = image_size
        self.rules = rules
        self.max_megapixels = max_megapixels
        names = list_images(self.folder)
        if (self.folder / "dataset.json").is_file():
            self.class_names, labels = _labels_of_dataset_json(self.folder / "dataset.json", names)
        else:
            self.class_names, labels = _labels_of_subfolders(self.folder, names)
        # Arrays, not lists: millions of small objects would be copied into every loading process, one after another.
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels = np.array(labels, np.int64)
        self.class_counts = np.bincount(self.labels, minlength=len(self.class_names)).tolist()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, item: tuple[int, bool]) -> tuple[Tensor, int]:
        index, mirrored = item
        try:
            image = self.read(index)
        except ValueError as error:
            raise ValueError(f"{self.folder / self.name(index)} {error}") from error
        return image.flip(-1) if mirrored else image, int(self.labels[index])

    def read(self, index: int) -> Tensor:
        """uint8 (3, H, W). ValueError: the file cannot be read."""
        return read_image(self.folder / self.name(index), self.image_size, self.max_megapixels)

    def name(self, index: int) -> str:
        """Of an image, relative to the folder."""
        return os.fsdecode(self.names[index])

    def describe(self) -> dict:
        return {"kind": "images", "images": len(self), "image_size": self.image_size, "crop": CROP_RULE,
                "files": self.files_sha256()}

    def files_sha256(self) -> str:
        """Of all names, labels and class names: what makes an index mean the same image again."""
        digest = hashlib.sha256(json.dumps(list(self.class_names)).encode())
        for name in self.names:
            digest.update(name + b"\0")
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


def list_images(folder: Path) -> list[str]:
    """The names of all image files below a folder, relative to it, in the order of their bytes.

    Links are followed; what begins with a dot is left out. ValueError: there is no such folder, no image in it, or a
    link to a folder that holds it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    names = []
    for place, subfolders, files in os.walk(folder, followlinks=True, onerror=_raise):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for link in (Path(place, name) for name in subfolders):
            if link.is_symlink() and any(parent.resolve().is_relative_to(link.resolve()) for parent in link.parents):
                raise ValueError(f"{link} is a link to a folder that holds it: remove it")
        prefix = "" if place == str(folder) else os.path.relpath(place, folder) + os.sep
        names += [prefix + name for name in files
                  if not name.startswith(".") and _is_image(name)]
    if not names:
        raise ValueError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return sorted(names, key=os.fsencode)


def _raise(error: OSError):
    raise error


def _labels_of_subfolders(folder: Path, names: Sequence[str]) -> tuple[tuple[str, ...], list[int]]:
    classes = [name.split(os.sep)[0] if os.sep in name else "" for name in names]
    if (found := set(classes)) == {""}:
        return ("images",), [0] * len(names)
    if "" in found:
        stray = folder / names[classes.index("")]
        raise ValueError(f"{stray} lies beside class folders: move it into one of them")
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in found:
            raise ValueError(f"{entry} is a class without images: fill it or remove it")
    label = {name: index for index, name in enumerate(sorted(found))}
    readable = (os.fsencode(name).decode(errors="replace") for name in label)  # names that no picture could show
    return tuple(readable), [label[name] for name in classes]


def _labels_of_dataset_json(path: Path, names: Sequence[str]) -> tuple[tuple[str, ...], list[int]]:
    try:
        pairs = json.loads(path.read_bytes())["labels"]
        if pairs is None:
            return ("images",), [0] * len(names)
        labels = [(os.path.normpath(name), label) for name, label in pairs if _is_image(name)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is not {{"labels": [["folder/name.png", 3], ...]}} ({error})') from error
    for name, label in labels:
        if type(label) is not int or not 0 <= label < MOST_CLASSES:
            raise ValueError(f"{path} gives {name} the label {label!r}: labels are whole numbers from 0 to "
                             f"{MOST_CLASSES - 1}")
    for name, times in Counter(name for name, _ in set(labels)).items():
        if times > 1:
            raise ValueError(f"{path} gives {name} {times} different labels")
    labels, images = dict(labels), set(names)
    for missing, fault in (
        ([name for name in names if name not in labels], "gives no label to"),
        ([name for name in labels if name not in images], "labels images that are not there:"),
    ):
        if missing:
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"{path} {fault} {missing[0]}{others}")
    return tuple(map(str, range(max(labels.values()) + 1))), [labels[name] for name in names]


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
