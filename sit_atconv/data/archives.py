"""Files in archives, by random access and without unpacking."""

import io
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from sit_atconv.data.file_store import FileStore, NameTable
from sit_atconv.runtime.names import show_some


class Archive(FileStore):
    """The files in one archive, or in several together.

    Args:
        place: what the user named.
        names: paths of the files, relative and with "/".
        folders: paths of the folders that the archive lists, which may be empty.

    Raises:
        ValueError: two files have the same name.
    """

    def __init__(self, place: str, names: Sequence[str], folders: Iterable[str] = ()):
        self.place = place
        self.table = NameTable(names)
        self._folders = dict.fromkeys(path.split("/")[0] for path in folders)
        twins = self.table.sorted[1:][self.table.sorted[1:] == self.table.sorted[:-1]]
        if len(twins):
            raise ValueError(
                f"{place} holds {len(twins)} names twice ({show_some([os.fsdecode(name) for name in twins[:3]])}): "
                "remove one of each"
            )

    def names(self, is_ignored: Callable[[str], bool]) -> Iterator[str]:
        return self.table.without(is_ignored)

    def folders(self) -> Iterable[str]:
        return self._folders | dict.fromkeys(name.split("/")[0] for name in self.table if "/" in name)

    def open(self, name: str) -> io.BytesIO:
        content = self.read(name)
        if content is None:
            raise ValueError(f"is not in {self.place}")
        return io.BytesIO(content)

    def read(self, name: str) -> bytes | None:
        (place,) = self.table.find([name]).tolist()
        return None if place < 0 else self.read_at(place)

    @abstractmethod
    def read_at(self, place: int) -> bytes:
        """Returns the content of a file, by its place among `names`. ValueError: it is damaged."""


def read_bytes(path: Path, offset: int, size: int) -> bytes:
    """Reads a part of a file, which is opened anew, since processes could not share an open one.

    ValueError: it ends before that.
    """
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise ValueError(f"cannot be read as an image: {path} ends before it")
    return content


def tidy(path: str) -> str:
    """Returns a path with "/" between folders, without "." and ".." in it."""
    if "\\" in path and "/" not in path:  # written by old tools on Windows
        path = path.replace("\\", "/")
    if "./" in path or "//" in path or path.startswith("/"):
        path = os.path.normpath(f"/{path}")[1:].lstrip("/")
    return path


def below(paths: Iterable[str], folder: str) -> list[str | None]:
    """Returns each path relative to a folder in an archive, None if it is elsewhere; "" is everything."""
    if not folder:
        return list(paths)
    prefix = f"{folder}/"
    return [path.removeprefix(prefix) if path.startswith(prefix) else None for path in paths]


def check_top(place: str, names: Sequence[str]) -> None:
    """Raises a ValueError if everything is in one folder that holds folders, or a dataset.json."""
    tops = {name.partition("/")[0] for name in names}
    if len(tops) != 1 or not names or not all("/" in name for name in names):
        return
    (top,) = tops
    inside = [name.partition("/")[2] for name in names]
    if "dataset.json" in inside or any("/" in name for name in inside):
        raise ValueError(f"{place} holds everything in one folder, {top}: give {place}/{top} to read what is in it")
