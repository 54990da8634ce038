"""Data source of image files with labels, in a folder, in archives or in a Hugging Face data set."""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from sit_atconv.data import DEFAULT_VAE, MAX_MEGAPIXELS
from sit_atconv.data.data_source import DataSource
from sit_atconv.data.file_store import FileStore, Folder
from sit_atconv.data.image_rules import ALL_RULES, KEEP_EMPTY, MOST_CLASSES, RULES, Rules, readable, suffix_of
from sit_atconv.data.pixels import CROP_RULE, read_picture
from sit_atconv.data.stores import open_store
from sit_atconv.runtime.names import show_some

DATASET_JSON = "dataset.json"
NO_SUFFIX = "(none)"
ClassesAndLabels = tuple[tuple[str, ...], list[int]]  # names of the classes, label of each image


@dataclass(frozen=True)
class Listing:
    """List of the files below a folder.

    Args:
        names: names of the images, relative to the folder, in the order of their bytes.
        left_out: for each entry of the folder ("" for files directly in it), the number of other files by suffix.
    """

    names: list[str]
    left_out: Mapping[str, Counter[str]]

    def all_left_out(self) -> dict[str, int]:
        """Returns the number of files that are not images by suffix, most frequent first."""
        return dict(sorted(sum(self.left_out.values(), Counter()).items(), key=lambda item: (-item[1], item[0])))


class ImageFolder(DataSource):
    """Image files with labels: in a folder, in archives or in a Hugging Face data set.

    Labels are those of a WebDataset or Hugging Face data set. In a folder and in other archives they are read from
    `dataset.json` if there is one, in the format of StyleGAN, EDM2 and REPA:
    `{"labels": [["00000/img00000000.png", 6], ...]}`, or null for one class. Otherwise every subfolder is a class, and
    a folder without subfolders is one class. Classes named by numbers come first, in numerical order; the others follow
    in the order of their names. `left_out` is the number of files that are not images, by suffix.

    The same files are the same data set wherever they are: order and digests depend on names, labels and class names.

    Args:
        place: the folder, archive or name, as `open_store` takes it, or an open store.
        image_size: side in pixels after ADM's centre crop.
        rules: number of the `Rules`: RULES, or 1 for runs and latents that were started under them.
        keep_empty_classes: accept empty class folders, and unused labels below the largest one, as classes.
        max_megapixels: largest file that is read, in millions of pixels.

    Raises:
        ValueError: no such place, no images, images both outside and inside subfolders, a class without images, two
            classes with the same name, or a `dataset.json` that does not fit the images; lists all problems.
    """

    codec = {"kind": "autoencoder_kl", "source": DEFAULT_VAE}  # noqa: RUF012

    def __init__(
        self,
        place: str | Path | FileStore,
        image_size: int,
        *,
        rules: int = RULES,
        keep_empty_classes: bool = False,
        max_megapixels: float = MAX_MEGAPIXELS,
    ):
        self.store = open_store(place) if isinstance(place, str | Path) else place
        self.image_size = image_size
        self.rules = rules
        self.max_megapixels = max_megapixels
        listing = scan_images(self.store, rules)
        self.left_out = listing.all_left_out()
        self.class_names, labels = _read_labels(self.store, listing, ALL_RULES[rules], keep_empty_classes)
        # Arrays, not lists: every loading process would gradually copy millions of small objects.
        self.names = np.array([os.fsencode(name) for name in listing.names])
        self.labels = np.array(labels, np.int64)

    @classmethod
    def open(cls, name: str, *, image_size: int | None, rules: int | None, mirror: bool, **options) -> "ImageFolder":
        return cls(name, image_size or 256, rules=RULES if rules is None else rules, **options)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, item: tuple[int, bool]) -> tuple[Tensor, int]:
        index, mirrored = item
        try:
            image, _ = self.read_with_size(index)
        except ValueError as error:
            raise ValueError(f"{self.where(self.name(index))} {error}") from error
        return image.flip(-1) if mirrored else image, int(self.labels[index])

    def read_with_size(self, index: int) -> tuple[Tensor, tuple[int, int]]:
        """Returns the image, uint8 (3, H, W), and its (height, width) before the crop; see `read_picture`."""
        return read_picture(self.store.open(self.name(index)), self.image_size, self.max_megapixels)

    def name(self, index: int) -> str:
        """Returns the name of an image, relative to the folder or archive."""
        return os.fsdecode(self.names[index])

    def where(self, name: str = "") -> str:
        """Returns the place of an image, or of all of them, for messages."""
        return self.store.where(name) if name else self.store.place

    def find(self, names: Iterable[str]) -> np.ndarray:
        return np.flatnonzero(np.isin(self.names, [os.fsencode(name) for name in names]))

    def describe(self) -> dict:
        description = {
            "kind": "images",
            "images": len(self),
            "image_size": self.image_size,
            "crop": CROP_RULE,
            "files": self.files_sha256(),
        }
        return description if self.rules == 1 else description | {"rules": self.rules}

    def files_sha256(self) -> str:
        """Returns the digest of all names, labels and class names: equal if every index means the same image."""
        digest = hashlib.sha256(json.dumps(list(self.class_names)).encode())
        for name in self.names:
            digest.update(name + b"\0")
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


