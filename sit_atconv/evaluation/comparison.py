"""Comparison of evaluations: scores and errors, differences to a baseline, differing protocols."""

import csv
import glob
import io
import itertools
import os
import re
import shlex
import textwrap
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sit_atconv.evaluation.metrics import METRICS, find_metric, kind_of, kinds_of_scores
from sit_atconv.evaluation.records import (
    Evaluation,
    difference,
    is_measured_alike,
    protocol_differences,
    read_evaluation,
)
from sit_atconv.evaluation.scores import Score
from sit_atconv.runtime.installation import command
from sit_atconv.runtime.settings import flatten

SAMPLER = "samples.sampler"
NOTE = """\
± is the standard error for drawing other samples; the reference is fixed. Errors of differences are paired where both
runs drew the same noise and labels. Bold differences exceed two standard errors. Where the number of samples,
reference, extractor or image size has changed the score, there is no difference. Training with another seed moves FID
more than drawing other samples: gaps under about 1.3 % of FID are inconclusive without several training seeds
(arXiv 2606.20536)."""


@dataclass(frozen=True)
class Run:
    """An evaluation and its name in the comparison."""

    name: str
    evaluation: Evaluation

    @property
    def model(self) -> Path:
        """Folder of the training run, as far as the recorded paths tell."""
        path = self.evaluation.subject.get("ckpt") or self.evaluation.subject.get("path") or ""
        return Path(re.sub(r"/(checkpoints/step-|samples/step)\d.*", "", path))

    @property
    def place(self) -> str | None:
        """Hardware that drew the samples: "cuda x 8"."""
        device, processes = (self.evaluation.subject.get(name) for name in ("device", "processes"))
        return device and f"{device} x {processes or 1}"

    @property
    def speed(self) -> float | None:
        """Images per second."""
        return self.evaluation.subject.get("images_per_second")


@dataclass(frozen=True)
class Comparison:
    """Runs, the baseline among them, and the score that is compared: "FID-1000"."""

    runs: list[Run]
    baseline: Run
    metric: str

    def is_measured_alike(self, run: Run) -> bool:
        """True if the run's score may be subtracted from the baseline's."""
        return is_measured_alike(self.baseline.evaluation, run.evaluation, self.metric)

    def difference(self, run: Run) -> Score | None:
        """Returns the run's score minus the baseline's, or None if they are not comparable."""
        if run is self.baseline or not self.is_measured_alike(run):
            return None
        return difference(run.evaluation, self.baseline.evaluation, self.metric)


def read_comparison(
    sources: Sequence[Path], names: Sequence[str] | None, baseline: str, metric: str, messages: list[str]
) -> Comparison:
    """Reads evaluations; takes arguments of `compare`, and appends skipped sources to `messages`."""
    paths = find_evaluations(sources, messages)
    evaluations = [read_evaluation(path) for path in paths]
    names = [" ".join(name.split()) for name in names or distinct_names(paths_to_name(paths))]  # on one line
    if len(names) != len(paths):
        raise ValueError(
            f"{len(names)} names for {len(paths)} evaluations: give one for each of "
            f"{', '.join(distinct_names(paths_to_name(paths)))}"
        )
    if len({*names, ""}) != len(names) + 1:
        raise ValueError(
            f"the names {', '.join(map(repr, names))} are not distinct, or empty: give each evaluation its own"
        )
    runs = [Run(name, evaluation) for name, evaluation in zip(names, evaluations, strict=True)]
    meant = [run for number, run in enumerate(runs, 1) if baseline in (str(number), run.name)]
    if len(meant) > 1:
        raise ValueError(
            f"--baseline {baseline} is ambiguous: it is the number of run {runs[int(baseline) - 1].name} "
            "and the name of another; give --names that are not numbers"
        )
    if not meant:
        raise ValueError(
            f"there is no run {baseline!r} to be the baseline: give a number from 1 to {len(runs)}, or "
            f"one of the names {', '.join(names)}"
        )
    scores = meant[0].evaluation.scores
    kinds = find_metric(metric).scores if metric in METRICS or "." in metric else (metric,)
    found = [metric] if metric in scores else [name for name in scores if kind_of(name) in kinds]
    if not found:
        raise ValueError(
            f"the baseline {meant[0].name} has no {metric}: give --metric one of "
            f"{', '.join(scores)}, or another --baseline"
        )
    return Comparison(runs, meant[0], found[0])


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


