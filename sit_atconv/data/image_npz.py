"""Images in an `.npz` as the ADM evaluator reads and writes them: arr_0, uint8 (N, H, W, 3), left on disk."""

import math
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np

IMAGES = "arr_0"
DAMAGED = (  # what numpy and zipfile raise then, or for an array that is larger than the memory
    zipfile.BadZipFile, zlib.error, KeyError, OSError, EOFError, ValueError, MemoryError)


class ImageNpz:
    """An `.npz` opened for reading.

    Args:
        path: of the file.

    Raises:
        ValueError: it is no `.npz`, or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} cannot be read as an .npz: it is no zip archive, or cut short")
        with zipfile.ZipFile(path) as archive:
            self.names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]

    def read(self, name: str) -> np.ndarray:
        """An array that fits into memory. ValueError: it is not there, or damaged; objects are not unpickled."""
        if name not in self.names:
            raise ValueError(f"{self.path} holds {self.names} and no {name}")
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                return archive[name]
        except DAMAGED as error:
            raise ValueError(f"{name} of {self.path} cannot be read ({error})") from error

    def images(self) -> np.ndarray:
        """arr_0, on disk if it is stored as `np.savez` does; a compressed one, or one in Fortran's order, in memory.

        Raises:
            ValueError: it is not there, damaged, or of another kind than uint8 (N, H, W, 3).
        """
        if IMAGES not in self.names:
            raise ValueError(f"{self.path} holds {self.names} and no {IMAGES}, where images (uint8, N, H, W, 3) belong")
        try:
            with zipfile.ZipFile(self.path) as archive:
                member = archive.getinfo(f"{IMAGES}.npy")
                with archive.open(member) as file:
                    shape, is_fortran, dtype = _read_npy_header(file)
                    header_size = file.tell()
        except DAMAGED as error:
            raise ValueError(f"{self.path} cannot be read as an .npz ({error})") from error
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3:
            raise ValueError(f"{IMAGES} of {self.path} is {dtype} {shape}: images must be uint8 (N, H, W, 3); for x in "
                             "[-1, 1] that is (127.5 * x + 128).clip(0, 255).astype(np.uint8)")
        if member.compress_type != zipfile.ZIP_STORED or is_fortran:
            return np.ascontiguousarray(self.read(IMAGES))
        offset = _start_of_member(self.path, member) + header_size
        if offset + math.prod(shape) > self.path.stat().st_size:
            raise ValueError(f"{self.path} cannot be read as an .npz: {IMAGES} is cut short")
        return np.memmap(self.path, dtype, mode="r", offset=offset, shape=shape) if shape[0] else np.zeros(shape, dtype)


def write_npz(path: Path, images: Iterable[np.ndarray], shape: tuple[int, int, int, int], **arrays: np.ndarray) -> None:
    """Writes images, uint8 (H, W, 3) one after another, as arr_0 (`shape` in all), and smaller arrays beside them.

    Memory holds one image at a time, whatever their number.
    """
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
