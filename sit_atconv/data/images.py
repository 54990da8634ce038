"""Data sources of images: the embedded digits and folders."""

import hashlib
import json
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sit_atconv.data import DEFAULT_VAE, MAX_MEGAPIXELS
from sit_atconv.data.data_source import DataSource
from sit_atconv.data.pixels import CROP_RULE, read_picture, to_uint8
from sit_atconv.runtime.names import normal, show_some

MOST_CLASSES = 10**6  # a larger label is an error
RULES = 2  # number of the rules for new data sets; data sets from before 2026-11-25 keep 1
SUFFIXES = frozenset([  # that Pillow 12 decodes; fixed, so that any Pillow finds the same data set
    ".apng", ".avif", ".avifs", ".blp", ".bmp", ".bw", ".cur", ".dcx", ".dds", ".dib", ".ftc", ".ftu", ".gbr",
    ".gif", ".icb", ".icns", ".ico", ".im", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf",
    ".jpg", ".jpx", ".mpo", ".msp", ".pbm", ".pcd", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".pxr",
    ".qoi", ".ras", ".rgb", ".rgba", ".sgi", ".tga", ".tif", ".tiff", ".vda", ".vst", ".webp", ".xbm", ".xpm",
    ".split",
])
LITTER = frozenset(  # left among images by file systems, archives and file managers; in small letters
    ["@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "__macosx", "lost+found",
     "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"]
)
DATASET_JSON = "dataset.json"
NO_SUFFIX = "(none)"
KEEP_EMPTY = "--keep-empty-classes (training: --data.keep_empty_classes true)"


@dataclass(frozen=True)
class Rules:
    """The rules by which the files of a folder become images and labels."""

    suffixes: frozenset[str]  # of image files, in small letters
    litter: frozenset[str]  # names of files and folders to ignore, in small letters
    class_order: Callable[[str], tuple]  # sort key of a class folder's name
    file_form: Callable[[str], str]  # form in which `dataset.json` and the file system name the same file
    class_form: Callable[[str], str]  # form in which the names of two classes must differ

    def is_image(self, name: str) -> bool:
        return _suffix(name) in self.suffixes

    def is_ignored(self, name: str) -> bool:
        """True if the file or folder is hidden or litter."""
        return name.startswith(".") or name.lower() in self.litter


def rules_of(number: int) -> Rules:
    """Returns the rules with that number. ValueError: there are none."""
    if number == 1:
        return Rules(frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff"]),
                     litter=frozenset(), class_order=lambda name: (name,), file_form=str, class_form=str)
    if number == RULES:
        return Rules(SUFFIXES, LITTER, class_order=_numbers_first,
                     file_form=lambda name: unicodedata.normalize("NFC", name),
                     class_form=lambda name: normal(_readable(name)))
    raise ValueError(f"the rules {number!r} of a data set are unknown (known: 1 to {RULES}): update sit_atconv")


def _numbers_first(name: str) -> tuple:
    return (0, int(name), name) if name.isascii() and name.isdigit() else (1, 0, name)


@dataclass(frozen=True)
class Listing:
    """The files below a folder."""

    names: list[str]  # of the images, relative to the folder, in the order of their bytes
    left_out: dict[str, Counter[str]]  # number of other files by suffix, for each subfolder ("": the folder itself)

    def all_left_out(self) -> dict[str, int]:
        """Returns the number of other files by suffix, most frequent first."""
        return dict(sorted(sum(self.left_out.values(), Counter()).items(), key=lambda item: (-item[1], item[0])))


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns scikit-learn's bundled handwritten digits: uint8 images (1797, 8, 8) and labels (1797,)."""
    from sklearn.datasets import load_digits as load

    pixels, labels = load(return_X_y=True)  # grey levels 0 ... 16
    images = to_uint8(torch.from_numpy(pixels / 8 - 1)).numpy()
    return images.reshape(-1, 8, 8), labels.astype(np.int64)


class Digits(DataSource):
    """The embedded data set: 1,797 real 8x8 greyscale images of ten classes, no download."""

    class_names = tuple("0123456789")
    channels = 1
    image_size = 8

    def __init__(self):
        images, self.labels = load_digits()
        self.images = torch.from_numpy(images)[:, None]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, bool]) -> tuple[Tensor, int]:
        index, mirrored = item
        image = self.images[index]
        return image.flip(-1) if mirrored else image, int(self.labels[index])

    def describe(self) -> dict:
        return {"kind": "digits", "images": len(self)}


