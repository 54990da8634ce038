"""Lists of the files in zip archives.

zipfile makes an object of each file: for a million that takes more than ten seconds and a gigabyte. This reads what the
format says (APPNOTE 6.3, sections 4.3.12 to 4.3.16 and 4.5.3) into arrays.
"""

import os
import struct
import zipfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sit_atconv.data.archives import Archive, Members, tidy

PACKED = "packed {} by method {}, and images are read from stored or deflated files: pack it again with zip -0"
ENTRY = struct.Struct("<4s4xHH4xLLLHHH8xL")  # of a file in the list, without what is not needed
END = struct.Struct("<4sHHHxxLLH")  # the record that ends a zip archive
END_64, LOCATOR_SIZE = struct.Struct("<4sQHHLLQQQQ"), 20  # before that in large archives
LONGEST_COMMENT = 65_535
ENCRYPTED, UTF_8 = 0x1, 0x800  # flags of a file
IN_EXTRA = 0xFFFFFFFF  # stands for a number that is too large for 32 bits


def open_zip(path: Path) -> Archive:
    """Opens a zip archive. ValueError: it is damaged, encrypted or packed by a method that cannot be read."""
    names, rows = list[str](), array("q")
    try:
        with path.open("rb") as file:
            content, count, moved = _central_directory(file)
        for name, flags, method, checksum, size, offset in _entries(content, count):
            if name.endswith("/"):
                continue
            if flags & ENCRYPTED:
                raise ValueError(f"{path} is encrypted: pack it again without a password")
            if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{path} has {PACKED.format(name, method)}")
            names.append(tidy(name))
            rows.extend((0, offset + moved, size, method, checksum))
    except (struct.error, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no whole zip archive ({error}): copy or download it again") from error
    return Archive(str(path), [path], Members(names, np.array(rows, np.int64).reshape(-1, 5)))


def _central_directory(file: BinaryIO) -> tuple[bytes, int, int]:
    """Reads the list of files at the end of a zip archive.

    Returns:
        The list, the number of files in it, and what must be added to their offsets if other data precede the archive.

    Raises:
        zipfile.BadZipFile: there is no such list.
    """
    length = file.seek(0, os.SEEK_END)
    tail = min(length, END.size + LONGEST_COMMENT)
    file.seek(length - tail)
    content = file.read(tail)
    at = content.rfind(b"PK\x05\x06")
    if at < 0 or len(content) - at < END.size:
        raise zipfile.BadZipFile("it has no list of files at its end")
    count, size, offset = END.unpack_from(content, at)[3:6]
    ends = length - tail + at  # where the list ends
    if at >= LOCATOR_SIZE and content.startswith(b"PK\x06\x07", at - LOCATOR_SIZE):
        file.seek(ends - LOCATOR_SIZE - END_64.size)
        signature, *fields = END_64.unpack(file.read(END_64.size))
        if signature != b"PK\x06\x06":
            raise zipfile.BadZipFile("its list of more than 65,535 files or 4 GB is damaged")
        count, size, offset = fields[-3:]
        ends -= LOCATOR_SIZE + END_64.size
    start = ends - size
    if start < 0:
        raise zipfile.BadZipFile("its list of files is cut off")
    file.seek(start)
    return file.read(size), count, start - offset


def _entries(content: bytes, count: int) -> Iterator[tuple[str, int, int, int, int, int]]:
    """Yields name, flags, method, checksum, packed size and offset of each file in a central directory."""
    place = 0
    for _ in range(count):
        signature, flags, method, checksum, packed, size, name, extra, comment, offset = ENTRY.unpack_from(
            content, place
        )
        if signature != b"PK\x01\x02":
            raise zipfile.BadZipFile("its list of files is damaged")
        end = place + ENTRY.size + name
        text = content[place + ENTRY.size : end].decode("utf-8" if flags & UTF_8 else "cp437")
        if IN_EXTRA in (packed, size, offset):
            packed, offset = _long_numbers(content[end : end + extra], packed, size, offset)
        yield text, flags, method, checksum, packed, offset
        place = end + extra + comment


def _long_numbers(extra: bytes, packed: int, size: int, offset: int) -> tuple[int, int]:
    """Returns packed size and offset, with those of 64 bits read from the extra field."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            numbers = iter(struct.unpack_from(f"<{length // 8}Q", extra, 4))
            _, packed, offset = (next(numbers) if number == IN_EXTRA else number for number in (size, packed, offset))
            return packed, offset
        extra = extra[4 + length :]
    raise zipfile.BadZipFile("it lacks a file's size")
