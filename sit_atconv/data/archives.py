"""Files in zip and tar archives, those of WebDataset too, by random access and without unpacking.

A zip archive lists its files at its end. A tar archive has no list, so it is read once from beginning to end, and the
list is kept in the user's cache folder for as long as the archive has the same size and time.
"""

import glob
import hashlib
import io
import json
import os
import re
import struct
import sys
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NoReturn

import numpy as np
from tqdm import tqdm

from sit_atconv.data.file_store import FileStore, NameTable
from sit_atconv.data.image_rules import MOST_CLASSES
from sit_atconv.runtime.files import write_aside
from sit_atconv.runtime.names import show_some

LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a file in a zip archive: signature, lengths of name and extra field
PACKED = "packed {} by method {}, and images are read from stored or deflated files: pack it again with zip -0"
ENTRY = struct.Struct("<4s4xHH4xLLLHHH8xL")  # of a file in the central directory, without what is not needed
END = struct.Struct("<4sHHHxxLLH")  # the record that ends a zip archive
END_64, LOCATOR_SIZE = struct.Struct("<4sQHHLLQQQQ"), 20  # before that in large archives
LONGEST_COMMENT = 65_535
ENCRYPTED, UTF_8 = 0x1, 0x800  # flags of a file
IN_EXTRA = 0xFFFFFFFF  # number that is too large for 32 bits
BLOCK = 512  # bytes; a tar archive is a row of these, and ends with two of zeros
CACHE = "SIT_ATCONV_CACHE"  # environment variable with the folder of lists of tar archives
FORMAT = 1  # of those lists


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
        found = self.label_of_key.find([_key_of(name) for name in names])
        if lacking := [names[place] for place in np.flatnonzero(found < 0).tolist()]:
            raise ValueError(f"{self.place} has no label (KEY.cls) for {len(lacking)} images: {show_some(lacking, 3)}")
        labels = self.label_values[found].tolist()
        return tuple(map(str, range(max(labels) + 1))), labels


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
            names.append(_tidy(name))
            rows.extend((0, offset + moved, size, method, checksum))
    except (struct.error, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no whole zip archive ({error}): copy or download it again") from error
    return Archive(str(path), [path], Members(names, np.array(rows, np.int64).reshape(-1, 5)))


def _central_directory(file: BinaryIO) -> tuple[bytes, int, int]:
    """Reads the list of files at the end of a zip archive (APPNOTE 6.3, sections 4.3.12 to 4.3.16).

    (zipfile makes an object of each file: for a million that takes more than ten seconds and a gigabyte.)

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
    """Returns packed size and offset, with those of 64 bits read from the extra field (section 4.5.3)."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            numbers = iter(struct.unpack_from(f"<{length // 8}Q", extra, 4))
            _, packed, offset = (next(numbers) if number == IN_EXTRA else number for number in (size, packed, offset))
            return packed, offset
        extra = extra[4 + length :]
    raise zipfile.BadZipFile("it lacks a file's size")


def open_tars(place: str) -> Archive:
    """Opens tar archives by their path, folder, pattern (train-{000..099}.tar, *.tar) or index of `wids`.

    Raises:
        ValueError: there are none, or one is truncated, compressed, or not as long as the index says.
    """
    paths, counts = _find_tars(place)
    progress = tqdm(total=len(paths), unit="archive", desc="listing", delay=5, file=sys.stderr)
    several = [_list_tar(path, progress) for path in paths]
    progress.close()
    keys = [{_key_of(name) for name in one["names"]} for one in several]
    for path, found, count in zip(paths, keys, counts, strict=True):
        if count is not None and len(found) != count:
            raise ValueError(f"{path} holds {len(found)} samples, and {place} says {count}: copy or download it again")
    are_distinct = sum(map(len, keys)) == len(set().union(*keys))
    names, columns, labels = list[str](), list[np.ndarray](), dict[str, int]()
    for number, (path, one) in enumerate(zip(paths, several, strict=True)):
        prefix = "" if are_distinct else f"{path.stem}/"  # some tools number the samples anew in each archive
        names += [prefix + name for name in one["names"]]
        labels |= {prefix + key: label for key, label in one["labels"].items()}
        rows = np.zeros((len(one["names"]), 5), np.int64)
        rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 4] = number, one["offsets"], one["sizes"], -1
        columns.append(rows)
    return Archive(place, paths, Members(names, np.concatenate(columns), labels))


def _find_tars(place: str) -> tuple[list[Path], list[int | None]]:
    """Returns the archives in order, and the number of samples in each, None if unknown."""
    path = Path(place)
    if path.suffix == ".json":
        try:
            entries = json.loads(path.read_bytes())["shardlist"]
            paths = [path.parent / entry["url"] for entry in entries]
            counts = [int(entry["nsamples"]) for entry in entries]
        except FileNotFoundError as error:
            raise ValueError(f"there is no file {place}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            form = '{"shardlist": [{"url": "train-000.tar", "nsamples": 1000}]}'
            raise ValueError(f"{place} is no index of wids, {form}") from error
        if missing := [str(found) for found in paths if not found.is_file()]:
            raise ValueError(f"{place} lists {len(missing)} archives that do not exist: {show_some(missing, 3)}")
        return paths, list(counts)
    if path.is_dir():
        paths = sorted(path.glob("*.tar"))
    else:
        paths = sorted(Path(found) for pattern in _unfold(place) for found in glob.glob(pattern))
    if not paths:
        raise ValueError(f"{place} names no tar archives: give a folder, 'train-{{000..099}}.tar' or an index.json")
    return paths, [None] * len(paths)


def _unfold(pattern: str) -> list[str]:
    """Returns the names that a{08..10}b stands for."""
    if not (match := re.search(r"\{(\d+)\.\.(\d+)\}", pattern)):
        return [pattern]
    first, last = match.groups()
    numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    return [text for n in numbers for text in _unfold(pattern[: match.start()] + n + pattern[match.end() :])]


def _list_tar(path: Path, progress: tqdm) -> dict:
    """Returns names, offsets and sizes of the files in a tar archive, and its labels; cached if it can be."""
    status = path.stat()
    key = json.dumps([FORMAT, str(path.resolve()), status.st_size, status.st_mtime_ns])
    cache = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "sit_atconv") / "archives"
    stored = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    try:
        listed = json.loads(stored.read_bytes())
    except (OSError, ValueError):
        listed = _scan_tar(path)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            write_aside(stored, json.dumps(listed), writer=f"{os.getpid()}")
        except OSError as error:
            progress.write(f"the list of {path} is not kept ({error}): set {CACHE} to a folder", file=sys.stderr)
    progress.update()
    return listed


def _scan_tar(path: Path) -> dict:
    names, offsets, sizes = list[str](), list[int](), list[int]()
    links, labels = dict[str, str](), dict[str, int]()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = _tidy(member.name)
                if member.islnk() or member.issym():
                    target = member.linkname if member.islnk() else f"{PurePosixPath(name).parent}/{member.linkname}"
                    links[name] = _tidy(target)
                elif member.isfile():
                    label = None
                    if name.endswith((".cls", ".json")):
                        content = tar.extractfile(member).read()  # type: ignore[union-attr]
                        label = _label_in(content, f"{path}/{name}")
                    if label is None:
                        names.append(name)
                        offsets.append(member.offset_data)
                        sizes.append(member.size)
                    elif labels.setdefault(_key_of(name), label) != label:
                        raise ValueError(f"{path} gives {_key_of(name)} the labels {labels[_key_of(name)]} and {label}")
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
            end = tar.offset
    except tarfile.ReadError as error:
        raise ValueError(
            f"{path} is no whole, uncompressed tar archive ({error}): copy it again, or unpack .gz and the like"
        ) from error
    with path.open("rb") as file:
        file.seek(end)
        if len(rest := file.read(BLOCK)) < BLOCK or any(rest):
            _refuse_truncated(path)
    if names and offsets[-1] + sizes[-1] > path.stat().st_size:
        _refuse_truncated(path)
    place = {name: i for i, name in enumerate(names)}
    for name, target in links.items():
        if target not in place:
            raise ValueError(f"{path} holds {name}, a link to {target}, which it does not hold: pack it without links")
        names.append(name)
        offsets.append(offsets[place[target]])
        sizes.append(sizes[place[target]])
    return {"names": names, "offsets": offsets, "sizes": sizes, "labels": labels}


def _refuse_truncated(path: Path) -> NoReturn:
    raise ValueError(f"{path} is truncated: it does not end as a tar archive ends. Copy or download it again")


def _label_in(content: bytes, where: str) -> int | None:
    """Returns the label in KEY.cls or KEY.json. ValueError: it is not a whole number."""
    try:
        found = json.loads(content) if content.strip() else None
    except ValueError:
        found = content[:20]
    if isinstance(found, dict):
        if "label" not in found:
            return None
        found = found["label"]
    elif where.endswith(".json"):
        return None  # not the record of a sample
    if type(found) is not int or not 0 <= found < MOST_CLASSES:
        raise ValueError(f"{where} gives the label {found!r}: labels are whole numbers from 0 to {MOST_CLASSES - 1}")
    return found


def _key_of(name: str) -> str:
    """Returns the name up to the first dot after its folders, as WebDataset groups files."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _tidy(name: str) -> str:
    """Returns a path without "." and ".." parts."""
    is_tidy = not ("./" in name or "//" in name or name.startswith("/"))
    return name if is_tidy else os.path.normpath(name).lstrip("/")
