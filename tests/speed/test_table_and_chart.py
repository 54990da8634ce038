import dataclasses
import itertools
import math

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from sit_atconv.runtime.environment import describe_environment
from sit_atconv.speed.chart import TITLES, predict, save_chart
from sit_atconv.speed.forms import FORMS
from sit_atconv.speed.options import SpeedOptions
from sit_atconv.speed.results import Comparison, Measurement, growth
from sit_atconv.speed.table import table
from sit_atconv.speed.timing import Rounds


def compared(**changes):
    """Returns made-up measurements in which all forms take different times, some of them almost equal."""
    options = SpeedOptions("Tiny/2", device="cpu", **changes)
    measurements = []

    def add(level, quantity, form, px, ms, **figures):
        grid, rounds = (px // 16, px // 16), Rounds.of([ms, 1.1 * ms, 1.04 * ms])
        measurements.append(
            Measurement(
                level,
                quantity,
                form,
                px,
                grid,
                "fp32",
                options.batch_size(px),
                rounds,
                Rounds.of([1 / ms] * 3),
                **figures,
            )
        )

    for px, level in itertools.product(options.resolutions, options.levels):
        quantities = {"mixer": ["forward", "forward+backward"], "sampling": ["sampling"]}.get(level, ["forward"])
        for quantity, (i, form) in itertools.product(quantities, enumerate(options.forms_of(level))):
            ratios = {} if form == "attention" else {"speedup": Rounds.of([1.5 + i, 1.4, 1.6])}
            figures = {"parameters": 123456, "peak_memory_bytes": 3 * 2**20} if level == "sampling" else {}
            add(level, quantity, form, px, (1 + i // 2 + 0.01 * i) * px**1.5, multiply_adds=px**2, **figures, **ratios)
        if level == "sampling" and options.decoder != "none":
            add(level, "decode", "decoder", px, 0.1 * px)
    check = {"resolution": 32, "dtype": "fp32", "what": "a and b", "error": 3.2e-7}
    return Comparison(options, describe_environment(torch.device("cpu")), [check] * 7, measurements)


@pytest.fixture(scope="module")
def comparison():
    return compared(levels=("sampling", "mixer"), batch_sizes=(4, 2), resolutions=(32, 64), decoder="sd-vae")


def test_the_table_has_a_section_for_each_level_and_a_row_for_each_measurement(comparison):
    text = table(comparison)
    for level, section in zip(("sampling", "mixer"), text.split("\n## ")[1:], strict=True):
        measurements = [m for m in comparison.measurements if m.level == level]
        rows = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| px")]
        assert section.startswith(level) and len(rows) == len(measurements)
        for row, m in zip(rows, measurements, strict=True):
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            assert cells[:5] == [str(m.resolution), "fp32", str(m.batch_size), m.form, m.quantity]
            assert f"{m.milliseconds.median:.4g} ({m.milliseconds.q1:.4g}-{m.milliseconds.q3:.4g})" in cells
            if m.speedup:
                assert f"{m.speedup.median:.2f} ({m.speedup.q1:.2f}-{m.speedup.q3:.2f})" in cells
            if m.peak_memory_bytes:
                assert "123,456" in cells and "3.0" in cells
        assert ("images/s" in section) == (level == "sampling")
    assert "50 Euler steps, cfg 4; decoded by the SD-VAE's architecture with random weights" in text
    assert comparison.environment["hardware"] in text
    assert "7 checks that the forms compute the right values passed; the largest relative error was 3e-07" in text


def test_growth_is_an_exponent_of_the_number_of_tokens():
    def point(side, ms, batch):
        return Measurement(
            "model", "forward", "atconv", 16 * side, (side, side), "fp32", batch, Rounds.of([ms]), Rounds.of([1.0])
        )

    assert growth([point(8, 6.0, 2), point(32, 8 * 16**1.5, 1), point(16, 1e9, 1)]) == pytest.approx(
        math.log(8 * 16**1.5 / 3) / math.log(16)
    )
    assert growth([point(8, 1.0, 1)]) is None


def test_the_prediction_is_proportional_to_multiply_adds_plus_decoding():
    def point(form, px, ms, macs, batch=1):
        return Measurement(
            "sampling",
            "sampling",
            form,
            px,
            (px, px),
            "fp32",
            batch,
            Rounds.of([ms]),
            Rounds.of([1.0]),
            multiply_adds=macs,
        )

    points = [point("atconv", 8, 9.0, 10), point("attention", 16, 1e3, 80), point("attention", 8, 2 * 50.0, 20, 2)]
    expected = {("atconv", 8): 30.0, ("attention", 8): 50.0, ("attention", 16): 4 * 40.0 + 30.0}
    assert predict(points, "attention", {8: 10.0, 16: 30.0}) == pytest.approx(expected)


def drawn(comparison, monkeypatch):
    """Returns the saved figure, its visible panels and a renderer."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: figures.append(self))
    save_chart(comparison, "speed.png")
    (figure,) = figures
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    return figure, [axes for axes in figure.axes if axes.get_visible()], renderer


def overlaps(artists, renderer):
    boxes = [Text.get_window_extent(artist, renderer) for artist in artists]  # without arrows
    return [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]


def test_a_panel_shows_every_form_and_prediction_and_labels_do_not_overlap(comparison, monkeypatch):
    figure, panels, renderer = drawn(comparison, monkeypatch)
    shown = dict.fromkeys((m.level, m.quantity) for m in comparison.measurements if (m.level, m.quantity) in TITLES)
    assert len(panels) == len(shown) == 3
    for axes, (level, quantity) in zip(panels, shown, strict=True):
        points = [m for m in comparison.measurements if (m.level, m.quantity) == (level, quantity)]
        assert axes.get_title(loc="left").startswith(TITLES[level, quantity])
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        solid = [line for line in axes.lines if line.get_linestyle() == "-"]
        forms = list(dict.fromkeys(m.form for m in points))
        unit = 1000 if axes.get_ylabel().startswith("s ") else 1
        for form, line in zip(forms, solid, strict=True):
            expected = [m.ms_per_image.median / unit for m in points if m.form == form]
            assert list(line.get_xdata()) == [32, 64] and list(line.get_ydata()) == pytest.approx(expected)
        dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert len(dashed) == len({m.form for m in points if m.multiply_adds})
        labels = [text for text in axes.texts if isinstance(text, Annotation)]
        assert [label.get_text().split("  ~")[0] for label in labels] == [FORMS[form].title for form in forms]
        assert overlaps(labels, renderer) == []
    (legend,) = figure.legends
    assert comparison.environment["torch"] in legend.get_title().get_text()


def test_one_resolution_has_a_row_for_each_form(monkeypatch):
    one = compared(resolutions=(64,), levels=("model",), forms=("attention", "atconv"))
    _, (axes,), renderer = drawn(one, monkeypatch)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["attention", "ATConv"]
    texts = [text.get_text() for text in axes.texts]
    speedup = one.measurements[1].speedup.median
    assert texts[1].endswith(f"ms, {speedup:.2f}x the speed") and not texts[0].endswith("speed")
    assert overlaps(axes.texts, renderer) == []


def test_where_names_hardware_threads_versions_and_date(comparison):
    environment = comparison.environment | {
        "device": "cuda",
        "hardware": "H200",
        "cuda": "13.2",
        "cpu_threads": 3,
        "date": "2026-01-02T03:04:05",
    }
    compiled = dataclasses.replace(comparison.options, compile=True)
    found = dataclasses.replace(comparison, environment=environment, options=compiled).where
    assert found.startswith("GPU: H200, CPU threads: 3, torch ") and "CUDA 13.2" in found
    assert found.endswith("2026-01-02; 5 interleaved rounds, compiled")
    assert comparison.where.startswith("CPU: ")
