"""Zip archives of images.

zipfile makes an object of each file: for a million that takes more than ten seconds and a gigabyte. This reads what the
format says (APPNOTE 6.3, sections 4.3.7, 4.3.12 to 4.3.16 and 4.5.3) into arrays.
"""

import os
import struct
import zipfile
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sit_atconv.data.archives import Archive, below, check_top, read_bytes, tidy

PACKED = "packed {} by method {}, and images are read from stored or deflated files: pack it again with zip -0"
LOCAL_HEADER = struct.Struct("<4s22xHH")  # before a file's content: signature, lengths of name and extra field
ENTRY = struct.Struct("<4s4xHH4xLLLHHH8xL")  # of a file in the list, without what is not needed
END = struct.Struct("<4sHHHxxLLH")  # the record that ends a zip archive
END_64, LOCATOR_SIZE = struct.Struct("<4sQHHLLQQQQ"), 20  # before that in large archives
LONGEST_COMMENT = 65_535
ENCRYPTED, UTF_8 = 0x1, 0x800  # flags of a file
IN_EXTRA = 0xFFFFFFFF  # stands for a number that is too large for 32 bits


class ZipArchive(Archive):
    """The files in a zip archive, stored or deflated.

    Args:
        path: the archive.
        folder: folder in it whose files are wanted; "" is the whole archive.

    Raises:
        ValueError: it is damaged, encrypted or packed by a method that cannot be read, or the folder is not in it.
    """

    def __init__(self, path: Path, folder: str = ""):
        self.path = path
        names, folders, rows = list[str](), list[str](), array("q")
        try:
            with path.open("rb") as file:
                content, count, moved = _file_list(file)
            for name, flags, method, checksum, size, offset in _entries(content, count):
                if name.endswith(("/", "\\")):
                    folders.append(tidy(name))
                    continue
                if flags & ENCRYPTED:
                    raise ValueError(f"{path} is encrypted: pack it again without a password")
                if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError(f"{path} has {PACKED.format(name, method)}")
                names.append(tidy(name))
                rows.extend((offset + moved, size, method, checksum))
        except (struct.error, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no whole zip archive ({error}): copy or download it again") from error
        wanted = below(names, folder)
        kept = np.array([name is not None for name in wanted], bool)
        self.rows = np.array(rows, np.int64).reshape(-1, 4)[kept]  # offset of the header, size, method, CRC-32
        place = f"{path}/{folder}" if folder else str(path)
        inside = [name for name in wanted if name is not None]
        check_top(place, inside)
        super().__init__(place, inside, filter(None, below(folders, folder)))

    def read_at(self, place: int) -> bytes:
        offset, size, method, checksum = self.rows[place].tolist()
        signature, *lengths = LOCAL_HEADER.unpack(read_bytes(self.path, offset, LOCAL_HEADER.size))
        damaged = f"cannot be read as an image: {self.path} is damaged there"
        if signature != b"PK\x03\x04":
            raise ValueError(f"{damaged}, or has changed")
        content = read_bytes(self.path, offset + LOCAL_HEADER.size + sum(lengths), size)
        try:
            unpacked = zlib.decompress(content, wbits=-15) if method == zipfile.ZIP_DEFLATED else content
        except zlib.error as error:
            raise ValueError(f"{damaged} ({error})") from error
        if zlib.crc32(unpacked) != checksum:
            raise ValueError(f"{damaged} (wrong checksum)")
        return unpacked


def _file_list(file: BinaryIO) -> tuple[bytes, int, int]:
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
    """Yields name, flags, method, checksum, packed size and offset of each file in the list.

    zipfile.BadZipFile: the list is damaged, or has another number of files, of which some tools keep 16 bits only.
    """
    place = found = 0
    while place < len(content):
        signature, flags, method, checksum, packed, size, name, extra, comment, offset = ENTRY.unpack_from(
            content, place
        )
        end = place + ENTRY.size + name
        place, found = end + extra + comment, found + 1
        if signature != b"PK\x01\x02" or place > len(content):
            raise zipfile.BadZipFile("its list of files is damaged")
        text = _decoded(content[end - name : end], is_utf_8=bool(flags & UTF_8))
        if IN_EXTRA in (packed, size, offset):
            packed, offset = _long_numbers(content[end : end + extra], packed, size, offset)
        yield text, flags, method, checksum, packed, offset
    if (found - count) % 2**16:
        raise zipfile.BadZipFile(f"its list has {found} files, and its end says {count}")


def _decoded(name: bytes, is_utf_8: bool) -> str:
    """Returns a name as text; without the flag it is UTF-8 (Info-ZIP on Linux) or else of DOS."""
    if is_utf_8:
        return os.fsdecode(name)
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.decode("cp437")


def _long_numbers(extra: bytes, packed: int, size: int, offset: int) -> tuple[int, int]:
    """Returns packed size and offset, with those of 64 bits read from the extra field."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            numbers = list(struct.unpack_from(f"<{length // 8}Q", extra, 4))
            if len(numbers) < (size, packed, offset).count(IN_EXTRA):
                break
            _, packed, offset = (numbers.pop(0) if number == IN_EXTRA else number for number in (size, packed, offset))
            return packed, offset
        extra = extra[4 + length :]
    raise zipfile.BadZipFile("it lacks a file's size")
