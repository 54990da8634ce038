"""Sets of images to be evaluated: a folder, an `.npz`, what `sample/generate.py` wrote, or the embedded digits."""

import json
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

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
        images: an array (N, H, W, 3) uint8, in memory or on disk, or N paths of images.
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
            yield torch.from_numpy(np.array(batch)).permute(0, 3, 1, 2)


def open_image_set(source: str) -> ImageSet:
    """The images that a path, or the word "digits", stands for.

    Args:
        source: a folder of images; an `.npz` with `arr_0` uint8 (N, H, W, 3); a folder that `sample/generate.py`
            wrote (its samples.npz, or else its images/, and never the grid picture); or "digits", scikit-learn's 1,797
            as RGB.

    Raises:
        ValueError: nothing readable is there, or the array is of another kind; the message says what was expected.
    """
    path = Path(source)
    if source == "digits":
        return ImageSet(source, np.repeat(load_digits()[0][..., None], 3, axis=-1))
    if (path / "manifest.json").is_file() and (path / "images").is_dir():
        if not json.loads((path / "manifest.json").read_text()).get("complete"):
            raise ValueError(f"the samples in {path} are not complete: run the same sample/generate.py again")
        npz = path / "samples.npz"
        return ImageSet(source, _open_npz(npz) if npz.exists() else find_images(path / "images"))
    if path.is_dir():
        return ImageSet(source, find_images(path))
    if path.is_file():
        return ImageSet(source, _open_npz(path))
    raise ValueError(f"{source} does not exist: give a folder of images, an .npz with arr_0, or the word digits")


def _open_npz(path: Path) -> np.ndarray:
    """arr_0, left on disk where it is stored as it is (`np.savez`); a compressed one is read into memory."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} cannot be read as an .npz: it is no zip archive, or cut short")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if "arr_0" not in names:
                raise ValueError(f"{path} holds {names} and no arr_0, where images (uint8, N, H, W, 3) belong")
            member = archive.getinfo("arr_0.npy")
            with archive.open(member) as file:
                shape, is_fortran, dtype = _read_npy_header(file)
                header_size = file.tell()
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3:
            raise ValueError(f"arr_0 of {path} is {dtype} {shape}: images must be uint8 (N, H, W, 3)")
        if member.compress_type != zipfile.ZIP_STORED or is_fortran:
            with np.load(path, allow_pickle=False) as archive:
                return archive["arr_0"]
        offset = _start_of_member(path, member) + header_size
        return np.memmap(path, dtype, mode="r", offset=offset, shape=shape)
    except (zipfile.BadZipFile, zlib.error, KeyError, OSError, EOFError) as error:  # damaged within
        raise ValueError(f"{path} cannot be read as an .npz ({error})") from error


def _read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and dtype."""
    major, _ = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    return read(file)


def _start_of_member(path: Path, member: zipfile.ZipInfo) -> int:
    """Where the content of a stored member begins: behind its local header of 30 bytes, name and extra field."""
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        name_size, extra_size = struct.unpack("<26x2H", file.read(30))
    return member.header_offset + 30 + name_size + extra_size


def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as file:
            return np.array(file.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
