"""Classes as people give them. One rule for the whole product:

- In Python an int is a label, and a string is a class name.
- On a command line and in a label file bare digits are a label, and any other word is a class name. `name:2` is the
  class named 2, `label:2` the label 2. Where a class is named by digits that are not its label, these digits alone are
  refused, since they could mean either.

Names are compared in one Unicode form and without outer blanks. A name that several classes bear is refused.
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
    """Returns the label that Python code means.

    Args:
        given: a label, or the name of a class.
        class_names: names of labels 0, 1, ...

    Raises:
        ValueError: no class of this label or name, or several of this name; the message says which there are.
    """
    if isinstance(given, str):
        return _label_of_name(given, class_names)
    if not isinstance(given, bool):
        with contextlib.suppress(TypeError):
            return _in_range(operator.index(given), class_names)
    raise ValueError(f"a class is a label or a name, not {given!r}")


def typed_label(text: str, class_names: Sequence[str]) -> int:
    """Returns the label that a word on a command line, or a line of a label file, means.

    Args:
        text: `3`, `label:3`, `tench` or `name:tench`.
        class_names: names of labels 0, 1, ...

    Raises:
        ValueError: as `class_label`, or digits that are both a label and the name of another class.
    """
    text = text.strip()
    kind, _, rest = text.partition(":")
    if kind == "name":
        return _label_of_name(rest, class_names)
    if kind == "label" and not re.fullmatch("-?[0-9]+", rest):
        raise ValueError(f"{text!r} is no label: label: is followed by a number, and name: by a class name")
    if kind == "label":
        return _in_range(int(rest), class_names)
    if not re.fullmatch("-?[0-9]+", text):
        return _label_of_name(text, class_names)
    label = int(text)
    if others := [other for other in _labels_of_name(text, class_names) if other != label]:
        is_label = 0 <= label < len(class_names)
        first = f"the label {label} (class {class_names[label]!r}): label:{label}" if is_label else \
            f"a label, which is out of range (0 ... {len(class_names) - 1})"
        raise ValueError(f"{text} can be {first}, or the class named {text!r} (label {others[0]}): name:{text}. "
                         "Say which")
    return _in_range(label, class_names)


def _in_range(label: int, class_names: Sequence[str]) -> int:
    if not 0 <= label < len(class_names):
        raise ValueError(f"class {label} is out of range: the model knows 0 ... {len(class_names) - 1}")
    return label


_table = functools.lru_cache(maxsize=4)(labels_by_name)  # a label file asks for one name after another


def _labels_of_name(name: str, class_names: Sequence[str]) -> list[int]:
    return _table(tuple(class_names)).get(normal(name), [])


def _label_of_name(name: str, class_names: Sequence[str]) -> int:
    labels = _labels_of_name(name, class_names)
    if len(labels) > 1:
        raise ValueError(f"{len(labels)} classes are named {name!r}: give one of the labels "
                         f"{', '.join(map(str, labels))} instead")
    if not labels:
        near = difflib.get_close_matches(normal(name), map(normal, class_names), n=3, cutoff=0.3) or class_names[:3]
        raise ValueError(f"there is no class {name!r}; near it: {', '.join(map(repr, near))}")
    return labels[0]


def read_labels(path: Path, class_names: Sequence[str]) -> list[int]:
    """Reads the labels of samples 0, 1, ... from a text file with a class on each line, as `typed_label` takes it.

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
            labels.append(typed_label(line, class_names))
        except ValueError as error:
            raise ValueError(f"line {number} of {path}: {error}") from error
    return labels
