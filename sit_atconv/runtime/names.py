"""Names of classes, files and objects: comparing and listing them."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path


def normal(name: str) -> str:
    """Returns the form in which names are compared: Unicode NFC without leading and trailing spaces.

    (macOS stores "é" as two characters, most keyboards type one.)
    """
    return unicodedata.normalize("NFC", name).strip()


def labels_by_name(class_names: Sequence[str]) -> dict[str, list[int]]:
    """Returns the labels of each name, with names in their normal form."""
    labels: dict[str, list[int]] = {}
    for label, name in enumerate(class_names):
        labels.setdefault(normal(name), []).append(label)
    return labels


def show_some(items: Sequence[str], most: int = 10) -> str:
    """Returns the first `most` items as text, followed by the number of the others."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def name_classes(class_names: Sequence[str], labels: Sequence[int], which: str = "", most: int = 10) -> str:
    """Describes labels: [0, 7] -> "2 classes: 0 ('cat'), 7 ('dog')"; `which` is inserted after "classes"."""
    named = [f"{label} ({class_names[label]!r})" for label in labels]
    return f"{len(labels)} class{'' if len(labels) == 1 else 'es'}{which}: {show_some(named, most)}"


def is_object_path(text: str) -> bool:
    """True if the text is the path of an object, "my_module.MyCodec", and not an existing file or folder."""
    return "." in text and all(map(str.isidentifier, text.split("."))) and not Path(text).exists()
