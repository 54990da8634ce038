"""Tables of a comparison: Markdown, CSV and JSON."""

import csv
import io
import json
import re
import textwrap
from collections import defaultdict
from collections.abc import Sequence

from sit_atconv.evaluation.comparison import Comparison, Run
from sit_atconv.evaluation.metrics import kind_of, kinds_of_scores
from sit_atconv.evaluation.records import Evaluation, protocol_differences
from sit_atconv.evaluation.scores import Score
from sit_atconv.evaluation.seeds import SeedScore
from sit_atconv.runtime.settings import flatten

SAMPLER = "samples.sampler"
NOTE = """\
For one seed, ± is the standard error for drawing other samples; the reference is fixed. Errors of differences are
paired where both runs drew the same noise and labels. Bold differences exceed two standard errors. Training with
another seed moves FID more than drawing other samples: gaps under about 1.3 % of FID are inconclusive without several
training seeds (arXiv 2606.20536). For several seeds, values are means and ± is the standard error over seeds; the
standard error for drawing other samples is in parentheses, and part of ± where seeds share their noise. Differences
are then paired seed by seed, and bold if their 95 % t interval excludes 0. Where the number of samples, reference,
extractor or image size has changed the score, there is no difference."""


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
        dict.fromkeys(name for run in runs for name in run.scores),
        key=lambda name: [*kinds_of_scores(), kind_of(name)].index(kind_of(name)),
    )
    show_place = len({run.place for run in runs}) > 1
    show_seeds = any(len(run.evaluations) > 1 for run in runs)
    return [
        {
            "name": run.name,
            **({"seeds": len(run.evaluations)} if show_seeds else {}),
            **{name: run.scores.get(name) for name in names},
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
        if isinstance(value, SeedScore):
            low, high = value.interval
            return f"**{text}**" if low > 0 or high < 0 else text
        return f"**{text}**" if value.error is not None and abs(value.value) > 2 * value.error else text
    if isinstance(value, SeedScore) and value.sampling_error:
        return f"{value} ({float(f'{value.sampling_error:.2g}'):g})"
    if isinstance(value, float):
        return f"{float(f'{value:.4g}'):g}"
    return "" if value is None else str(value)


def to_csv(comparison: Comparison) -> str:
    """Returns the table as CSV with all digits, and columns of their own for errors and intervals."""
    table = [_flat(row) for row in rows(comparison)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(column for row in table for column in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def to_json(comparison: Comparison) -> str:
    """Returns baseline, metric and the rows with all digits."""
    facts = {"baseline": comparison.baseline.name, "metric": comparison.metric}
    return json.dumps({**facts, "rows": [_flat(row) for row in rows(comparison)]}, indent=1) + "\n"


def _flat(row: dict[str, Score | float | str | None]) -> dict[str, float | str | None]:
    """Replaces each score of a row by numbers: value, error, and over seeds interval and sampling error."""
    flat: dict[str, float | str | None] = {}
    for column, value in row.items():
        if not isinstance(value, Score):
            flat[column] = value
            if column.startswith("difference"):
                flat[f"error of {column}"] = None
            continue
        flat |= {column: value.value, f"error of {column}": value.error}
        if isinstance(value, SeedScore):
            low, high = value.interval
            flat |= {f"{column}, 95 % from": low, f"{column}, 95 % to": high}
            if value.sampling_error is not None:
                flat[f"sampling error of {column}"] = value.sampling_error
    return flat
