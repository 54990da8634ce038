"""Comparison of class names: weights and data may give the same label to different classes."""

from collections.abc import Sequence

from sit_atconv.runtime.names import normal


def changed_names(there: Sequence[str], here: Sequence[str]) -> str | None:
    """Describes the first label whose name differs, and counts the others; None if no name differs."""
    changed = [(i, a, b) for i, (a, b) in enumerate(zip(there, here, strict=False)) if normal(a) != normal(b)]
    if not changed:
        return None
    label, a, b = changed[0]
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    return f"label {label} is {a!r} there, {b!r} here{more}"


def labels_there(there: Sequence[str], here: Sequence[str]) -> list[int] | None:
    """Returns the label in `there` of each name in `here`; None unless both name the same classes once."""
    labels = {normal(name): label for label, name in enumerate(there)}
    wanted = [normal(name) for name in here]
    if not len(there) == len(here) == len(labels) == len(set(wanted)) or labels.keys() != set(wanted):
        return None
    return [labels[name] for name in wanted]
