"""Files in archives, by random access and without unpacking."""

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sit_atconv.data.file_store import FileStore, NameTable
from sit_atconv.runtime.names import show_some

LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a file in a zip archive: signature, lengths of name and extra field


@dataclass(frozen=True)
class Members:
    """The files of an archive, or of several: a row for each.

    Args:
        names: paths, relative and with "/".
        columns: int64 (N, 5) for each file: place of its archive among the archives; first byte of its content, in a
            zip archive of the header before it; bytes there; `zipfile.ZIP_STORED` or `zipfile.ZIP_DEFLATED`; CRC-32
            of the unpacked content, or -1 if the archive has none.
        labels: number in the file KEY.cls, or in KEY.json under "label", for each KEY.
    """

    names: list[str]
    columns: np.ndarray
    labels: dict[str, int] = field(default_factory=dict)


class Archive(FileStore):
    """The files in a zip archive, or in tar archives together.

    Args:
        place: what the user named.
        paths: the archives.
        members: their files.

    Raises:
        ValueError: two files have the same name.
    """

    def __init__(self, place: str, paths: Sequence[Path], members: Members):
        self.place, self.paths = place, list(paths)
        self.table = NameTable(members.names)
        twins = self.table.sorted[1:][self.table.sorted[1:] == self.table.sorted[:-1]]
        if len(twins):
            raise ValueError(
                f"{place} holds {len(twins)} names twice ({show_some([os.fsdecode(name) for name in twins[:3]])}): "
                "remove one of each"
            )
        self.columns = members.columns
        self.label_of_key = NameTable(list(members.labels))
        self.label_values = np.array(list(members.labels.values()), np.int64)

    def names(self, is_ignored: Callable[[str], bool]) -> Iterator[str]:
        return self.table.without(is_ignored)

    def folders(self) -> Iterable[str]:
        return dict.fromkeys(name.split("/")[0] for name in self.table if "/" in name)

    def open(self, name: str) -> io.BytesIO:
        content = self.read(name)
        if content is None:
            raise ValueError(f"is not in {self.place}")
        return io.BytesIO(content)

    def read(self, name: str) -> bytes | None:
        (place,) = self.table.find([name])
        return None if place < 0 else self._read(place)

    def _read(self, place: int) -> bytes:
        archive, offset, size, method, checksum = self.columns[place].tolist()
        path = self.paths[archive]
        with path.open("rb", buffering=0) as file:  # opened anew: an open one could not be shared by processes
            file.seek(offset)
            if checksum >= 0:
                signature, *lengths = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size).ljust(LOCAL_HEADER.size))
                if signature != b"PK\x03\x04":
                    raise ValueError(f"cannot be read as an image: {path} is damaged there, or has changed")
                file.seek(sum(lengths), os.SEEK_CUR)
            content = file.read(size)
        if len(content) < size:
            raise ValueError(f"cannot be read as an image: {path} ends before it")
        if checksum < 0:
            return content
        try:
            unpacked = zlib.decompress(content, wbits=-15) if method else content
        except zlib.error as error:
            raise ValueError(f"cannot be read as an image: {path} is damaged there ({error})") from error
        if zlib.crc32(unpacked) != checksum:
            raise ValueError(f"cannot be read as an image: {path} is damaged there (wrong checksum)")
        return unpacked

    def labels(self, names: Sequence[str]) -> tuple[tuple[str, ...], list[int]] | None:
        """Returns the labels that WebDataset archives hold as KEY.cls or KEY.json, or None if they hold none.

        Raises:
            ValueError: only some images have a label.
        """
        if not len(self.label_values):
            return None
        found = self.label_of_key.find([key_of(name) for name in names])
        if lacking := [names[place] for place in np.flatnonzero(found < 0).tolist()]:
            raise ValueError(f"{self.place} has no label (KEY.cls) for {len(lacking)} images: {show_some(lacking, 3)}")
        labels = self.label_values[found].tolist()
        return tuple(map(str, range(max(labels) + 1))), labels


def tidy(name: str) -> str:
    """Returns a path without "." and ".." parts."""
    istidy = not ("./" in name or "//" in name or name.startswith("/"))
    return name if istidy else os.path.normpath(name).lstrip("/")


def key_of(name: str) -> str:
    """Returns the name up to the first dot after its folders, as WebDataset groups files."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]
