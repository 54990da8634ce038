"""Interface of the places that hold image files, and the first of them, a folder."""

import functools
import hashlib
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn, Protocol

import numpy as np

from sit_atconv.runtime.files import sha256_of


class FileStore(Protocol):
    """Files by name, "/" between folders. Opened once, it is read by any number of threads and processes.

    Attributes:
        place: what the user named, for messages.
        only_images: True if all files are images, whatever their names.
    """

    place: str
    only_images: bool = False

    @abstractmethod
    def names(self, is_ignored: Callable[[str], bool]) -> Iterable[str]:
        """Yields the names of all files, without those whose own name or folder is ignored."""

    @abstractmethod
    def folders(self) -> Iterable[str]:
        """Yields the names of the folders that are not inside another one."""

    @abstractmethod
    def open(self, name: str) -> Path | BinaryIO:
        """Returns what Pillow can open. ValueError: the file is damaged."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Returns a file's content, or None if there is no such file."""

    def labels(self, names: Sequence[str]) -> tuple[tuple[str, ...], list[int]] | None:
        """Returns class names and the label of each file, or None if labels are in dataset.json or in folders."""
        return None

    def where(self, name: str) -> str:
        """Returns a file's place, for messages."""
        return f"{self.place}/{name}"

    def sha256(self, name: str) -> str:
        """Returns the digest of a file's content."""
        return hashlib.sha256(self.read(name) or b"").hexdigest()


class Folder(FileStore):
    """The files below a folder; links are followed.

    Raises:
        ValueError: no such folder.
    """

    def __init__(self, path: Path):
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder of images")
        self.path, self.place = path, str(path)

    def names(self, is_ignored: Callable[[str], bool]) -> Iterator[str]:
        """Yields the names as `FileStore` says. ValueError: a link to a folder that holds the link."""
        for place, subfolders, files in os.walk(self.path, followlinks=True, onerror=_raise):
            subfolders[:] = [name for name in subfolders if not is_ignored(name)]
            for link in filter(Path.is_symlink, (Path(place, name) for name in subfolders)):
                if any(parent.resolve().is_relative_to(link.resolve()) for parent in link.parents):
                    raise ValueError(f"{link} is a link to a folder that holds it: remove the link")
            prefix = "" if place == self.place else os.path.relpath(place, self.path) + os.sep
            yield from (prefix + name for name in files if not is_ignored(name))

    def folders(self) -> Iterator[str]:
        return (path.name for path in self.path.iterdir() if path.is_dir())

    def open(self, name: str) -> Path:
        return self.path / name

    def read(self, name: str) -> bytes | None:
        return (self.path / name).read_bytes() if (self.path / name).is_file() else None

    def sha256(self, name: str) -> str:
        return sha256_of(self.path / name)


class NameTable:
    """Names in the order of their bytes, in one array: millions of strings would take gigabytes.

    Args:
        names: distinct names.
    """

    def __init__(self, names: Sequence[str]):
        encoded = np.array([os.fsencode(name) for name in names], dtype=bytes)
        self.order = np.argsort(encoded, kind="stable")  # place of each sorted name among `names`
        self.sorted = encoded[self.order]

    def __iter__(self) -> Iterator[str]:
        return map(os.fsdecode, self.sorted)

    def find(self, names: Sequence[str]) -> np.ndarray:
        """Returns the place of each name among the names that were given, int64 (N,); -1 if it is not there."""
        if not len(self.sorted):
            return np.full(len(names), -1)
        keys = np.array([os.fsencode(name) for name in names], dtype=bytes)
        places = np.minimum(np.searchsorted(self.sorted, keys), len(self.sorted) - 1)
        return np.where(self.sorted[places] == keys, self.order[places], -1)

    def without(self, is_ignored: Callable[[str], bool]) -> Iterator[str]:
        """Yields the names that are not ignored themselves nor in an ignored folder."""

        @functools.cache  # a folder is asked for with each of its files
        def is_ignored_folder(folder: str) -> bool:
            return any(map(is_ignored, folder.split("/")))

        for name in self:
            folder, slash, file = name.rpartition("/")
            if not is_ignored(file) and not (slash and is_ignored_folder(folder)):
                yield name


def _raise(error: OSError) -> NoReturn:
    raise error
