"""Images in an `.npz` of the ADM evaluator: arr_0, uint8 (N, H, W, 3), read from disk as needed."""

import math
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

IMAGES = "arr_0"
DAMAGED = (  # raised by numpy and zipfile for a damaged file, or an array that is larger than the memory
    zipfile.BadZipFile,
    zlib.error,
    KeyError,
    OSError,
    EOFError,
    ValueError,
    MemoryError,
)


class ImageNpz:
    """Reader of an `.npz` file. ValueError: the file is not an `.npz`, or is damaged."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} cannot be read as an .npz: it is not a zip archive, or is cut short")
        with zipfile.ZipFile(path) as archive:
            self.names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]

    def read(self, name: str) -> np.ndarray:
        """Reads an array into memory, without unpickling objects. ValueError: it is missing or damaged."""
        if name not in self.names:
            raise ValueError(f"{self.path} holds {self.names} and no {name}")
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                return archive[name]
        except DAMAGED as error:
            raise ValueError(f"{name} of {self.path} cannot be read ({error})") from error

    def images(self) -> np.ndarray:
        """Returns arr_0 as a memory map; reads it into memory if it is compressed or in Fortran order.

        Raises:
            ValueError: arr_0 is missing, damaged, or not uint8 (N, H, W, 3).
        """
        if IMAGES not in self.names:
            raise ValueError(f"{self.path} holds {self.names} and no {IMAGES}, where images (uint8, N, H, W, 3) belong")
        try:
            with zipfile.ZipFile(self.path) as archive:
                member = archive.getinfo(f"{IMAGES}.npy")
                with archive.open(member) as file:
                    major, _ = npy.read_magic(file)
                    read_header = npy.read_array_header_1_0 if major == 1 else npy.read_array_header_2_0
                    shape, is_fortran, dtype = read_header(file)
                    header_size = file.tell()
        except DAMAGED as error:
            raise ValueError(f"{self.path} cannot be read as an .npz ({error})") from error
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3:
            raise ValueError(
                f"{IMAGES} of {self.path} is {dtype} {shape}: images must be uint8 (N, H, W, 3); for x in "
                "[-1, 1] that is (127.5 * x + 128).clip(0, 255).astype(np.uint8)"
            )
        if member.compress_type != zipfile.ZIP_STORED or is_fortran:
            return np.ascontiguousarray(self.read(IMAGES))
        with open(self.path, "rb") as file:  # the array follows a local header of 30 bytes, its name and an extra field
            file.seek(member.header_offset)
            name_size, extra_size = struct.unpack("<26x2H", file.read(30))
        offset = member.header_offset + 30 + name_size + extra_size + header_size
        if offset + math.prod(shape) > self.path.stat().st_size:
            raise ValueError(f"{self.path} cannot be read as an .npz: {IMAGES} is cut short")
        return np.memmap(self.path, dtype, mode="r", offset=offset, shape=shape) if shape[0] else np.zeros(shape, dtype)


def write_npz(path: Path, images: Iterable[np.ndarray], shape: tuple[int, int, int, int], **arrays: np.ndarray) -> None:
    """Writes images, uint8 (H, W, 3) each, as arr_0 with this shape, and `arrays` under their names.

    Holds one image at a time in memory.
    """
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                npy.write_array(file, np.asanyarray(array), allow_pickle=False)
        with archive.open(f"{IMAGES}.npy", "w", force_zip64=True) as file:
            npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            written = 0
            for image in images:
                file.write(image.tobytes())
                written += image.size
        assert written == math.prod(shape), f"{written} pixels are not {shape}"
