"""Rules by which files become images and labels, by number: old runs and latents keep theirs."""

import os
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from sit_atconv.runtime.names import normal

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
KEEP_EMPTY = "--keep-empty-classes (training: --data.keep_empty_classes true)"


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
        return suffix_of(name) in self.suffixes

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
        class_form=lambda name: normal(readable(name)),
    ),
}


def suffix_of(name: str) -> str:
    dot = name.rfind(".")
    return name[dot:].lower() if dot > name.rfind(os.sep) + 1 else ""  # four times as fast as os.path.splitext


def readable(name: str) -> str:
    """Returns a file's name as text, also if it holds bytes that are not text."""
    return os.fsencode(name).decode(errors="replace")
