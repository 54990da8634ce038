"""The table of places from which images can be read."""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from sit_atconv.data.data_source import InMemory
from sit_atconv.data.digits import Digits
from sit_atconv.data.file_store import FileStore, Folder
from sit_atconv.data.hugging_face import HuggingFaceImages
from sit_atconv.data.idx import IdxImages
from sit_atconv.data.tar_archives import TarArchives
from sit_atconv.data.zip_archives import ZipArchive
from sit_atconv.runtime.commands import warn_if_hidden


class InMemoryFiles(FileStore):
    """The images of a source that holds all of them, as files for `encode.py`."""

    only_images = True

    def __init__(self, place: str, source: InMemory):
        self.place, self.source = place, source

    def names(self, is_ignored: Callable[[str], bool]) -> Iterator[str]:
        return (f"{index:08d}" for index in range(len(self.source)))

    def folders(self) -> Iterable[str]:
        return ()

    def open(self, name: str) -> io.BytesIO:
        return io.BytesIO(self.read(name))

    def read(self, name: str) -> bytes:
        image, _ = self.source[int(name), False]  # (1, H, W)
        _, height, width = image.shape
        return b"P5 %d %d 255\n" % (width, height) + image.numpy().tobytes()  # a PGM file

    def labels(self, names: Sequence[str]) -> tuple[tuple[str, ...], list[int]]:
        return tuple(self.source.class_names), [int(self.source.labels[int(name)]) for name in names]


# Named by NAME or NAME:...; anything else is a folder or an archive, see `ARCHIVES`.
STORES: dict[str, Callable[[str], FileStore]] = {
    "digits": lambda name: InMemoryFiles(name, Digits()),
    "idx:": lambda name: InMemoryFiles(name, IdxImages(name.removeprefix("idx:"), keep_empty_classes=True)),
    "wids:": lambda name: TarArchives(name.removeprefix("wids:")),
    "hf:": HuggingFaceImages,
}
# Suffix of an archive -> its store, of the path and of a folder in the archive.
ARCHIVES: dict[str, Callable[[Path, str], FileStore]] = {
    ".zip": ZipArchive,
    ".tar": lambda path, folder: TarArchives(str(path), folder),
}


def kind_of(name: str) -> str:
    """Returns the beginning of a name that may be a key of `STORES`."""
    return "".join(name.partition(":")[:2])


def archive_of(path: Path) -> tuple[Path, str] | None:
    """Splits ARCHIVE/FOLDER into archive and folder; None if no part of the path is an archive."""
    for parent in (path, *path.parents):
        if parent.suffix.lower() in ARCHIVES and not parent.is_dir():
            folder = str(path.relative_to(parent))
            return parent, "" if folder == "." else folder
    return None


def open_store(place: str | Path) -> FileStore:
    """Opens a folder, a .zip or .tar archive or a folder in it, wids:PLACE, hf:NAME, idx:PLACE or digits.

    Raises:
        ValueError: nothing there can be read as such; the message names it.
    """
    name, path = str(place), Path(place)
    if kind_of(name) in STORES:
        warn_if_hidden("images", name)
        return STORES[kind_of(name)](name)
    if found := archive_of(path):
        archive, folder = found
        if not archive.is_file():
            raise ValueError(f"there is no file {archive}")
        return ARCHIVES[archive.suffix.lower()](archive, folder)
    return Folder(path)
