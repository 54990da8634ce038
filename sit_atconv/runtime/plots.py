"""Figures: labelled sample grids, loss curves, values over settings. Needs matplotlib."""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from sit_atconv.runtime.files import write_aside
from sit_atconv.runtime.names import normal


def save_sample_grid(
    images: Sequence[np.ndarray],
    labels: Sequence[int],
    class_names: Sequence[str],
    path: Path,
    title: str,
    columns: int = 10,
) -> None:
    """Saves a grid with one row for each class, its name at the left.

    Args:
        images: N images, uint8 (H, W, 3), as a list or an array.
        labels: their N labels.
        class_names: names of labels 0, 1, ...
        path: the PNG to write.
        title: text above the grid.
        columns: images shown of each class.
    """
    of_label = np.asarray(labels)
    classes = np.unique(of_label)
    height, width, _ = images[0].shape
    gap = max(1, height // 16)
    columns = min(columns, int(np.bincount(of_label).max()))
    mosaic = np.full((len(classes) * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for row, label in enumerate(classes):
        for column, image in enumerate(np.asarray(images)[of_label == label][:columns]):
            top, left = row * (height + gap), column * (width + gap)
            mosaic[top : top + height, left : left + width] = image

    cell = max(0.6, min(2.0, height / 100))  # inches
    figure = Figure(figsize=(columns * cell + 1.6, len(classes) * cell + 0.7), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(mosaic, interpolation="nearest")
    axes.set_yticks([row * (height + gap) + height / 2 for row in range(len(classes))])
    names = [shown_name(class_names[label], label) for label in classes]
    axes.set_yticklabels(names, parse_math=False)  # a name may hold a $
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=9)
    save_figure(figure, path)


def shown_name(name: str, label: int) -> str:
    """Returns the name of a class for a figure; if the font lacks a character, its label and escaped name.

    (matplotlib draws all missing characters as the same box.)
    """
    name = normal(name)
    if name.isprintable() and all(_font().get_char_index(ord(character)) for character in name):
        return name
    escaped = "".join(c if c.isascii() and c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    return f"{label}: {escaped}"[:30]


@functools.cache
def _font() -> FT2Font:
    """Returns the font of figure labels."""
    return get_font(findfont(FontProperties()))


def save_loss_curves(stats: Sequence[dict], path: Path, title: str) -> None:
    """Plots the lines of stats.jsonl: losses over steps, the training loss by time t, scores of samples.

    Without any line it saves nothing.
    """
    if not stats:
        return
    steps = [line["step"] for line in stats]
    figures = dict.fromkeys(name for line in stats for name in line if name.startswith("quality/"))
    scores = [name for name in figures if not name.endswith("/error")]
    figure = Figure(figsize=(16.5 if scores else 11, 3.8), layout="constrained")
    left, right, *more = figure.subplots(1, 3 if scores else 2)
    left.plot(steps, [line["loss"] for line in stats], color="#2a6f97", linewidth=1.2, label="training")
    if held_out := [(line["step"], line["held_out_loss"]) for line in stats if "held_out_loss" in line]:
        left.plot(
            *zip(*held_out, strict=True),
            "o-",
            color="#d1495b",
            markersize=3,
            linewidth=1.2,
            label="held out, EMA weights",
        )
    others = [name for name in stats[-1] if name.startswith("flow/error")]
    for name, color in zip(others, itertools.cycle(("#3c9a6b", "#d1722c", "#8a5fb5"))):
        points = [(line["step"], line[name]) for line in stats if name in line]
        label = name.partition("/")[2].replace("_", " ")
        left.plot(*zip(*points, strict=True), color=color, linewidth=1.2, label=label)
    if held_out or others:
        left.legend(frameon=False)
    left.set_ylabel("loss")
    buckets = max(len(line["loss_by_time"]) for line in stats)
    for bucket in range(buckets):
        points = [(line["step"], line["loss_by_time"][bucket]) for line in stats]
        name = f"t {bucket / buckets:.1f}-{(bucket + 1) / buckets:.1f}"
        right.plot(
            *zip(*[p for p in points if p[1] is not None] or [(steps[0], math.nan)], strict=True),
            color=colormaps["viridis"](bucket / buckets),
            linewidth=1.2,
            label=name,
        )
    right.set_ylabel("training loss by time (0 noise, 1 data)")
    right.legend(frameon=False, fontsize=8)
    for axes in more:
        for name in scores:
            found = [(line["step"], line[name], line.get(f"{name}/error", 0.0)) for line in stats if name in line]
            at, values, errors = zip(*found, strict=True)
            axes.errorbar(at, values, errors, fmt="o-", markersize=3, linewidth=1.2, label=name.partition("/")[2])
        axes.set_ylabel("distance of samples, with its standard error")
        axes.legend(frameon=False, fontsize=8)
    for axes in (left, right, *more):
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        if axes not in more and all(line["loss"] > 0 for line in stats):
            set_log(axes, "y", subs=(1, 1.5, 2, 3, 5, 7))
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path)


def save_accuracy_curves(stats: Sequence[dict], path: Path, title: str) -> None:
    """Plots the lines of a classifier's stats.jsonl: training loss, and accuracies, over steps."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([line["step"] for line in stats], [line["loss"] for line in stats], color="#2a6f97", linewidth=1.2)
    left.set_ylabel("training loss")
    named = {
        "train_top1": ("training, augmented", "#2a6f97"),
        "val_raw_top1": ("validation", "#d1495b"),
        "val_ema_top1": ("validation, EMA weights", "#edae49"),
    }
    for name, (label, color) in named.items():
        if points := [(line["step"], 100 * line[name]) for line in stats if name in line]:
            right.plot(*zip(*points, strict=True), "o-", color=color, markersize=3, linewidth=1.2, label=label)
    if right.lines:
        right.legend(frameon=False)
    right.set_ylabel("top-1 accuracy in %")
    for axes in (left, right):
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path)


@dataclass(frozen=True)
class Point:
    """A point of `save_panels`: its panel and line by name, and its value with half the length of its bar."""

    panel: str
    line: str
    x: float | str
    y: float
    bar: float = math.nan


def save_panels(
    points: Sequence[Point],
    path: Path,
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    band: tuple[str, float, float] | None = None,
) -> None:
    """Plots values with bars over a setting: a panel and a line for each name.

    Args:
        points: the points. Lines join numbers; if any x is a word, points stand above the words.
        path: the PNG to write.
        xlabel, ylabel, title: texts of the figure.
        band: name and bounds of a grey band behind all panels, such as a baseline with its error.
    """
    panels, lines = (list(dict.fromkeys(getattr(point, name) for point in points)) for name in ("panel", "line"))
    words = list(dict.fromkeys(str(point.x) for point in points))
    are_words = any(isinstance(point.x, str) for point in points)
    width = max(4.4, 0.9 * len(words)) if are_words else 4.4
    figure = Figure(figsize=(1.2 + width * len(panels), 4.2 + len(lines) / 12), layout="constrained")
    columns = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for axes, panel in zip(columns, panels, strict=True):
        if band:
            axes.axhspan(max(band[1], 1e-9), band[2], color="0.85", label=band[0])
        for number, name in enumerate(lines):
            own = [point for point in points if (point.panel, point.line) == (panel, name)]
            if not own:
                continue
            if are_words:  # lines side by side above each word
                shift = 0.5 * (number - (len(lines) - 1) / 2) / max(1, len(lines) - 1)
                x = [words.index(str(point.x)) + shift for point in own]
            else:
                own.sort(key=lambda point: point.x)
                x = [float(point.x) for point in own]
            axes.errorbar(
                x,
                [point.y for point in own],
                [point.bar for point in own],
                fmt="o" if are_words else "os^Dv"[number // 10 % 5] + "-",
                markersize=3.5,
                linewidth=1.3,
                capsize=2,
                color=colormaps["tab10"](number % 10),
                label=name,
            )
        axes.set_title(panel, fontsize=9)
        axes.set_xlabel(xlabel)
        if are_words:
            axes.set_xticks(range(len(words)), words, rotation=20, ha="right", fontsize=8)
            axes.set_xlim(-0.6, len(words) - 0.4)
        elif min(numbers := [float(point.x) for point in points]) > 0 and max(numbers) > 4 * min(numbers):
            set_log(axes, "x")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    values = [point.y for point in points]
    if min(values) > 0 and max(values) > 6 * min(values):
        set_log(columns[0], "y")
    columns[0].set_ylabel(ylabel, fontsize=9)
    named = {label: handle for axes in columns for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if len(named) > 1 or "" not in named:
        fitting = int(19 * figure.get_figwidth() / (max(map(len, named)) + 6))  # columns of text in this size
        columns_of_text = dict(ncols=max(1, fitting), frameon=False, fontsize=8)
        figure.legend(named.values(), named.keys(), loc="outside lower center", **columns_of_text)
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path)


def set_log(axes: Axes, name: str, subs: Sequence[float] = (1, 2, 4)) -> None:
    """Makes the "x" or "y" axis logarithmic, with plain numbers at `subs` times the powers of ten."""
    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Moves heights until neighbours are at least `gap` apart, keeping their order.

    The result is the mean of pushing heights up and pushing them down; both keep the gaps, so their mean does, too.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    up, down = list(heights), list(heights)
    for below, above in itertools.pairwise(order):
        up[above] = max(up[above], up[below] + gap)
    for above, below in itertools.pairwise(order[::-1]):
        down[below] = min(down[below], down[above] - gap)
    return [(a + b) / 2 for a, b in zip(up, down, strict=True)]


def save_figure(figure: Figure, path: Path) -> None:
    """Saves a figure as a PNG, atomically."""
    write_aside(path, lambda partial: figure.savefig(partial, dpi=120))
