"""Report of a sweep: tables and charts of its records, averaged over seeds."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from sit_atconv.evaluation.charts import BARS
from sit_atconv.evaluation.compare import write_comparison
from sit_atconv.evaluation.comparison import Comparison, make_comparison, make_runs
from sit_atconv.evaluation.comparison import Run as Row
from sit_atconv.evaluation.metrics import kind_of
from sit_atconv.evaluation.scores import Score
from sit_atconv.evaluation.seeds import SeedScore, difference_of_means, over_seeds
from sit_atconv.runtime.files import write_aside
from sit_atconv.runtime.plots import Point, save_panels
from sit_atconv.studies.plan import Sweep, Value
from sit_atconv.studies.records import Training, read_scores, read_trainings

NFE = "NFE"  # name of the number of evaluations in tables and charts, beside the axes
HELD_OUT = "held-out flow loss"


def report(sweep: Sweep) -> str:
    """Writes the report of the existing records beside their folder.

    sweep.md, compare.csv and compare.json hold tables; PNGs hold charts. Scores of another number of samples have a
    folder of their own.

    Returns:
        The tables as Markdown, and lines on what was written.

    Raises:
        ValueError: no record has the metric of the sweep's file, or a record is damaged or of other options.
    """
    runs = sweep.runs()
    out = sweep.records.parent
    leaves = {leaf.name: leaf for run in runs for leaf in run.leaves}
    scores, trainings = read_scores(leaves.values()), read_trainings(runs)
    if not scores and not trainings:
        return f"{sweep.records} holds no records yet"
    parts, lines = [f"# Sweep {sweep.name}", f"{len(scores)} of {len(leaves)} evaluations"], list[str]()
    if scores:
        chosen = [leaves[name] for name in scores]
        rows = make_runs([*scores.values()], [sweep.label(leaf.settings) for leaf in chosen])
        for number, metric in enumerate(_metrics(sweep, rows)):
            place = out / metric if number else out
            own = [row for row in rows if metric in row.scores]
            comparison = make_comparison(own, _baseline(sweep, own), metric)
            written = write_comparison(comparison, place)
            parts += [f"## {metric}", *filter(None, [pivot(sweep, comparison)]), written.table]
            lines += [line for line in written.messages if not line.startswith("warning:")]  # settings differ by design
            lines += charts(sweep, comparison, place)
    if curves := {run.name: trainings[run.name] for run in runs if run.name in trainings}:
        if any(training.held_out_loss for training in curves.values()):
            parts += ["## Held-out flow loss of the last step", held_out_table(sweep, curves)]
            lines.append(held_out_chart(sweep, curves, out))
        parts += ["## Training speed", speed_table(sweep, curves)]
    text = "\n\n".join(part.strip() for part in parts) + "\n"
    write_aside(out / "sweep.md", text)
    return "\n".join([text, *lines, f"written: {out / 'sweep.md'}"])


def _baseline(sweep: Sweep, rows: Sequence[Row]) -> str:
    """Returns the number of the first row with the settings of report.baseline; "1" if there is none."""
    wanted = sweep.report.get("baseline") or {}
    for number, row in enumerate(rows, 1):
        settings = row.evaluation.subject["sweep"]["settings"]
        if all(settings.get(name) == value for name, value in wanted.items()):
            return str(number)
    return "1"


def _metrics(sweep: Sweep, rows: Sequence[Row]) -> list[str]:
    """Returns the score of the file, or the first score for each number of samples."""
    if metric := sweep.report.get("metric"):
        return [metric]
    kind = kind_of(next(iter(rows[0].scores)))
    return list(dict.fromkeys(name for row in rows for name in row.scores if kind_of(name) == kind))


# -------------------------------------------------------------------------------------------------------- tables


def fact(row: Row, name: str) -> Value | None:
    """Returns a row's value on an axis, or its NFE."""
    if name == NFE:
        evaluations = row.evaluation.subject.get("evaluations")
        return None if evaluations is None else round(evaluations, 2)
    return row.evaluation.subject["sweep"]["settings"].get(name)


def pivot(sweep: Sweep, comparison: Comparison) -> str:
    """Returns the table that report.table describes, with a column for each value of its `columns`.

    The baseline is a line above it. A cell is bold if it is at most two standard errors of the baseline worse.
    """
    layout = sweep.report.get("table")
    if not layout:
        return ""
    along, across = layout["rows"], layout["columns"]
    along = [along] if isinstance(along, str) else along
    baseline = comparison.baseline.scores[comparison.metric]
    cells: dict[tuple, dict[Value, Score]] = {}
    for row in comparison.runs:
        x = fact(row, across)
        if row is not comparison.baseline and x is not None and comparison.metric in row.scores:
            cells.setdefault(tuple(fact(row, name) for name in along), {})[x] = row.scores[comparison.metric]
    named = [*sweep.axes.get(across, ())]  # named values have the order of the file
    columns = sorted({x for line in cells.values() for x in line}, key=lambda x: named.index(x) if x in named else x)
    lines = [
        f"Baseline, {comparison.baseline.name}: {baseline}",
        "",
        f"| {' | '.join(along)} | {' | '.join(x if isinstance(x, str) else f'{across} {x:g}' for x in columns)} |",
        "|---" * len(along) + "|---:" * len(columns) + "|",
    ]
    for values, line in cells.items():
        texts = [_bold(str(line[x]), is_enough(line[x], baseline)) if x in line else "" for x in columns]
        lines.append(f"| {' | '.join('' if v is None else str(v) for v in values)} | {' | '.join(texts)} |")
    return "\n".join(lines)


def is_enough(score: Score, baseline: Score) -> bool:
    """True if a distance is at most two standard errors above the baseline's."""
    return score.value <= baseline.value + 2 * (baseline.error or 0.0)


