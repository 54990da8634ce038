"""Names of classes and files: how they are compared and listed."""

import unicodedata
from collections.abc import Sequence


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
