"""Tar archives of images, those of WebDataset too.

A tar archive has no list, so each process reads it once from beginning to end, and the list is kept in the user's cache
folder for as long as the archive has the same size and time.
"""

import glob
import hashlib
import json
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from sit_atconv.data.archives import Archive, below, check_top, read_bytes, tidy
from sit_atconv.data.file_store import NameTable
from sit_atconv.data.image_rules import ALL_RULES, MOST_CLASSES, RULES
from sit_atconv.runtime.files import write_aside
from sit_atconv.runtime.names import show_some

BLOCK = 512  # bytes; a tar archive is a row of these, and ends with two or more of zeros
LONGEST_END = 2**20  # bytes of zeros: the largest usual record, to which tools fill the last one
CACHE = "SIT_ATCONV_CACHE"  # environment variable with the folder of lists of tar archives
FORMAT = 2  # of those lists
LISTED = ("names", "offsets", "sizes", "labels", "folders")
LABELS = (".cls", ".json")  # suffixes of files with a label in a WebDataset


class TarArchives(Archive):
    """The files in one tar archive or several, with the labels of a WebDataset if they hold some.

    Args:
        place: what the user named: an archive, a folder of them, a pattern (train-{000..099}.tar, *.tar), or an index
            of `wids`.
        folder: folder in the archive whose files are wanted; "" is everything.

    Raises:
        ValueError: there are none, or one is missing, truncated, compressed, sparse, followed by other data, or not as
            long as the index says.
    """

    def __init__(self, place: str, folder: str = ""):
        self.paths, counts = _find_tars(place)
        with tqdm(total=len(self.paths), unit="archive", desc="listing", delay=5, leave=False) as progress:
            several = [_list_tar(path, progress) for path in self.paths]
        keys = [Counter(_key_of(name) for name in filter(_is_image, one["names"])) for one in several]
        for path, found, count in zip(self.paths, keys, counts, strict=True):
            if count is not None and len(found) != count:
                raise ValueError(
                    f"{path} holds {len(found)} samples, and {place} says {count}: copy or download it again"
                )
        names, rows, labels, folders = list[str](), list[np.ndarray](), dict[str, int](), list[str]()
        are_distinct = sum(map(len, keys)) == len(set().union(*keys))
        for number, (path, one) in enumerate(zip(self.paths, several, strict=True)):
            own = "" if are_distinct else f"{path.stem.replace('.', '_')}-"  # some tools number anew in each archive
            names += [_with(own, name) for name in one["names"]]
            labels |= {_with(own, key): label for key, label in one["labels"].items()}
            folders += one["folders"]
            rows.append(np.array([(number, *row) for row in zip(one["offsets"], one["sizes"], strict=True)], np.int64))
        _check_labels(place, keys, labels)
        wanted = below(names, folder)
        kept = np.array([name is not None for name in wanted], bool)
        self.rows = np.concatenate([part.reshape(-1, 3) for part in rows])[kept]  # archive, offset, size
        self.keys = NameTable(list(labels))
        self.label_of_key = np.array(list(labels.values()), np.int64)
        self.prefix = f"{folder}/" if folder else ""
        inside = [name for name in wanted if name is not None]
        place = f"{place}/{folder}" if folder else place
        if not labels:
            check_top(place, inside)
        super().__init__(place, inside, filter(None, below(folders, folder)))

    def read_at(self, place: int) -> bytes:
        archive, offset, size = self.rows[place].tolist()
        return read_bytes(self.paths[archive], offset, size)

    def labels(self, names: Sequence[str]) -> tuple[tuple[str, ...], list[int]] | None:
        """Returns the labels that the archives hold as KEY.cls or KEY.json, or None if they hold none.

        Raises:
            ValueError: only some images have a label.
        """
        if not len(self.label_of_key):
            return None
        found = self.keys.find([_key_of(self.prefix + name) for name in names])
        if lacking := [names[place] for place in np.flatnonzero(found < 0).tolist()]:
            raise ValueError(f"{self.place} has no label (KEY.cls) for {len(lacking)} images: {show_some(lacking, 3)}")
        labels = self.label_of_key[found].tolist()
        return tuple(map(str, range(max(labels) + 1))), labels


def _is_image(name: str) -> bool:
    return ALL_RULES[RULES].is_image(name)


