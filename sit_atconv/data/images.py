"""Data sources of images: the embedded digits, and folders."""

import hashlib
import json
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from sit_atconv.data import DEFAULT_VAE, MAX_MEGAPIXELS
from sit_atconv.data.data_source import DataSource, InMemory
from sit_atconv.data.pixels import CROP_RULE, read_picture, to_uint8
from sit_atconv.runtime.names import normal, show_some

MOST_CLASSES = 10**6  # labels of this size or more are refused as mistakes
RULES = 2  # number of the rules for new data sets; 1 is for data sets that were first used before 2026-11-25
SUFFIXES = frozenset(
    [  # decoded by Pillow 12; fixed, so that a folder is the same data set under any version
        ".apng",
        ".avif",
        ".avifs",
        ".blp",
        ".bmp",
        ".bw",
        ".cur",
        ".dcx",
        ".dds",
        ".dib",
        ".ftc",
        ".ftu",
        ".gbr",
        ".gif",
        ".icb",
        ".icns",
        ".ico",
        ".im",
        ".j2c",
        ".j2k",
        ".jfif",
        ".jp2",
        ".jpc",
        ".jpe",
        ".jpeg",
        ".jpf",
        ".jpg",
        ".jpx",
        ".mpo",
        ".msp",
        ".pbm",
        ".pcd",
        ".pcx",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".psd",
        ".pxr",
        ".qoi",
        ".ras",
        ".rgb",
        ".rgba",
        ".sgi",
        ".tga",
        ".tif",
        ".tiff",
        ".vda",
        ".vst",
        ".webp",
        ".xbm",
        ".xpm",
        ".split",
    ]
)
LITTER = frozenset(  # left among images by file systems, archives and file managers; lower case
    [
        "@eadir",
        "@recycle",
        "@recently-snapshot",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "__macosx",
        "lost+found",
        "system volume information",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "icon\r",
    ]
)
DATASET_JSON = "dataset.json"
NO_SUFFIX = "(none)"
KEEP_EMPTY = "--keep-empty-classes (training: --data.keep_empty_classes true)"
ClassesAndLabels = tuple[tuple[str, ...], list[int]]  # names of the classes, label of each image


@dataclass(frozen=True)
class Rules:
    """Rules by which the files of a folder become images and labels.

    Args:
        suffixes: suffixes of image files, lower case.
        litter: names of files and folders that are ignored, lower case.
        class_order: sort key for the name of a class folder.
        file_form: normal form in which names in `dataset.json` and in the file system are compared.
        class_form: normal form in which the names of two classes must differ.
    """

    suffixes: frozenset[str]
    litter: frozenset[str]
    class_order: Callable[[str], tuple]
    file_form: Callable[[str], str]
    class_form: Callable[[str], str]

    def is_image(self, name: str) -> bool:
        return _suffix(name) in self.suffixes

    def is_ignored(self, name: str) -> bool:
        """True if the file or folder is hidden or litter."""
        return name.startswith(".") or name.lower() in self.litter


def _numbers_first(name: str) -> tuple:
    return (0, int(name), name) if name.isascii() and name.isdigit() else (1, 0, name)


ALL_RULES = {
    1: Rules(
        suffixes=frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff"]),
        litter=frozenset(),
        class_order=lambda name: (name,),
        file_form=str,
        class_form=str,
    ),
    2: Rules(
        suffixes=SUFFIXES,
        litter=LITTER,
        class_order=_numbers_first,
        file_form=lambda name: unicodedata.normalize("NFC", name),
        class_form=lambda name: normal(_readable(name)),
    ),
}


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


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns scikit-learn's bundled handwritten digits: uint8 images (1797, 8, 8) and labels (1797,)."""
    from sklearn.datasets import load_digits as load

    pixels, labels = load(return_X_y=True)  # grey levels 0 ... 16
    images = to_uint8(torch.from_numpy(pixels / 8 - 1)).numpy()
    return images.reshape(-1, 8, 8), labels.astype(np.int64)


class Digits(InMemory):
    """Embedded data set: 1,797 real 8x8 greyscale images of ten classes, no download."""

    class_names = tuple("0123456789")
    channels = 1
    image_size = 8

    def __init__(self):
        images, self.labels = load_digits()
        self.images = torch.from_numpy(images)[:, None]

    def describe(self) -> dict:
        return {"kind": "digits", "images": len(self)}


