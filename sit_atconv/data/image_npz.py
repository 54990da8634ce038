"""Images in an `.npz` in the format of the ADM evaluator: arr_0, uint8 (N, H, W, 3)."""

import math
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np

IMAGES = "arr_0"
DAMAGED = (  # errors of numpy and zipfile for damaged files, or for an array larger than the memory
    zipfile.BadZipFile, zlib.error, KeyError, OSError, EOFError, ValueError, MemoryError)


class ImageNpz:
    """An `.npz` opened for reading.

    Args:
        path: path of the file.

    Raises:
        ValueError: the file is not an `.npz`, or is damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} cannot be read as an .npz: it is not a zip archive, or is truncated")
        with zipfile.ZipFile(path) as archive:
            self.names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]

    def read(self, name: str) -> np.ndarray:
        """Reads an array into memory, without unpickling objects. ValueError: it is missing or damaged."""
        if name not in self.names:
            raise ValueError(f"{self.path} holds {self.names}, but no {name}")
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                return archive[name]
        except DAMAGED as error:
            raise ValueError(f"{name} of {self.path} cannot be read ({error})") from error

    def images(self) -> np.ndarray:
        """Returns arr_0: mapped from disk as `np.savez` stores it, read if compressed or column-major.

        Raises:
            ValueError: it is missing, damaged, or not uint8 (N, H, W, 3).
        """
        if IMAGES not in self.names:
            raise ValueError(f"{self.path} holds {self.names}, but no {IMAGES} with images, uint8 (N, H, W, 3)")
        try:
            with zipfile.ZipFile(self.path) as archive:
                member = archive.getinfo(f"{IMAGES}.npy")
                with archive.open(member) as file:
                    shape, is_fortran, dtype = _read_npy_header(file)
                    header_size = file.tell()
        except DAMAGED as error:
            raise ValueError(f"{self.path} cannot be read as an .npz ({error})") from error
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3:
            raise ValueError(f"{IMAGES} of {self.path} is {dtype} {shape}: images must be uint8 (N, H, W, 3); convert "
                             "x in [-1, 1] by (127.5 * x + 128).clip(0, 255).astype(np.uint8)")
        if member.compress_type != zipfile.ZIP_STORED or is_fortran:
            return np.ascontiguousarray(self.read(IMAGES))
        offset = _start_of_member(self.path, member) + header_size
        if offset + math.prod(shape) > self.path.stat().st_size:
            raise ValueError(f"{self.path} cannot be read as an .npz: {IMAGES} is truncated")
        return np.memmap(self.path, dtype, mode="r", offset=offset, shape=shape) if shape[0] else np.zeros(shape, dtype)


def write_npz(path: Path, images: Iterable[np.ndarray], shape: tuple[int, int, int, int], **arrays: np.ndarray) -> None:
    """Writes images, each uint8 (H, W, 3), as arr_0 of `shape`, holding one in memory, and other arrays."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
        with archive.open(f"{IMAGES}.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            written = 0
            for image in images:
                file.write(image.tobytes())
                written += image.size
        assert written == math.prod(shape), f"{written} pixels are not {shape}"


def _read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads shape, True if column-major, and dtype."""
    major, _ = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    return read(file)


def _start_of_member(path: Path, member: zipfile.ZipInfo) -> int:
    """Returns where a member's content begins: after its local header (30 bytes), name and extra field."""
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        name_size, extra_size = struct.unpack("<26x2H", file.read(30))
    return member.header_offset + 30 + name_size + extra_size