def list_images(folder: Path) -> list[str]:
    """Returns the names of all image files below a folder. Raises as `scan_images`."""
    return scan_images(Folder(folder)).names


def scan_images(store: FileStore, rules: int = RULES) -> Listing:
    """Lists the images of a store by their suffixes, and counts the other files.

    Ignores names that begin with a dot, and `LITTER`.

    Raises:
        ValueError: there is no image, a link to a folder holds the link, or the rules are unknown.
    """
    if rules not in ALL_RULES:
        raise ValueError(f"the rules {rules!r} of a data set are not known here (1 to {RULES}): update sit_atconv")
    rule = ALL_RULES[rules]
    names: list[str] = []
    left_out: dict[str, Counter[str]] = defaultdict(Counter)
    for name in store.names(rule.is_ignored):
        if store.only_images or rule.is_image(name):
            names.append(name)
        elif name != DATASET_JSON:
            left_out[_class_of(name)][suffix_of(name) or NO_SUFFIX] += 1
    listing = Listing(sorted(names, key=os.fsencode), left_out)
    if not names:
        others = f", only {_counts(listing.all_left_out())}: convert them to PNG or JPEG" if left_out else ""
        raise ValueError(f"{store.place} holds no images{others}")
    return listing


def left_out_line(left_out: Mapping[str, int]) -> str:
    """Returns "left out: 3 .txt, 1 .mp4" for `ImageFolder.left_out`, or "" if that is empty."""
    return f"left out: {_counts(left_out)}" if left_out else ""


def _counts(suffixes: Mapping[str, int]) -> str:
    return show_some([f"{count} {suffix}" for suffix, count in suffixes.items()])


def _class_of(name: str) -> str:
    """Returns the first folder of a relative path, or "" if there is none."""
    return name.split(os.sep)[0] if os.sep in name else ""


def _refuse(where: str, faults: Iterable[str]) -> None:
    """Raises a ValueError that lists all faults, one per line, if there are any."""
    if found := list(faults):
        raise ValueError(f"{where} {found[0]}" if len(found) == 1 else "\n  ".join([f"{where} is wrong:", *found]))


def _read_labels(store: FileStore, listing: Listing, rules: Rules, keep_empty_classes: bool) -> ClassesAndLabels:
    if own := store.labels(listing.names):
        names, labels = own
        _refuse(store.place, _faults_of_own_labels(names, labels, keep_empty_classes))
        return names, labels
    if (content := store.read(DATASET_JSON)) is not None:
        return _labels_of_dataset_json(content, store, listing, rules, keep_empty_classes)
    return _labels_of_subfolders(store, listing, rules, keep_empty_classes)


def _faults_of_own_labels(class_names: Sequence[str], labels: Sequence[int], keep_empty_classes: bool) -> Iterable[str]:
    if len(class_names) > MOST_CLASSES:
        yield f"has the label {len(class_names) - 1}: labels are whole numbers from 0 to {MOST_CLASSES - 1}"
    used = set(labels)
    empty = [name for label, name in enumerate(class_names) if label not in used]
    if empty and not keep_empty_classes:
        yield f"has no images of the classes {show_some(empty)}: keep them with {KEEP_EMPTY}"


