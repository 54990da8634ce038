"""Settings as nested dictionaries: flattened to dotted names, and compared in words."""

import re
from collections.abc import Iterable, Mapping

CHECKSUM = re.compile("[0-9a-f]{32,}")


def flatten(nested: Mapping) -> dict[str, object]:
    """{"samples": {"num": 1000}} -> {"samples.num": 1000}"""
    flat = {}
    for name, value in nested.items():
        below = flatten(value) if isinstance(value, Mapping) else None
        flat |= {name: value} if below is None else {f"{name}.{inner}": each for inner, each in below.items()}
    return flat


def changed(then: Mapping, now: Mapping) -> dict[str, tuple[object, object]]:
    """Returns the settings that differ, flat: name -> (then, now). A setting that one side lacks is None there."""
    then, now = flatten(then), flatten(now)
    return {name: (then.get(name), now.get(name)) for name in then | now if then.get(name) != now.get(name)}


def differences(then: Mapping, now: Mapping, ignored: Iterable[str] = ()) -> list[str]:
    """Returns the settings that differ as ["train.lr 0.1 -> 0.2", ...], checksums cut short.

    Args:
        then, now: nested settings.
        ignored: names of settings, or of groups of them, that may differ.
    """
    return [f"{name} {short(old)} -> {short(new)}" for name, (old, new) in changed(then, now).items()
            if not is_among(name, ignored)]


def is_among(name: str, names: Iterable[str]) -> bool:
    """True if `names` holds this setting or a group that it belongs to: "a.b" is among ["a"]."""
    return any(name == other or name.startswith(f"{other}.") for other in names)


def short(value: object) -> str:
    """Returns a value as text, a checksum cut to what people compare."""
    return str(value)[:12] if CHECKSUM.fullmatch(str(value)) else str(value)
