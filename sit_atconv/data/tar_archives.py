"""Lists of the files in tar archives, those of WebDataset too.

A tar archive has no list, so it is read once from beginning to end, and the list is kept in the user's cache folder for
as long as the archive has the same size and time.
"""

import glob
import hashlib
import json
import os
import re
import sys
import tarfile
from pathlib import Path, PurePosixPath
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from sit_atconv.data.archives import Archive, Members, key_of, tidy
from sit_atconv.data.image_rules import MOST_CLASSES
from sit_atconv.runtime.files import write_aside
from sit_atconv.runtime.names import show_some

BLOCK = 512  # bytes; a tar archive is a row of these, and ends with two of zeros
CACHE = "SIT_ATCONV_CACHE"  # environment variable with the folder of lists of tar archives
FORMAT = 1  # of those lists


def open_tars(place: str) -> Archive:
    """Opens tar archives by their path, folder, pattern (train-{000..099}.tar, *.tar) or index of `wids`.

    Raises:
        ValueError: there are none, or one is truncated, compressed, or not as long as the index says.
    """
    paths, counts = _find_tars(place)
    progress = tqdm(total=len(paths), unit="archive", desc="listing", delay=5, file=sys.stderr)
    several = [_list_tar(path, progress) for path in paths]
    progress.close()
    keys = [{key_of(name) for name in one["names"]} for one in several]
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
                name = tidy(member.name)
                if member.islnk() or member.issym():
                    target = member.linkname if member.islnk() else f"{PurePosixPath(name).parent}/{member.linkname}"
                    links[name] = tidy(target)
                elif member.isfile():
                    label = None
                    if name.endswith((".cls", ".json")):
                        content = tar.extractfile(member).read()  # type: ignore[union-attr]
                        label = _label_in(content, f"{path}/{name}")
                    if label is None:
                        names.append(name)
                        offsets.append(member.offset_data)
                        sizes.append(member.size)
                    elif labels.setdefault(key_of(name), label) != label:
                        raise ValueError(f"{path} gives {key_of(name)} the labels {labels[key_of(name)]} and {label}")
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
