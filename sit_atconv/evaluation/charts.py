"""Charts of compared evaluations: a score against steps, guidance, training step and speed."""

import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, NullLocator

from sit_atconv.evaluation.comparison import Comparison, Run
from sit_atconv.evaluation.comparison_inputs import distinct_names
from sit_atconv.evaluation.comparison_table import SAMPLER, said, shared_protocol, short
from sit_atconv.evaluation.metrics import kind_of, metric_of
from sit_atconv.evaluation.seeds import SeedScore
from sit_atconv.runtime.plots import save_figure, set_log, spread
from sit_atconv.runtime.settings import flatten

TRENDS = {  # chart -> the setting on its x axis, and the label of that axis
    "steps": (f"{SAMPLER}.steps", "steps of the sampler"),
    "cfg": (f"{SAMPLER}.cfg", "guidance scale"),
    "training": ("step", "training step"),
}
BARS = "bars: two standard errors, or 95 % interval over seeds"
TITLE = ("samples.num", "samples.labels", f"{SAMPLER}.solver", f"{SAMPLER}.steps", f"{SAMPLER}.cfg")  # in this order


@rc_context({"text.parse_math": False})  # a name may contain a $
def draw(comparison: Comparison, out: Path) -> tuple[list[Path], list[str]]:
    """Draws OUT/METRIC-steps.png, -cfg.png, -training.png and pareto.png where there is something to show.

    Deletes charts of an earlier comparison that would now be empty. Draws only runs with the score, reference and
    extractor of the baseline.

    Returns:
        The charts, and notes on runs and charts that are missing, with the reason.
    """
    metric, charts, notes = metric_of(comparison.metric), [], []
    better = metric and ("higher" if metric.higher_is_better else "lower")
    ylabel = f"{comparison.metric} ({better} is better)" if metric else comparison.metric
    runs = [run for run in comparison.runs if comparison.is_measured_alike(run)]
    if others := [run.name for run in comparison.runs if run not in runs]:
        notes.append(f"not in the charts (another score, reference or extractor): {', '.join(others)}")

    for name, (along, xlabel) in TRENDS.items():
        path = out / f"{kind_of(comparison.metric).lower()}-{name}.png"
        if lines := trend(runs, along):
            save_trend(lines, comparison.metric, path, xlabel, ylabel)
            charts.append(path)
        else:
            path.unlink(missing_ok=True)
            notes.append(f"no {path.name}: no two runs differ in the {xlabel} alone")

    path, timed = out / "pareto.png", [run for run in runs if run.speed]
    if len(timed) < 2 or not metric:
        path.unlink(missing_ok=True)
        reason = (
            "fewer than two runs record images per second"
            if metric
            else (
                f"it is unknown whether a higher {comparison.metric} is better: give --import MODULE, the module that "
                "registers its metric"
            )
        )
        return charts, [*notes, f"no {path.name}: {reason}"]
    place = Counter(run.place for run in timed).most_common(1)[0][0]
    notes += [
        f"warning: {run.name} was sampled on {run.place or 'an unknown device'}, most runs on {place}: its speed "
        f"is not comparable, so it is not on the front of {path.name}"
        for run in timed
        if run.place != place
    ]
    save_pareto(timed, comparison.metric, metric.higher_is_better, place, path, ylabel)
    return [*charts, path], notes


def trend(runs: Sequence[Run], along: str) -> list[tuple[str, str, list[tuple[float, Run]]]]:
    """Returns lines of runs whose protocol, weights and seed agree except for the setting `along`.

    Args:
        runs: the runs to join.
        along: dotted name in the protocol, or "step" for training, where the weights differ too.

    Returns:
        For each line its model, the settings that distinguish it, and its points (x, run), at least two different x.
    """
    found = defaultdict(list)
    for run in runs:
        subject = run.evaluation.subject
        facts: dict[str, Any] = {
            "model": str(run.model),
            "step": subject.get("step"),
            **flatten(run.evaluation.protocol),
            "seed": subject.get("seed"),
            "weights": subject.get("weights") or str(run.model),
        }
        x = facts.pop(along, None)
        identity = {**facts, "weights" if along == "step" else "model": None}
        if x is not None:
            found[json.dumps(identity, sort_keys=True)].append((x, run, facts))
    lines = [sorted(line, key=lambda point: point[0]) for line in found.values() if len({x for x, *_ in line}) > 1]
    labels = _distinctions([line[0][2] for line in lines])
    return [(*label, [(x, run) for x, run, _ in line]) for label, line in zip(labels, lines, strict=True)]


def _distinctions(lines: Sequence[dict]) -> list[tuple[str, str]]:
    """Returns the model of each line, and in a few words the settings that distinguish it from the others."""
    names = _model_names([Path(line["model"]) for line in lines])
    differing = [
        name
        for name in dict.fromkeys(itertools.chain(*lines))
        if name not in ("model", "weights") and len({json.dumps(line.get(name)) for line in lines}) > 1
    ]
    labels = [
        (name, ", ".join(f"{short(key)} {said(line.get(key))}" for key in differing))
        for name, line in zip(names, lines, strict=True)
    ]
    if len(set(labels)) < len(labels):  # several EMAs of one training run
        return [
            (name, f"{settings} weights {said(line['weights'])}".strip())
            for (name, settings), line in zip(labels, lines, strict=True)
        ]
    return labels


def _model_names(models: Sequence[Path]) -> list[str]:
    different = list(dict.fromkeys(models))
    names = dict(zip(different, distinct_names(different), strict=True))
    return [names[model] for model in models]


def _value(run: Run, metric: str) -> tuple[float, float]:
    """Returns a row's score and the half of its bar: two standard errors, or the t interval over seeds."""
    score = run.scores[metric]
    if isinstance(score, SeedScore):
        return score.value, score.interval[1] - score.value
    return score.value, math.nan if score.error is None else 2 * score.error


