"""Sets of images to be evaluated: a folder, an `.npz`, what `sample/generate.py` wrote, or the embedded digits."""

import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sit_atconv.data.images import find_images, load_digits


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, read batch by batch.

    Args:
        name: what the user called it.
        images: an array (N, H, W, 3) uint8, or N paths of images.
    """

    name: str
    images: np.ndarray | Sequence[Path]

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """uint8 (B, 3, H, W). Raises ValueError for an unreadable image or one of another size than the first."""
        expected = None
        for start in range(0, len(self), batch_size):
            batch = self.images[start : start + batch_size]
            if not isinstance(batch, np.ndarray):
                pictures = [_read(path) for path in batch]
                expected = expected or pictures[0].shape
                for path, picture in zip(batch, pictures, strict=True):
                    if picture.shape != expected:
                        (h, w, _), (h0, w0, _) = picture.shape, expected
                        raise ValueError(f"{path} is {h}x{w}, and those before it {h0}x{w0}: give images of one size")
                batch = np.stack(pictures)
            yield torch.from_numpy(np.ascontiguousarray(batch)).permute(0, 3, 1, 2)


def open_image_set(source: str) -> ImageSet:
    """The images that a path, or the word "digits", stands for.

    Args:
        source: a folder of images; an `.npz` with `arr_0` uint8 (N, H, W, 3); a folder that `sample/generate.py`
            wrote (its images, not the grid picture); or "digits", scikit-learn's 1,797 as RGB.

    Raises:
        ValueError: nothing readable is there, or the array is of another kind; the message says what was expected.
    """
    path = Path(source)
    if source == "digits":
        return ImageSet(source, np.repeat(load_digits()[0][..., None], 3, axis=-1))
    if path.is_dir() and (path / "manifest.json").is_file():
        if not json.loads((path / "manifest.json").read_text()).get("complete"):
            raise ValueError(f"the samples in {path} are not complete: run the same sample/generate.py again")
        return ImageSet(source, _read_npz(path / "samples.npz"))
    if path.is_dir():
        return ImageSet(source, find_images(path))
    if path.is_file():
        return ImageSet(source, _read_npz(path))
    raise ValueError(f"{source} does not exist: give a folder of images, an .npz with arr_0, or the word digits")


def _read_npz(path: Path) -> np.ndarray:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} cannot be read as an .npz: it is no zip archive, or cut short")
    try:
        with np.load(path, allow_pickle=False) as archive:
            if "arr_0" not in archive.files:
                raise ValueError(f"{path} holds {archive.files} and no arr_0, where images (uint8, N, H, W, 3) belong")
            images = archive["arr_0"]
    except (zipfile.BadZipFile, OSError, EOFError) as error:  # damaged within
        raise ValueError(f"{path} cannot be read as an .npz ({error})") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"arr_0 of {path} is {images.dtype} {images.shape}: images must be uint8 (N, H, W, 3)")
    return images


def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as file:
            return np.array(file.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
