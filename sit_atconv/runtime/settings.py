"""Nested settings: flattening to dotted names, and differences as text."""

import re
from collections.abc import Iterable, Mapping

CHECKSUM = re.compile("[0-9a-f]{32,}")


def flatten(nested: Mapping) -> dict[str, object]:
    """Flattens nested settings: {"samples": {"num": 1000}} -> {"samples.num": 1000}."""
    flat: dict[str, object] = {}
    for name, value in nested.items():
        below = flatten(value) if isinstance(value, Mapping) else None
        flat |= {name: value} if below is None else {f"{name}.{inner}": each for inner, each in below.items()}
    return flat


def changed(then: Mapping, now: Mapping) -> dict[str, tuple[object, object]]:
    """Returns the settings that differ as {dotted name: (then, now)}; a missing setting counts as None."""
    old, new = flatten(then), flatten(now)
    return {name: (old.get(name), new.get(name)) for name in old | new if old.get(name) != new.get(name)}


def differences(then: Mapping, now: Mapping, ignored: Iterable[str] = ()) -> list[str]:
    """Returns the settings that differ as ["train.lr 0.1 -> 0.2", ...], with checksums shortened.

    Args:
        then: nested settings before.
        now: nested settings now.
        ignored: names of settings or groups that may differ.
    """
    return [
        f"{name} {short(old)} -> {short(new)}"
        for name, (old, new) in changed(then, now).items()
        if not is_among(name, ignored)
    ]


def is_among(name: str, names: Iterable[str]) -> bool:
    """True if `names` contains this setting or one of its groups: "a.b" is among ["a"]."""
    return any(name == other or name.startswith(f"{other}.") for other in names)


def short(value: object) -> str:
    """Returns a value as text; a checksum is cut to its first 12 digits."""
    return str(value)[:12] if CHECKSUM.fullmatch(str(value)) else str(value)