class ImageFolder(DataSource):
    """A folder of images and their labels.

    Labels come from `dataset.json` if the folder holds one, as StyleGAN, EDM2 and REPA write it:
    `{"labels": [["00000/img00000000.png", 6], ...]}`, or null for one class. Otherwise every subfolder is a class, and
    a folder without subfolders is one class. Classes named by numbers come first, in the order of the numbers; the
    others follow in the order of their names. `left_out` is the number of other files by suffix.

    Args:
        folder: the folder of images.
        image_size: side in pixels after ADM's centre crop.
        rules: number of the `Rules`: RULES, or 1 for runs and latents that were started with it.
        keep_empty_classes: accept classes without images: empty class folders, and labels that no image has.
        max_megapixels: size in millions of pixels above which a file is refused.

    Raises:
        ValueError: no such folder, no images, images both outside and inside subfolders, a class without images, two
            classes of one name, or a `dataset.json` that does not fit the images; the message names every fault.
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
        self.class_names, labels = labels_of(self.folder, listing, rules_of(rules), keep_empty_classes)
        # Arrays, because the small objects of a list would be copied into every loading process.
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels = np.array(labels, np.int64)

    @classmethod
    def open(cls, name: str, **options) -> "ImageFolder":
        return cls(name, options["image_size"] or 256, rules=options["rules"] or RULES,
                   keep_empty_classes=options["keep_empty_classes"], max_megapixels=options["max_megapixels"])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, item: tuple[int, bool]) -> tuple[Tensor, int]:
        index, mirrored = item
        try:
            image = self.read_with_size(index)[0]
        except ValueError as error:
            raise ValueError(f"{self.folder / self.name(index)} {error}") from error
        return image.flip(-1) if mirrored else image, int(self.labels[index])

    def read_with_size(self, index: int) -> tuple[Tensor, tuple[int, int]]:
        """Returns the image, uint8 (3, H, W), and its (height, width) before the crop, as `read_picture` does."""
        return read_picture(self.folder / self.name(index), self.image_size, self.max_megapixels)

    def name(self, index: int) -> str:
        """Returns the path of an image relative to the folder."""
        return os.fsdecode(self.names[index])

    def find(self, names: Iterable[str]) -> np.ndarray:
        """Returns the indices of the images of these names."""
        return np.flatnonzero(np.isin(self.names, [os.fsencode(name) for name in names]))

    def describe(self) -> dict:
        description = {"kind": "images", "images": len(self), "image_size": self.image_size, "crop": CROP_RULE,
                       "files": self.files_sha256()}
        return description if self.rules == 1 else description | {"rules": self.rules}

    def files_sha256(self) -> str:
        """Returns a checksum of names, labels and class names: if it is equal, indices mean the same images."""
        digest = hashlib.sha256(json.dumps(list(self.class_names)).encode())
        for name in self.names:
            digest.update(name + b"\0")
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


def list_images(folder: Path, rules: int = RULES) -> list[str]:
    """Returns the names of all image files below a folder. Raises as `scan_images` does."""
    return scan_images(folder, rules).names


def scan_images(folder: Path, rules: int = RULES) -> Listing:
    """Lists the images below a folder, through links too, and counts other files that are not litter.

    Raises:
        ValueError: there is no such folder, no image in it, or a link to a folder that contains the link.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    rule = rules_of(rules)
    names: list[str] = []
    left_out: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for place, subfolders, files in os.walk(folder, followlinks=True, onerror=_raise):
        subfolders[:] = [name for name in subfolders if not rule.is_ignored(name)]
        for link in (Path(place, name) for name in subfolders):
            if link.is_symlink() and any(parent.resolve().is_relative_to(link.resolve()) for parent in link.parents):
                raise ValueError(f"{link} is a link to a folder that contains it: remove the link")
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
    """Returns `ImageFolder.left_out` in words, "left out: 3 .txt, 1 .mp4", or "" if it is empty."""
    return f"left out: {_counts(left_out)}" if left_out else ""


def _counts(suffixes: Mapping[str, int]) -> str:
    return show_some([f"{count} {suffix}" for suffix, count in suffixes.items()])


def _raise(error: OSError) -> None:
    raise error


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _class_of(name: str) -> str:
    """Returns the subfolder that a file is in, or "" for a file of the folder itself."""
    return name.split(os.sep)[0] if os.sep in name else ""


def _readable(name: str) -> str:
    return os.fsencode(name).decode(errors="replace")  # file names may be any bytes


def _refuse(where: Path, faults: Iterable[str]) -> None:
    """Raises a ValueError that lists all faults, if there are any."""
    faults = list(faults)
    if faults:
        raise ValueError(f"{where} {faults[0]}" if len(faults) == 1 else "\n  ".join([f"{where} has faults:", *faults]))


def _labels_of_subfolders(
    folder: Path, listing: Listing, rules: Rules, keep_empty_classes: bool
) -> tuple[tuple[str, ...], list[int]]:
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
        if (other := forms.setdefault(form, name)) != name:  # shown in ASCII, because both may look the same
            yield f"has two classes of one name, {form}: rename {other!a} or {name!a}"


def _labels_of_dataset_json(
    folder: Path, listing: Listing, rules: Rules, keep_empty_classes: bool
) -> tuple[tuple[str, ...], list[int]]:
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
    wrong: list[str] = []
    for name, label in pairs:
        if type(label) is not int or not 0 <= label < MOST_CLASSES:
            wrong.append(f"{name} the label {label!r}")
        elif (first := labels.setdefault(name, label)) != label:
            several.setdefault(name, {first}).add(label)
    if wrong:
        yield f"gives {show_some(wrong, 1)}: labels must be whole numbers from 0 to {MOST_CLASSES - 1}"
    if several:
        yield f"gives {show_some([f'{name} {len(found)} different labels' for name, found in several.items()], 1)}"
    if twins := [name for name, times in Counter(names).items() if times > 1]:
        yield f"has one name for two files, {show_some(twins, 1)}, in different Unicode forms: rename one of them"
    images, named = set(names), {name for name, _ in pairs}
    if missing := [name for name in names if name not in named]:
        yield f"gives no label to {show_some(missing, 1)}"
    if gone := [name for name in named if name not in images]:
        yield f"labels images that do not exist: {show_some(sorted(gone), 1)}"
    used = {label for name, label in labels.items() if name in images}
    if (empty := [str(label) for label in range(max(used, default=0)) if label not in used]) and not keep_empty_classes:
        begin = "starts its labels at 1 and " if empty == ["0"] else ""
        yield (f"{begin}gives no image the labels {show_some(empty)}: renumber them, or keep them empty with "
               f"{KEEP_EMPTY}")