def _title(runs: Sequence[Run]) -> str:
    shared = shared_protocol(runs)
    return ", ".join(f"{short(name)} {said(shared[name])}" for name in TITLE if name in shared)


def save_trend(
    lines: Sequence[tuple[str, str, list[tuple[float, Run]]]], metric: str, path: Path, xlabel: str, ylabel: str
) -> None:
    """Draws the lines of `trend`: one color per setting and one dash style per model.

    With a single setting there is one color per model.
    """
    points = [point for *_, line in lines for point in line]
    runs = [run for _, run in points]
    models, settings = (list(dict.fromkeys(names)) for names in list(zip(*lines, strict=True))[:2])
    figure = Figure(figsize=(8, 4.4 + len(lines) / 15), layout="constrained")
    axes = figure.add_subplot()
    for model, setting, line in lines:
        color, dashes = settings.index(setting), models.index(model)
        if len(settings) == 1:
            color, dashes = dashes, 0
        y, errors = zip(*(_value(run, metric) for _, run in line), strict=True)
        axes.errorbar(
            [x for x, _ in line],
            y,
            errors,
            fmt="os^Dv"[color // 10 % 5],
            linestyle=("-", "--", ":", "-.")[dashes % 4],
            color=colormaps["tab10"](color % 10),
            markersize=4,
            linewidth=1.4,
            capsize=2.5,
            elinewidth=1,
            label=", ".join(filter(None, (model if len(models) > 1 or not setting else "", setting))),
        )
    axes.set_xlabel(xlabel)
    if xlabel == TRENDS["training"][1]:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    elif xlabel == TRENDS["steps"][1]:
        ticks: list[float] = []
        for x in sorted(x for x, _ in points):
            if not ticks or x > 1.15 * ticks[-1]:  # leaves room for the labels
                ticks.append(x)
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    _score_axis(axes, [_value(run, metric)[0] for run in runs], ylabel)
    figure.legend(loc="outside lower center", ncols=2 if len(settings) > 1 else 3, frameon=False, fontsize=8)
    figure.suptitle(_title(runs), fontsize=9)
    save_figure(figure, path)


def _score_axis(axes: Axes, values: Sequence[float], label: str) -> None:
    if min(values) > 0 and max(values) > 6 * min(values):
        set_log(axes, "y", subs=(1, 2, 5))
    axes.set_ylabel(f"{label}\n{BARS}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def pareto_front(points: Sequence[tuple[float, float]], higher: bool = False) -> list[tuple[float, float]]:
    """Returns the Pareto front of points (speed, score), slowest first."""
    front: list[tuple[float, float]] = []
    for speed, score in sorted(points, key=lambda point: (-point[0], -point[1] if higher else point[1])):
        if not front or (score > front[0][1] if higher else score < front[0][1]):
            front.insert(0, (speed, score))
    return front


def save_pareto(
    runs: Sequence[Run], metric: str, higher_is_better: bool, place: str | None, path: Path, ylabel: str
) -> None:
    """Draws score against images per second, names each point, and adds the Pareto front of `place`."""
    figure = Figure(
        figsize=(6.5 + max(len(run.name) for run in runs) / 16, max(5, 2 + len(runs) / 6)), layout="constrained"
    )
    axes = figure.add_subplot()
    points = [(run.speed or math.nan, _value(run, metric)[0]) for run in runs]
    names = _model_names([run.model for run in runs])
    colors = {name: colormaps["tab10"](number % 10) for number, name in enumerate(dict.fromkeys(names))}
    for run, point, name in zip(runs, points, names, strict=True):
        axes.errorbar(
            *point,
            _value(run, metric)[1],
            fmt="o",
            markersize=6,
            capsize=2.5,
            elinewidth=1,
            zorder=3,
            color=colors[name],
            markerfacecolor=colors[name] if run.place == place else "white",
        )
    _score_axis(axes, [score for _, score in points], ylabel)
    set_log(axes, "x", subs=(1, 2, 5))
    axes.set_xlabel("images per second (higher is better)")
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # fixed, so that the front's line does not change them
    own = [point for run, point in zip(runs, points, strict=True) if run.place == place]
    front = pareto_front(own, higher_is_better)
    corners = [(axes.get_xlim()[0], front[0][1]), *front, (front[-1][0], axes.get_ylim()[0 if higher_is_better else 1])]
    axes.plot(*zip(*corners, strict=True), drawstyle="steps-pre", color="0.6", linewidth=1.2, zorder=2)

    at_points = (axes.transScale + axes.transLimits).transform(points)[:, 1].tolist()
    heights = spread(at_points, 0.16 / (figure.get_figheight() - 1.2))
    for run, point, height, name in zip(runs, points, heights, names, strict=True):
        axes.annotate(
            run.name,
            point,
            (1.03, height),
            textcoords="axes fraction",
            verticalalignment="center",
            fontsize=7.5,
            color=colors[name],
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colors[name],
                "linewidth": 0.6,
                "alpha": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 4,
            },
        )

    handles = [Line2D([], [], color="0.6", linewidth=1.2, label=f"Pareto front{f' on {place}' if place else ''}")]
    if len(colors) > 1:
        handles += [Line2D([], [], color=color, marker="o", linestyle="", label=name) for name, color in colors.items()]
    if elsewhere := dict.fromkeys(str(run.place) for run in runs if run.place != place):
        handles.append(
            Line2D(
                [],
                [],
                color="0.3",
                marker="o",
                markerfacecolor="white",
                linestyle="",
                label=f"sampled on {', '.join(elsewhere)}: speed not comparable",
            )
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(_title(runs), fontsize=9)
    save_figure(figure, path)
