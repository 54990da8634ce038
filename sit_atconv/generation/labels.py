"""Classes as users write them, with the same rule everywhere.

- In Python, an int is a label and a string is a class name.
- On a command line and in a label file, bare digits are a label and any other word is a class name. `name:2` is the
  class named 2, `label:2` is the label 2. If the name of a class is digits that are not its label, these digits alone
  are an error, because they could mean either.

Names are compared in one Unicode form, without blanks at their ends. A name that several classes share is an error.
"""

import contextlib
import difflib
import functools
import operator
import re
from collections.abc import Sequence
from pathlib import Path

from sit_atconv.runtime.names import labels_by_name, normal


def class_label(given: int | str, class_names: Sequence[str]) -> int:
    """Returns the label of a class given in Python; `class_names` are the names of labels 0, 1, ...

    Raises:
        ValueError: no class has this label or name, or several have this name; the message lists the choices.
    """
    if isinstance(given, str):
        return _label_of_name(given, class_names)
    if not isinstance(given, bool):
        with contextlib.suppress(TypeError):
            return _in_range(operator.index(given), class_names)
    raise ValueError(f"a class is a label or a name, not {given!r}")


def typed_label(text: str, class_names: Sequence[str]) -> int:
    """Returns the label of a class typed as `3`, `label:3`, `tench` or `name:tench`.

    Raises:
        ValueError: as `class_label`, or the digits are both a label and the name of another class.
    """
    text = text.strip()
    kind, colon, rest = text.partition(":")
    if colon and kind == "name":
        return _label_of_name(rest, class_names)
    if colon and kind == "label":
        if not re.fullmatch("-?[0-9]+", rest):
            raise ValueError(f"{text!r} is no label: write a number after label:, or a class name after name:")
        return _in_range(int(rest), class_names)
    if not re.fullmatch("-?[0-9]+", text):
        return _label_of_name(text, class_names)
    label = int(text)
    if others := [other for other in _labels_of_name(text, class_names) if other != label]:
        first, remedy = f"a label out of range (0 ... {len(class_names) - 1})", f"name:{text}"
        if 0 <= label < len(class_names):
            first, remedy = f"the label {label} (class {class_names[label]!r})", f"label:{label} or name:{text}"
        raise ValueError(f"{text} can mean {first} or the class named {text!r} (label {others[0]}): write {remedy}")
    return _in_range(label, class_names)


def _in_range(label: int, class_names: Sequence[str]) -> int:
    if not 0 <= label < len(class_names):
        raise ValueError(f"class {label} is out of range: the model knows 0 ... {len(class_names) - 1}")
    return label


_table = functools.lru_cache(maxsize=4)(labels_by_name)  # a label file looks up many names


def _labels_of_name(name: str, class_names: Sequence[str]) -> list[int]:
    return _table(tuple(class_names)).get(normal(name), [])


def _label_of_name(name: str, class_names: Sequence[str]) -> int:
    labels = _labels_of_name(name, class_names)
    if len(labels) > 1:
        raise ValueError(
            f"{len(labels)} classes are named {name!r}: give one of the labels {', '.join(map(str, labels))} instead"
        )
    if not labels:
        near = difflib.get_close_matches(normal(name), map(normal, class_names), n=3, cutoff=0.3) or class_names[:3]
        raise ValueError(f"there is no class {name!r}; similar names: {', '.join(map(repr, near))}")
    return labels[0]


def read_labels(path: Path, class_names: Sequence[str]) -> list[int]:
    """Reads the labels of samples 0, 1, ... from a text file with a class on each line (`typed_label`).

    Raises:
        ValueError: the file is missing, empty or not text, or a line is no class of the model; the message names it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ValueError(
            f"labels {path} cannot be read ({reason}): give random, balanced, or a text file with one class per line"
        ) from error
    if not lines:
        raise ValueError(f"labels {path} is empty: write one class per line")
    labels = []
    for number, line in enumerate(lines, start=1):
        try:
            labels.append(typed_label(line, class_names))
        except ValueError as error:
            raise ValueError(f"line {number} of {path}: {error}") from error
    return labels