def _key_of(name: str) -> str:
    """Returns the name up to the first dot after its folders, as WebDataset groups files."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _with(prefix: str, name: str) -> str:
    """Puts a prefix before the last part of a path; dataset.json keeps its name."""
    folder, slash, file = name.rpartition("/")
    return name if name == "dataset.json" else folder + slash + prefix + file


def _check_labels(place: str, keys: Sequence[Counter[str]], labels: Mapping[str, int]) -> None:
    """Raises a ValueError if several images share a key with a label."""
    several = [key for found in keys for key, count in found.items() if count > 1] if labels else []
    if several:
        raise ValueError(
            f"{place} has {len(several)} samples with several images ({show_some(several, 3)}): pack archives with one "
            "image each"
        )


def _find_tars(place: str) -> tuple[list[Path], list[int | None]]:
    """Returns the archives in order, and the number of samples in each, None if unknown."""
    path = Path(place)
    if path.suffix == ".json":
        paths, counts = _read_index(path)
        return paths, list(counts)
    if path.is_dir():
        paths = sorted(path.glob("*.tar"))
    elif path.exists():
        paths = [path]
    else:
        paths = [Path(name) for pattern in _unfold(place) for name in _matching(pattern)]
    if not paths:
        raise ValueError(f"{place} names no tar archives: give a folder, 'train-{{000..099}}.tar' or an index.json")
    if missing := [str(found) for found in paths if not found.is_file()]:
        raise ValueError(f"{place} names {len(missing)} archives that do not exist: {show_some(missing, 3)}")
    return paths, [None] * len(paths)


def _read_index(path: Path) -> tuple[list[Path], list[int]]:
    """Reads the index of `wids`. ValueError: there is none, or archives are missing."""
    try:
        entries = json.loads(path.read_bytes())["shardlist"]
        paths = [path.parent / entry["url"] for entry in entries]
        counts = [int(entry["nsamples"]) for entry in entries]
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        form = '{"shardlist": [{"url": "train-000.tar", "nsamples": 1000}]}'
        raise ValueError(f"{path} is no index of wids, {form}") from error
    if missing := [str(found) for found in paths if not found.is_file()]:
        raise ValueError(f"{path} lists {len(missing)} archives that do not exist: {show_some(missing, 3)}")
    return paths, counts


def _matching(pattern: str) -> list[str]:
    """Returns the files that a pattern names; without *, ? and [ it is a name itself."""
    return sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]


def _unfold(pattern: str) -> list[str]:
    """Returns the names that a{08..10}b stands for."""
    if not (match := re.search(r"\{(\d+)\.\.(\d+)\}", pattern)):
        return [pattern]
    first, last = match.groups()
    numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    return [text for n in numbers for text in _unfold(pattern[: match.start()] + n + pattern[match.end() :])]


def _list_tar(path: Path, progress: tqdm) -> dict:
    """Returns names, offsets and sizes of the files in a tar archive, labels and folders; cached."""
    status = path.stat()
    key = json.dumps([FORMAT, str(path.resolve()), status.st_size, status.st_mtime_ns])
    cache = Path(os.environ.get(CACHE) or os.path.expanduser("~/.cache/sit_atconv")) / "archives"
    stored = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    try:
        listed = json.loads(stored.read_bytes())
        if sorted(listed) != sorted(LISTED):
            raise ValueError("it is no list")
    except (OSError, ValueError, TypeError):
        listed = _scan_tar(path)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            write_aside(stored, json.dumps(listed), writer=f"{os.getpid()}")
        except OSError as error:
            progress.write(f"the list of {path} is not kept ({error}): set {CACHE} to a folder", file=sys.stderr)
    progress.update()
    return listed


def _scan_tar(path: Path) -> dict:
    """Reads a tar archive from beginning to end. ValueError: it is damaged, or cannot be read at random."""
    names, offsets, sizes, folders = list[str](), list[int](), list[int](), list[str]()
    links, labels = dict[str, str](), dict[str, int]()
    is_ignored = ALL_RULES[RULES].is_ignored
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                name = tidy(member.name)
                if not name or any(map(is_ignored, name.split("/"))):
                    continue
                if member.isdir():
                    folders.append(name)
                elif member.islnk() or member.issym():
                    target = member.linkname if member.islnk() else f"{PurePosixPath(name).parent}/{member.linkname}"
                    links[name] = tidy(target)
                elif member.issparse():
                    raise ValueError(f"{path} holds the sparse file {name}: pack it again without --sparse")
                elif member.isfile():
                    label = None
                    if name.endswith(LABELS):
                        content = tar.extractfile(member).read()  # type: ignore[union-attr]
                        label = _label_in(content, f"{path}/{name}")
                    if label is not None:
                        _add_label(labels, name, label, path)
                    else:
                        names.append(name)
                        offsets.append(member.offset_data)
                        sizes.append(member.size)
            end = tar.offset
    except tarfile.ReadError as error:
        raise ValueError(
            f"{path} is no whole, uncompressed tar archive ({error}): copy it again, or unpack .gz and the like"
        ) from error
    _check_end(path, end)
    place = {name: i for i, name in enumerate(names)}
    for name, target in links.items():
        if target in place:
            names.append(name)
            offsets.append(offsets[place[target]])
            sizes.append(sizes[place[target]])
        elif name.endswith(LABELS) and _key_of(target) in labels:
            _add_label(labels, name, labels[_key_of(target)], path)
        elif _is_image(name):
            raise ValueError(f"{path} holds {name}, a link to {target}, which it does not hold: pack it without links")
    return {"names": names, "offsets": offsets, "sizes": sizes, "labels": labels, "folders": folders}


def _add_label(labels: dict[str, int], name: str, label: int, path: Path) -> None:
    """Notes a label. ValueError: the sample has another one, too."""
    if (other := labels.setdefault(_key_of(name), label)) != label:
        raise ValueError(f"{path} gives {_key_of(name)} the labels {other} and {label}: remove one of them")


def _check_end(path: Path, end: int) -> None:
    """Raises a ValueError unless only zeros follow, two blocks or more and at most `LONGEST_END`."""
    length = path.stat().st_size
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read(LONGEST_END + 1)
    if len(rest) < 2 * BLOCK and not any(rest):
        raise ValueError(f"{path} is truncated: it does not end as a tar archive ends. Copy or download it again")
    if any(rest) or length - end > LONGEST_END:
        raise ValueError(
            f"{path} has {length - end} bytes after the file at which it ends: it is damaged, not wholly downloaded, "
            "or several archives in one, which wids: reads one by one"
        )


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