def _labels_of_subfolders(
    store: FileStore, listing: Listing, rules: Rules, keep_empty_classes: bool
) -> ClassesAndLabels:
    classes = [_class_of(name) for name in listing.names]
    if set(classes) == {""}:
        return ("images",), [0] * len(classes)
    folders = {name for name in store.folders() if not rules.is_ignored(name)}
    _refuse(store.place, _faults_of_subfolders(classes, folders, listing, rules, keep_empty_classes))
    label = {name: index for index, name in enumerate(sorted(folders, key=rules.class_order))}
    return tuple(map(readable, label)), [label[name] for name in classes]


def _faults_of_subfolders(
    classes: list[str], folders: set[str], listing: Listing, rules: Rules, keep_empty_classes: bool
) -> Iterable[str]:
    if stray := [name for name in listing.names if not _class_of(name)]:
        yield f"has images outside its class folders: {show_some(stray, 1)}: move them into a class folder"
    if (empty := sorted(folders - set(classes), key=rules.class_order)) and not keep_empty_classes:
        words = [f"{name} (only {_counts(only)})" if (only := listing.left_out.get(name)) else name for name in empty]
        yield f"has classes without images: {show_some(words)}: fill them, remove them, or keep them with {KEEP_EMPTY}"
    forms: dict[str, str] = {}
    for name in sorted(folders):
        form = rules.class_form(name)
        if (other := forms.setdefault(form, name)) != name:  # printed as ASCII, since they may look the same
            yield f"has two classes with the same name, {form}: rename {other!a} or {name!a}"


def _labels_of_dataset_json(
    content: bytes, store: FileStore, listing: Listing, rules: Rules, keep_empty_classes: bool
) -> ClassesAndLabels:
    path = store.where(DATASET_JSON)
    try:
        pairs = json.loads(content)["labels"]
        if pairs is None:
            return ("images",), [0] * len(listing.names)
        pairs = [(rules.file_form(os.path.normpath(name)), label) for name, label in pairs if rules.is_image(name)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is not {{"labels": [["folder/name.png", 3], ...]}} ({error})') from error
    names = [rules.file_form(name) for name in listing.names]
    _refuse(path, _faults_of_labels(pairs, names, keep_empty_classes))
    labels = dict(pairs)
    return tuple(map(str, range(max(labels.values()) + 1))), [labels[name] for name in names]


def _faults_of_labels(pairs: list[tuple[str, object]], names: list[str], keep_empty_classes: bool) -> Iterable[str]:
    labels: dict[str, int] = {}
    several: dict[str, set[int]] = {}
    wrong = []
    for name, label in pairs:
        if type(label) is not int or not 0 <= label < MOST_CLASSES:
            wrong.append(f"{name} the label {label!r}")
        elif (first := labels.setdefault(name, label)) != label:
            several.setdefault(name, {first}).add(label)
    if wrong:
        yield f"gives {show_some(wrong, 1)}: labels are whole numbers from 0 to {MOST_CLASSES - 1}"
    if several:
        yield f"gives {show_some([f'{name} {len(found)} different labels' for name, found in several.items()], 1)}"
    if twins := [name for name, times in Counter(names).items() if times > 1]:
        yield f"matches two files named {show_some(twins, 1)} in different Unicode forms: rename one of them"
    images, named = set(names), {name for name, _ in pairs}
    if missing := [name for name in names if name not in named]:
        yield f"gives no label to {show_some(missing, 1)}: add labels"
    if gone := [name for name in named if name not in images]:
        yield f"labels images that do not exist: {show_some(sorted(gone), 1)}: remove those labels"
    used = {label for name, label in labels.items() if name in images}
    if (empty := [str(label) for label in range(max(used, default=0)) if label not in used]) and not keep_empty_classes:
        begin = "begins its labels at 1 and " if empty == ["0"] else ""
        yield (
            f"{begin}gives no image the labels {show_some(empty)}: renumber the labels, or keep these classes empty "
            f"with {KEEP_EMPTY}"
        )
