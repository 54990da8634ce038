"""Inputs of a comparison: finding the records of evaluations, and short names for them."""

import glob
import itertools
import os
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sit_atconv.runtime.installation import command


def find_evaluations(sources: Sequence[Path], messages: list[str]) -> list[Path]:
    """Returns the absolute paths of the evaluations, each file once.

    Skips sources without one, such as the previews that `runs/*/samples/*` matches, and says so in `messages`.

    Raises:
        ValueError: a source does not exist, or none of them contains an evaluation.
    """
    found: dict[Path, Path] = {}
    others = []
    for source in map(Path, sources):
        if not source.exists():
            raise ValueError(
                f"{source} does not exist: give a JSON file that eval/fid.py wrote, or the folder of "
                "samples that contains it"
            )
        is_meant = len(sources) == 1 and source.is_file()  # then `read_evaluation` says what is wrong with it
        files = evaluations_of(source) or ([source] if is_meant else [])
        for file in files:
            found.setdefault(file.resolve(), Path(os.path.abspath(file)))
        if not files:
            others.append(source)
    if not found and len(others) == 1 and not any(path.is_file() for path in (others[0], *others[0].rglob("*"))):
        raise ValueError(f"{others[0]} contains neither scores-*.json nor samples: give a folder of samples")
    if not found and len(others) == 1:
        raise ValueError(f"{others[0]} contains no scores-*.json: evaluate it first, {_evaluate(others[0])}")
    if not found:
        raise ValueError(
            f"none of these is an evaluation ({_counted(others)}): evaluate samples first, {_evaluate(Path('SAMPLES'))}"
        )
    if others:
        folders = [
            f" (to evaluate {other}: {_evaluate(other)})" for other in others if (other / "manifest.json").is_file()
        ]
        messages.append(f"skipped: {_counted(others)}{folders[0] if folders else ''}")
    return list(found.values())


def evaluations_of(source: Path) -> list[Path]:
    """Returns the files that look like evaluations: in a folder, beside an .npz, or the file itself."""
    if source.is_dir():
        return sorted(source.glob("scores-*.json"))
    if not source.is_file():  # opening a pipe would block forever
        return []
    is_json = source.suffix == ".json"
    if is_json and re.search(r"(^|\.)scores-", source.name):
        return [source]
    with open(source, "rb") as content:
        if b'"scores"' in content.read(-1 if is_json else 4096):
            return [source]
    return sorted(source.parent.glob(f"{glob.escape(source.stem)}.scores-*.json")) if source.suffix == ".npz" else []


def _counted(sources: Sequence[Path]) -> str:
    """Returns "3 PNG files, 2 folders without scores-*.json"."""
    kinds = Counter("folder" if source.is_dir() else f"{source.suffix[1:].upper()} file".strip() for source in sources)
    return ", ".join(
        f"{number} {kind}{'s' * (number > 1)}{' without scores-*.json' * (kind == 'folder')}"
        for kind, number in kinds.items()
    )


def _evaluate(samples: Path) -> str:
    return f"{command('fid')} --samples {shlex.quote(str(samples))} --reference REFERENCE"


def paths_to_name(files: Sequence[Path]) -> list[Path]:
    """Returns the parent folders of scores-*.json if no two files share one, else the files without .json."""
    one_each = len({file.parent for file in files}) == len(files)
    return [file.parent if one_each and file.name.startswith("scores-") else file.with_suffix("") for file in files]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Returns short names: the parts of the paths that differ, without the words that all parts share.

    runs/net-a/samples/cfg1-heun25, runs/net-b/samples/cfg2-heun25 -> a/cfg1, b/cfg2
    """
    if len(paths) < 2:
        return [path.name for path in paths]
    parts = [[part for part in path.parts if part != "samples"] for path in paths]
    above = sum(1 for _ in itertools.takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False)))
    depth = max(map(len, parts))
    levels = zip(*[[""] * (depth - len(own)) + own[above:] for own in parts], strict=True)  # aligned at the last part
    columns = [_without_common(level) for level in levels if len({*level, ""}) > 2]
    names = ["/".join(filter(None, row)) for row in zip(*columns, strict=True)]
    return names if len({*names, ""}) == len(paths) + 1 else list(map(str, paths))


def _without_common(names: Sequence[str]) -> Sequence[str]:
    """Removes the words (separated by dashes) that all names of several words share."""
    words = [name.split("-") for name in names]
    several = [set(each) for each in words if len(each) > 1]
    common = set.intersection(*several) if several else set()
    found = ["-".join(word for word in each if word not in common or len(each) == 1) for each in words]
    none_lost = [bool(name) for name in found] == [bool(name) for name in names]
    return found if none_lost and len(set(found)) == len(set(names)) else names
