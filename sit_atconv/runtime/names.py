"""Names of classes, files and objects: how they are told apart, compared and listed."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path


def normal(name: str) -> str:
    """Returns the form in which names are compared: Unicode's NFC, without outer blanks.

    (macOS writes "é" as two characters, and most keyboards as one; both look the same.)
    """
    return unicodedata.normalize("NFC", name).strip()


def labels_by_name(class_names: Sequence[str]) -> dict[str, list[int]]:
    """Returns the labels that bear each name, in its normal form."""
    labels: dict[str, list[int]] = {}
    for label, name in enumerate(class_names):
        labels.setdefault(normal(name), []).append(label)
    return labels


def show_some(items: Sequence[str], most: int = 10) -> str:
    """Returns the first `most` items, and how many more there are."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def name_classes(class_names: Sequence[str], labels: Sequence[int], which: str = "", most: int = 10) -> str:
    """Names the classes of labels: [0, 7] -> "2 classes: 0 ('cat'), 7 ('dog')"; `which` qualifies them."""
    named = [f"{label} ({class_names[label]!r})" for label in labels]
    return f"{len(labels)} class{'' if len(labels) == 1 else 'es'}{which}: {show_some(named, most)}"


def is_object_path(text: str) -> bool:
    """True for the path of an object in a module, "my_module.MyCodec", if there is no such file or folder."""
    return "." in text and all(map(str.isidentifier, text.split("."))) and not Path(text).exists()
