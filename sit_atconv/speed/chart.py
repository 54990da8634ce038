"""The chart of the speed comparison: measured time, and time if it were proportional to multiply-adds."""

import itertools
import math
from pathlib import Path
from textwrap import wrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from sit_atconv.runtime.plots import set_log, spread
from sit_atconv.speed.forms import find_form
from sit_atconv.speed.results import Comparison, Measurement, growth

SPARE_COLORS = ("#b23a67", "#8a8d2f", "#2b9b98", "#7d5a3c")  # for forms without a color of their own
TITLES = {  # of the panels; other quantities are parts of these and get no panel
    ("op", "forward"): "operator, forward",
    ("op", "backward"): "operator, backward",
    ("mixer", "forward"): "token mixer, forward",
    ("mixer", "forward+backward"): "token mixer, forward and backward",
    ("block", "forward"): "block, forward",
    ("block", "forward+backward"): "block, forward and backward",
    ("model", "forward"): "model, one forward",
    ("train", "step"): "training step",
    ("sampling", "sampling"): "sampling",
    ("jump", "sampling"): "sampling in one jump",
    ("train-jump", "MeanFlow step"): "training step of MeanFlow",
}
DASHES = (0, (4, 3))


def save_chart(comparison: Comparison, path: Path) -> None:
    """Draws time per image against resolution on log scales, a panel for each level, quantity and dtype.

    A form has a line with quartiles, and a dashed line for time proportional to multiply-adds. With one resolution, a
    panel has a row for each form instead.
    """
    options, spare = comparison.options, itertools.cycle(SPARE_COLORS)
    colors = {form: find_form(form).color or next(spare) for form in options.forms}
    panels: dict[tuple[str, str, str], list[Measurement]] = {}
    for level in options.levels:
        for m in comparison.measurements:
            if m.level == level and (level, m.quantity) in TITLES:
                panels.setdefault((level, m.quantity, m.dtype), []).append(m)
    columns = min(len(panels), 2 if len(panels) == 4 else 3)
    rows = math.ceil(len(panels) / columns)
    lines = len(options.resolutions) > 1
    figure = Figure(figsize=(6.2 * columns + 0.8 * (columns == 1), 4.2 * rows + 1.2), layout="constrained")
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, ((level, quantity, dtype), points) in zip(all_axes, panels.items(), strict=False):
        decoding = {
            m.resolution: m.ms_per_image.median
            for m in comparison.measurements
            if (m.level, m.quantity, m.dtype) == (level, "decode", dtype)
        }
        (_draw_lines if lines else _draw_rows)(axes, points, predict(points, options.baseline, decoding), colors)
        title = TITLES[level, quantity]
        if level == "sampling":
            title += f" ({options.steps} Euler steps, cfg {options.cfg:g}, {'' if decoding else 'not '}decoded)"
        axes.set_title(f"{title}, {dtype}", fontsize=10.5, loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y" if lines else "x", color="0.92", zorder=0)
        axes.tick_params(labelsize=9)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)

    figure.suptitle(f"{comparison.title}: time per image", fontsize=13, fontweight="bold")
    start = find_form(options.baseline).title + ("'s first point" if lines else "")
    handles = [
        Line2D(
            [],
            [],
            color="0.25",
            marker="o",
            markersize=5,
            linewidth=1.8,
            label="measured: median, bar from quartile to quartile",
        ),
        Line2D(
            [],
            [],
            color="0.25",
            linewidth=1.1,
            linestyle=DASHES if lines else "",
            marker="" if lines else "D",
            markerfacecolor="white",
            label=f"if time were proportional to multiply-adds, from {start}",
        ),
    ]
    if lines:
        handles.append(Line2D([], [], linestyle="", label="~N$^p$: growth with N tokens, from first point to last"))
    legend = figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=1 if columns == 1 else 3,
        frameon=False,
        fontsize=9,
        title="\n".join(wrap(comparison.where, 62 * (columns + 1))),
    )
    legend.get_title().set(fontsize=7.5, color="0.35")
    figure.savefig(path, format="png", dpi=150)


