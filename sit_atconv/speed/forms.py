"""The compared forms, by name.

A form is a SiT of the preset's size with one token mixer, computed in one way; all else is the same in all forms.
Imports nothing heavy, so that `--help` can list the forms.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

LEVELS = ("op", "mixer", "block", "model", "train", "sampling", "jump", "train-jump")  # what is timed
TWO_TIMES = ("jump", "train-jump")  # levels of MeanFlow models, which have a second time


@dataclass(frozen=True)
class Form:
    """One compared form; `take` and `twin` name functions of a mixer in `speed/computations.py`."""

    title: str  # name in the chart
    mixer: str  # SiT's option `mixer`
    levels: tuple[str, ...]  # levels at which it is timed
    color: str | None = None  # in the chart; None takes a spare one
    take: str = "unchanged"  # returns the module that is timed
    twin: str | None = None  # returns a second computation of the same values; None if there is none
    # (config, grid_size) -> multiply-adds of the timed module for one sample; None counts the mixer itself.
    multiply_adds: Callable[[Mapping, tuple[int, int]], int] | None = None
    bold: bool = False  # stressed in the chart
    options: Mapping[str, str] = field(default_factory=dict)  # further options of SiT


def _published_multiply_adds(config: Mapping, grid_size: tuple[int, int]) -> int:
    """Counts three projections of all tokens; pooling needs additions only."""
    N, D, taps = math.prod(grid_size), config["hidden_size"], config["kernel_size"] ** 2
    return 3 * N * D * D + taps * taps * D + taps * N * D


FORMS = {
    "attention": Form("attention", "attention", LEVELS, "#3f4a54", twin="second_computation"),
    # Shows that our attention is not a slow one.
    "timm": Form("timm's attention", "attention", ("mixer",), "#a3abb3", "TimmAttention", "unchanged"),
    "published": Form(
        "ATConv as published", "atconv", LEVELS, "#d1722c", "PublishedATConv", "unchanged", _published_multiply_adds
    ),
    "atconv": Form("ATConv", "atconv", LEVELS, "#1f6fb4", twin="second_computation", bold=True),
    "hybrid": Form("hybrid", "hybrid", LEVELS[3:], "#8a5fb5", twin="second_computation"),
    "sparse-hybrid": Form("one attention block in six", "sparse-hybrid", LEVELS[3:], twin="second_computation"),
    "no-inhibition": Form("no inhibition", "atconv", LEVELS[3:], options={"kernel_inhibition": "none"}),
    "static": Form("static kernels", "atconv", LEVELS[3:], options={"kernels": "static"}),
    "grid-pool": Form("2-D pooling", "atconv", LEVELS[3:], options={"kernel_pool": "grid"}),
    # ATConv's two projections only: no token mixer with these projections can be faster.
    "floor": Form(
        "floor (projections only)",
        "atconv",
        LEVELS,
        "#3c9a6b",
        "FloorMixer",
        "identity_kernels",
        lambda config, grid_size: 2 * math.prod(grid_size) * config["hidden_size"] ** 2,
    ),
}


DEFAULT_FORMS = ("attention", "timm", "published", "atconv", "hybrid", "floor")


def find_form(name: str) -> Form:
    """Returns the form called `name`, or a new form for the token mixer called `name`.

    Raises:
        ValueError: there is neither.
    """
    if name in FORMS:
        return FORMS[name]
    from sit_atconv.models.mixers import MIXERS

    if name not in MIXERS and "." not in name:
        raise ValueError(
            f"forms must be among {', '.join(FORMS)}, or your own token mixers (as module.NAME, or by "
            f"the name that a module given with --import registers), not {name}"
        )
    MIXERS.find(name)
    return Form(name, name, LEVELS[1:])