def in_words(a: Evaluation, b: Evaluation) -> str:
    """Returns the differences of two protocols in words: "labels random → balanced; num 50000 → 10000"."""
    found = protocol_differences(a, b)
    then, now = (any(name.startswith(f"{SAMPLER}.") for name in flatten(e.protocol)) for e in (a, b))
    if then != now:
        found = {name: pair for name, pair in found.items() if not name.startswith(SAMPLER)}
        found[SAMPLER] = ("known", "unknown") if then else ("unknown", "known")
    return "; ".join(f"{short(name)} {said(old)} → {said(new)}" for name, (old, new) in found.items())


def short(name: str) -> str:
    """Shortens a name in a protocol: "samples.sampler.cfg" to "cfg", "reference.num" to "reference num"."""
    return name.removeprefix("samples.").removeprefix("sampler.").replace(".", " ").replace("_", " ")


def said(value: object) -> str:
    """Returns the value of a protocol entry in a few characters."""
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, list):
        return textwrap.shorten(f"[{', '.join(map(said, value))}]", 40, placeholder=" ...]")
    text = "none" if value is None else str(value)
    return text[:8] if re.fullmatch("[0-9a-f]{32,}", text) else textwrap.shorten(text, 60, placeholder=" ...")


def shared_protocol(runs: Sequence[Run]) -> dict[str, object]:
    """Returns the protocol entries that all runs agree in, as dotted name -> value."""
    first, *others = (flatten(run.evaluation.protocol) for run in runs)
    return {
        name: value
        for name, value in first.items()
        if value is not None and all(other.get(name) == value for other in others)
    }


def rows(comparison: Comparison) -> list[dict[str, Score | float | str | None]]:
    """Returns the rows of the table, one for each run: column -> value."""
    runs, baseline = comparison.runs, comparison.baseline
    names = sorted(
        dict.fromkeys(name for run in runs for name in run.evaluation.scores),
        key=lambda name: [*kinds_of_scores(), kind_of(name)].index(kind_of(name)),
    )
    show_place = len({run.place for run in runs}) > 1
    return [
        {
            "name": run.name,
            **{name: run.evaluation.scores.get(name) for name in names},
            f"difference in {comparison.metric}": comparison.difference(run),
            "images/s": run.speed,
            **({"sampled on": run.place} if show_place else {}),
            "training step": run.evaluation.subject.get("step"),
            "protocol: baseline → its own": in_words(baseline.evaluation, run.evaluation),
        }
        for run in runs
    ]


def to_markdown(comparison: Comparison) -> str:
    """Returns the table, the protocol entries that all runs share, and a note on reading it."""
    table, shared = rows(comparison), defaultdict(list)
    for name, value in shared_protocol(comparison.runs).items():
        group, _, key = name.replace(SAMPLER, "sampler").partition(".")
        shared[group].append(f"{short(key)} {said(value)}".strip())
    cells = [[_cell(column, value) for column, value in row.items()] for row in table]
    for run, row in zip(comparison.runs, cells, strict=True):
        row[0] += " (baseline)" if run is comparison.baseline else ""
    columns = list(table[0])
    lines = [
        columns,
        ["---" if column in (columns[0], columns[-1]) else "---:" for column in columns],
        *([cell.replace("|", "\\|") for cell in row] for row in cells),
    ]
    return "\n".join(
        [
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            "Shared by all:",
            "",
            *(f"- {group}: {', '.join(values)}" for group, values in shared.items()),
            "",
            NOTE,
            "",
        ]
    )


def _cell(column: str, value: Score | float | str | None) -> str:
    if isinstance(value, Score) and column.startswith("difference"):
        text = f"{'' if value.value < 0 else '+'}{value}"
        return f"**{text}**" if value.error is not None and abs(value.value) > 2 * value.error else text
    if isinstance(value, float):
        return f"{float(f'{value:.4g}'):g}"
    return "" if value is None else str(value)


def to_csv(comparison: Comparison) -> str:
    """Returns the table as CSV with all digits, and a column of its own for each error."""
    table = rows(comparison)
    scores = {
        column
        for row in table
        for column, value in row.items()
        if isinstance(value, Score) or column.startswith("difference")
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [name for column in table[0] for name in ((column, f"error of {column}") if column in scores else (column,))]
    )
    for row in table:
        cells: list[object] = []
        for column, value in row.items():
            pair = (value.value, value.error) if isinstance(value, Score) else (None, None)
            cells += pair if column in scores else (value,)
        writer.writerow(cells)
    return text.getvalue()
