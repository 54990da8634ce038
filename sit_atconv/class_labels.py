"""Labels as people give them: by number or by name, one after another or in a file."""

import difflib
import operator
from collections.abc import Sequence
from pathlib import Path


def class_label(given: int | str, class_names: Sequence[str]) -> int:
    """A class name, or else a number in range -> the label.

    Raises:
        ValueError: there is no such class; the message says which there are.
    """
    if isinstance(given, str) and given in class_names:
        return class_names.index(given)
    try:
        label = int(given) if isinstance(given, str) else operator.index(given)
    except TypeError:
        raise ValueError(f"a class is a number or a name, not {given!r}") from None
    except ValueError:
        near = difflib.get_close_matches(given, class_names, n=3, cutoff=0.3) or class_names[:3]
        raise ValueError(f"there is no class {given!r}; near it: {', '.join(map(repr, near))}") from None
    if not 0 <= label < len(class_names):
        raise ValueError(f"class {label} is out of range: the model knows 0 ... {len(class_names) - 1}")
    return label


def read_labels(path: Path, class_names: Sequence[str]) -> list[int]:
    """A text file with a number or name on each line -> the labels of samples 0, 1, ...

    Raises:
        ValueError: the file is missing, no text or empty, or a line is no class of the model; the message names it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ValueError(f"labels {path} cannot be read ({reason}): give random, balanced, or a text file with a "
                         "class on each line") from error
    if not lines:
        raise ValueError(f"labels {path} is empty: a class belongs on each line")
    labels = []
    for number, line in enumerate(lines, start=1):
        try:
            labels.append(class_label(line.strip(), class_names))
        except ValueError as error:
            raise ValueError(f"line {number} of {path}: {error}") from error
    return labels