def held_out_table(sweep: Sweep, trainings: Mapping[str, Training]) -> str:
    """Returns the held-out flow loss of the last step: means over seeds, and paired differences."""
    rows = _by_label(sweep, trainings, lambda training: training.held_out_loss[-1][1])
    lines = ["| trained by | seeds | held-out flow loss | difference |", "|---|---:|---:|---:|"]
    first = next(iter(rows.values()))
    for label, values in rows.items():
        score, difference = over_seeds([Score(value) for value in values.values()]), None
        if values is not first:
            common = [seeds for seeds in values if seeds in first]
            difference = (
                over_seeds([Score(values[seeds] - first[seeds]) for seeds in common])
                if common
                else difference_of_means([*values.values()], [*first.values()])
            )
        text = "" if difference is None else f"{'' if difference.value < 0 else '+'}{difference}"
        is_clear = isinstance(difference, SeedScore) and math.prod(difference.interval) > 0
        lines.append(f"| {label} | {len(values)} | {score} | {_bold(text, is_clear)} |")
    return "\n".join(lines)


def speed_table(sweep: Sweep, trainings: Mapping[str, Training]) -> str:
    """Returns the images per second of training, as each run logged them."""
    rows = _by_label(sweep, trainings, lambda training: training.images_per_second or math.nan)
    lines = ["| trained by | images/s of training |", "|---|---:|"]
    lines += [f"| {label} | {over_seeds([Score(v) for v in values.values()])} |" for label, values in rows.items()]
    if (jobs := max(training.jobs for training in trainings.values())) > 1:
        lines += ["", f"Measured with {jobs} jobs at once: compare speeds with eval/speed.py."]
    return "\n".join(lines)


def _by_label(
    sweep: Sweep, trainings: Mapping[str, Training], value: Callable[[Training], float]
) -> dict[str, dict[tuple, float]]:
    """Returns label -> seeds -> value; the label of the baseline comes first."""
    wanted = sweep.report.get("baseline") or {}
    rows: dict[str, dict[tuple, float]] = {}

    def is_other(training: Training) -> bool:
        settings = training.sweep["settings"]
        return any(name in settings and settings[name] != chosen for name, chosen in wanted.items())

    for training in sorted(trainings.values(), key=is_other):
        settings = training.sweep["settings"]
        seeds = tuple(settings.get(name) for name in sweep.seeds)
        rows.setdefault(sweep.label(settings), {})[seeds] = value(training)
    return rows


def _bold(text: str, is_bold: bool) -> str:
    return f"**{text}**" if is_bold else text


# -------------------------------------------------------------------------------------------------------- charts


def charts(sweep: Sweep, comparison: Comparison, out: Path) -> list[str]:
    """Draws the chart of report.table, or one for each axis with several values; returns a line for each."""
    layout = sweep.report.get("table")
    if layout:
        along = [layout["rows"]] if isinstance(layout["rows"], str) else [*layout["rows"]]
        plans = [(layout["columns"], along[:1], along[1:])]
    else:
        axes = [name for name in sweep.axes if name not in sweep.seeds]
        several = [name for name in axes if len({fact(row, name) for row in comparison.runs}) > 1]
        plans = [(name, [other for other in several if other != name], []) for name in several]
    base, metric, written = comparison.baseline, comparison.metric, []
    score = base.scores[metric]
    reach = 2 * (score.error or 0.0)
    band = (f"{base.name}: two standard errors", score.value - reach, score.value + reach)
    for across, lines, panels in plans:
        named = [*sweep.axes.get(across, ())]  # words have the order of the file
        rows = sorted(comparison.runs, key=lambda row: named.index(x) if (x := fact(row, across)) in named else 0)
        points = [
            Point(_named(row, panels), _named(row, lines), x, row.scores[metric].value, _bar(row.scores[metric]))
            for row in rows
            if (x := fact(row, across)) is not None and metric in row.scores and (row is not base or not layout)
        ]
        if len({point.x for point in points}) < 2:
            continue
        path = out / f"{kind_of(metric).lower()}-over-{across.lower()}.png"
        save_panels(points, path, xlabel=across, ylabel=metric, title=f"sweep {sweep.name}; {BARS}", band=band)
        written.append(f"chart: {path}")
    return written


def _named(row: Row, names: Sequence[str]) -> str:
    """Returns the values of some axes in words: "unipc, shift 1"."""
    facts = [(name, fact(row, name)) for name in names]
    return ", ".join(
        value if isinstance(value, str) else f"{name} {value}" for name, value in facts if value is not None
    )


def _bar(score: Score) -> float:
    if isinstance(score, SeedScore):
        return score.interval[1] - score.value
    return math.nan if score.error is None else 2 * score.error


def _loss_at(step: int, training: Training) -> float:
    return dict(training.held_out_loss).get(step, math.nan)


def held_out_chart(sweep: Sweep, trainings: Mapping[str, Training], out: Path) -> str:
    """Draws the held-out loss over steps, averaged over seeds; returns a line on the file."""
    steps = sorted({step for training in trainings.values() for step, _ in training.held_out_loss})
    points = []
    for step in steps[len(steps) // 5 :]:  # the first fifth would hide the differences of the rest
        rows = _by_label(sweep, trainings, partial(_loss_at, step))
        for label, values in rows.items():
            known = [Score(value) for value in values.values() if math.isfinite(value)]
            if known:
                score = over_seeds(known)
                points.append(Point("", label, float(step), score.value, _bar(score)))
    path = out / "held-out-loss.png"
    save_panels(points, path, xlabel="training step", ylabel=HELD_OUT, title=f"sweep {sweep.name}; {BARS}")
    return f"chart: {path}"