class ImageFolder(DataSource):
    """Folder of images with labels.

    Labels are read from the folder's `dataset.json` if it has one, in the format of StyleGAN, EDM2 and REPA:
    `{"labels": [["00000/img00000000.png", 6], ...]}`, or null for one class. Otherwise every subfolder is a class, and
    a folder without subfolders is one class. Classes named by numbers come first, in numerical order; the others follow
    in the order of their names. `left_out` is the number of files that are not images, by suffix.

    Args:
        folder: the folder of images.
        image_size: side in pixels after ADM's centre crop.
        rules: number of the `Rules`: RULES, or 1 for runs and latents that were started under them.
        keep_empty_classes: accept empty class folders, and unused labels below the largest one, as classes.
        max_megapixels: largest file that is read, in millions of pixels.

    Raises:
        ValueError: no such folder, no images, images both outside and inside subfolders, a class without images, two
            classes with the same name, or a `dataset.json` that does not fit the images; lists all problems.
    """

    codec = {"kind": "autoencoder_kl", "source": DEFAULT_VAE}  # noqa: RUF012

    def __init__(
        self,
        folder: str | Path,
        image_size: int,
        *,
        rules: int = RULES,
        keep_empty_classes: bool = False,
        max_megapixels: float = MAX_MEGAPIXELS,
    ):
        self.folder = Path(folder)
        self.image_size = image_size
        self.rules = rules
        self.max_megapixels = max_megapixels
        listing = scan_images(self.folder, rules)
        names, self.left_out = listing.names, listing.all_left_out()
        labels_of = _labels_of_dataset_json if (self.folder / DATASET_JSON).is_file() else _labels_of_subfolders
        self.class_names, labels = labels_of(self.folder, listing, ALL_RULES[rules], keep_empty_classes)
        # Arrays, not lists: every loading process would gradually copy millions of small objects.
        self.names = np.array([os.fsencode(name) for name in names])
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
            raise ValueError(f"{self.folder / self.name(index)} {error}") from error
        return image.flip(-1) if mirrored else image, int(self.labels[index])

    def read_with_size(self, index: int) -> tuple[Tensor, tuple[int, int]]:
        """Returns the image, uint8 (3, H, W), and its (height, width) before the crop; see `read_picture`."""
        return read_picture(self.folder / self.name(index), self.image_size, self.max_megapixels)

    def name(self, index: int) -> str:
        """Returns the name of an image, relative to the folder."""
        return os.fsdecode(self.names[index])

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
    return scan_images(folder).names


def scan_images(folder: Path, rules: int = RULES) -> Listing:
    """Lists the images below a folder by their suffixes, and counts the other files.

    Follows links. Ignores names that begin with a dot, and `LITTER`.

    Raises:
        ValueError: no such folder, no image in it, a link to a folder that holds the link, or unknown rules.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    if rules not in ALL_RULES:
        raise ValueError(f"the rules {rules!r} of a data set are not known here (1 to {RULES}): update sit_atconv")
    rule = ALL_RULES[rules]
    names: list[str] = []
    left_out: dict[str, Counter[str]] = defaultdict(Counter)
    for place, subfolders, files in os.walk(folder, followlinks=True, onerror=_raise):
        subfolders[:] = [name for name in subfolders if not rule.is_ignored(name)]
        for link in (Path(place, name) for name in subfolders):
            if link.is_symlink() and any(parent.resolve().is_relative_to(link.resolve()) for parent in link.parents):
                raise ValueError(f"{link} is a link to a folder that holds it: remove the link")
        prefix = "" if place == str(folder) else os.path.relpath(place, folder) + os.sep
        for name in files:
            if rule.is_ignored(name) or prefix + name == DATASET_JSON:
                continue
            if rule.is_image(name):
                names.append(prefix + name)
            else:
                left_out[_class_of(prefix + name)][_suffix(name) or NO_SUFFIX] += 1
    listing = Listing(sorted(names, key=os.fsencode), left_out)
    if not names:
        others = f", only {_counts(listing.all_left_out())}: convert them to PNG or JPEG" if left_out else ""
        raise ValueError(f"{folder} holds no images{others}")
    return listing


def left_out_line(left_out: Mapping[str, int]) -> str:
    """Returns "left out: 3 .txt, 1 .mp4" for `ImageFolder.left_out`, or "" if that is empty."""
    return f"left out: {_counts(left_out)}" if left_out else ""


def _counts(suffixes: Mapping[str, int]) -> str:
    return show_some([f"{count} {suffix}" for suffix, count in suffixes.items()])


def _raise(error: OSError) -> NoReturn:
    raise error


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _class_of(name: str) -> str:
    """Returns the first folder of a relative path, or "" if there is none."""
    return name.split(os.sep)[0] if os.sep in name else ""


def _readable(name: str) -> str:
    return os.fsencode(name).decode(errors="replace")  # a name may hold bytes that are not text


def _refuse(where: Path, faults: Iterable[str]) -> None:
    """Raises a ValueError that lists all faults, one per line, if there are any."""
    if found := list(faults):
        raise ValueError(f"{where} {found[0]}" if len(found) == 1 else "\n  ".join([f"{where} is wrong:", *found]))


def _labels_of_subfolders(folder: Path, listing: Listing, rules: Rules, keep_empty_classes: bool) -> ClassesAndLabels:
    classes = [_class_of(name) for name in listing.names]
    if set(classes) == {""}:
        return ("images",), [0] * len(classes)
    folders = {path.name for path in folder.iterdir() if path.is_dir() and not rules.is_ignored(path.name)}
    _refuse(folder, _faults_of_subfolders(classes, folders, listing, rules, keep_empty_classes))
    label = {name: index for index, name in enumerate(sorted(folders, key=rules.class_order))}
    return tuple(map(_readable, label)), [label[name] for name in classes]


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


def _labels_of_dataset_json(folder: Path, listing: Listing, rules: Rules, keep_empty_classes: bool) -> ClassesAndLabels:
    path = folder / DATASET_JSON
    try:
        pairs = json.loads(path.read_bytes())["labels"]
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