def predict(points: list[Measurement], baseline: str, decoding: dict[int, float]) -> dict[tuple[str, int], float]:
    """Predicts ms per image by (form, resolution), as if time were proportional to multiply-adds.

    Args:
        points: measurements of one level, quantity and dtype.
        baseline: form whose time at its smallest resolution sets the rate.
        decoding: resolution -> ms per image that decoding adds to every form.
    """
    start = min((m for m in points if m.form == baseline), key=lambda m: m.resolution, default=None)
    if start is None or not start.multiply_adds:  # the floor's operator has none
        return {}
    rate = (start.ms_per_image.median - decoding.get(start.resolution, 0.0)) / start.multiply_adds
    return {
        (m.form, m.resolution): rate * m.multiply_adds + decoding.get(m.resolution, 0.0)
        for m in points
        if m.multiply_adds
    }


def _unit(points: list[Measurement]) -> tuple[str, float]:
    """Returns the unit of a panel and its length in ms."""
    return ("s", 1000.0) if max(m.ms_per_image.median for m in points) > 2000 else ("ms", 1.0)


def _draw_lines(
    axes: Axes, points: list[Measurement], predicted: dict[tuple[str, int], float], colors: dict[str, str]
) -> None:
    unit, ms = _unit(points)
    sides = sorted({m.resolution for m in points})
    ends = {}  # form -> its last time
    for form in dict.fromkeys(m.form for m in points):
        line = sorted((m for m in points if m.form == form), key=lambda m: m.resolution)
        q1, times, q3 = ([getattr(m.ms_per_image, name) / ms for m in line] for name in ("q1", "median", "q3"))
        axes.plot(
            sides,
            times,
            color=colors[form],
            marker="o",
            markersize=4.5,
            linewidth=1.8,
            zorder=4 if find_form(form).bold else 3,
        )
        axes.vlines(sides, q1, q3, color=colors[form], linewidth=4, alpha=0.5, zorder=3)
        if (form, sides[0]) in predicted:
            axes.plot(
                sides,
                [predicted[form, side] / ms for side in sides],
                color=colors[form],
                linewidth=1.1,
                linestyle=DASHES,
                alpha=0.8,
                zorder=2,
            )
        ends[form] = times[-1], growth(line)

    axes.set(xscale="log", yscale="log", ylabel=f"{unit} per image (lower is better)")
    grids = {m.resolution: "x".join(map(str, m.grid_size)) for m in points}
    axes.set_xticks(sides, [f"{side} px\n{grids[side]} tokens" for side in sides])
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    set_log(axes, "y", subs=(1, 2, 5) if high / low < 1000 else (1,))  # powers of ten alone could be too few ticks

    span = sides[-1] / sides[0]
    axes.set_xlim(sides[0] / span**0.06, sides[-1] * span**0.62)  # room for the labels
    places = spread([math.log(time) for time, _ in ends.values()], 0.062 * math.log(high / low))
    for (form, (time, power)), place in zip(ends.items(), places, strict=True):
        axes.annotate(
            f"{find_form(form).title}  ~N$^{{{power:.2f}}}$",
            (sides[-1], time),
            (sides[-1] * span**0.07, math.exp(place)),
            va="center",
            fontsize=8.5,
            color=colors[form],
            fontweight="bold" if find_form(form).bold else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": colors[form],
                "linewidth": 0.7,
                "alpha": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 4,
            },
        )


def _draw_rows(
    axes: Axes, points: list[Measurement], predicted: dict[tuple[str, int], float], colors: dict[str, str]
) -> None:
    unit, ms = _unit(points)
    for place, m in enumerate(points):
        time, color = m.ms_per_image, colors[m.form]
        axes.hlines(place, time.q1 / ms, time.q3 / ms, color=color, linewidth=4, alpha=0.5, zorder=3)
        axes.plot(time.median / ms, place, marker="o", markersize=7, color=color, zorder=4)
        if (m.form, m.resolution) in predicted:
            axes.plot(
                predicted[m.form, m.resolution] / ms,
                place,
                marker="D",
                markersize=5,
                color=color,
                markerfacecolor="white",
                zorder=3.5,
            )
        faster = "" if m.speedup is None else f", {m.speedup.median:.2f}x the speed"
        axes.annotate(
            f"{time.median / ms:.3g} {unit}{faster}",
            (time.median / ms, place),
            (0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=color,
        )
    axes.set_xlim(0, 1.4 * max([*predicted.values(), *(m.ms_per_image.q3 for m in points)]) / ms)
    axes.set_yticks(range(len(points)), [find_form(m.form).title for m in points])
    axes.set_ylim(len(points) - 0.5, -0.75)
    axes.set_xlabel(f"{unit} per image at {points[0].resolution} px (lower is better)")
