"""What ATConv is compared with, by name; none is slowed down, and attention stands beside timm's.

A form is a SiT of the preset's size with some token mixer, computed in some way; all else is the same in all forms.

| form | token mixer |
|---|---|
| `attention` | qkv projection, `scaled_dot_product_attention` on (B, heads, N, head_dim), projection |
| `timm` | timm's `Attention`, to show that ours is not a slow one |
| `published` | ATConv in its published formulation: kernel projected from all N tokens, convolution in NCHW |
| `atconv` | ATConv as it is here |
| `hybrid` | `attention` and `atconv` in alternate blocks |
| `floor` | ATConv's two projections and nothing between: what no token mixer of this kind can beat |
| any other in `models/mixers.py` | as it is |

Imports nothing heavy, so that `--help` can list the forms.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

LEVELS = ("op", "mixer", "block", "model", "train", "sampling")  # what is timed


@dataclass(frozen=True)
class Form:
    """One of what is compared; `take` and `twin` name functions of speed/computations.py, mixer -> mixer."""

    title: str  # for people
    mixer: str  # SiT's option of that name
    levels: tuple[str, ...]  # those at which it is timed
    color: str | None = None  # of its line in the chart; None takes a spare one
    take: str = "unchanged"  # returns what is timed
    twin: str | None = None  # returns another computation of the same values; None: there is none
    multiply_adds: Callable[[Mapping, tuple[int, int]], int] | None = None  # of `take`, one sample; None: the mixer's
    bold: bool = False  # in the chart


def _published_multiply_adds(config: Mapping, grid_size: tuple[int, int]) -> int:
    """Three projections of all tokens; pooling is by additions."""
    N, D, taps = math.prod(grid_size), config["hidden_size"], config["kernel_size"] ** 2
    return 3 * N * D * D + taps * taps * D + taps * N * D


FORMS = {
    "attention": Form("attention", "attention", LEVELS, "#3f4a54", twin="of_others"),
    "timm": Form("timm's attention", "attention", ("mixer",), "#a3abb3", "TimmAttention", "unchanged"),
    "published": Form("ATConv as published", "atconv", LEVELS, "#d1722c", "PublishedATConv", "unchanged",
                      _published_multiply_adds),
    "atconv": Form("ATConv", "atconv", LEVELS, "#1f6fb4", twin="of_others", bold=True),
    "hybrid": Form("hybrid", "hybrid", ("model", "train", "sampling"), "#8a5fb5", twin="of_others"),
    "floor": Form("floor (projections only)", "atconv", LEVELS, "#3c9a6b", "FloorMixer", "identity_kernels",
                  lambda config, grid_size: 2 * math.prod(grid_size) * config["hidden_size"] ** 2),
}


def find_form(name: str) -> Form:
    """Returns the form of that name, or the one that a token mixer in the table makes, or in an imported module.

    Raises:
        ValueError: there is neither.
    """
    if name in FORMS:
        return FORMS[name]
    from sit_atconv.models.mixers import MIXERS

    if name not in MIXERS and "." not in name:
        raise ValueError(f"forms must be among {', '.join(FORMS)}, or token mixers of yours, as module.NAME or as a "
                         f"module given by --import registers them, not {name}")
    MIXERS.find(name)
    return Form(name, name, LEVELS[1:])
