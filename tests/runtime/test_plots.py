import unicodedata

import numpy as np
import pytest

from sit_atconv.runtime.plots import save_sample_grid, shown_name, spread

NAMES = ["digit 7", "猫", "犬", "🦆 duck", "$x_1$", unicodedata.normalize("NFD", "café"), "a\nb"]


def test_names_that_the_font_lacks_are_told_apart():
    assert [shown_name(name, label) for label, name in enumerate(NAMES)] == [
        "digit 7",
        r"1: \u732b",
        r"2: \u72ac",
        r"3: \U0001f986 duck",
        "$x_1$",
        "café",
        r"6: a\nb",
    ]


@pytest.mark.filterwarnings("error")
def test_a_grid_of_such_names_is_drawn_without_a_warning(tmp_path):
    images = np.zeros((len(NAMES), 8, 8, 3), np.uint8)
    save_sample_grid(images, range(len(NAMES)), NAMES, tmp_path / "grid.png", "all")
    assert (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    "values, placed",
    [
        ([3.0, 1.0, 2.0], [3.0, 1.0, 2.0]),
        ([1.0, 1.0], [0.5, 1.5]),
        ([0.0, 0.2, 5.0, 0.1], [-0.9, 1.1, 5.0, 0.1]),
        ([0.0, 0.9, 1.8], [-0.1, 0.9, 1.9]),
    ],
)
def test_labels_are_spread_about_their_middle(values, placed):
    assert spread(values, 1.0) == pytest.approx(placed)
