"""Table of token mixers: one entry holds everything that the rest of the package knows about a mixer.

A mixer is a module that maps tokens x (B, N, C) on a grid (H, W), N = H * W in row-major order, to tokens (B, N, C).
Users register their own, `MIXERS.register("pooling", Mixer(...))`, or name it by its path, "my_module.POOLING".
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.nn as nn
from torch import Tensor

from sit_atconv.models.atconv import ATConv
from sit_atconv.models.attention import Attention
from sit_atconv.runtime.tables import Table


@dataclass(frozen=True)
class Mixer:
    """Entry of a token mixer.

    Args:
        build: (hidden_size, config) -> module with `forward(x, grid_size) -> x`; `config` has the arguments of the
            constructor of SiT by name.
        parameters: names of all tensors that its state dict may contain. The first must exist in every variant: it
            identifies the mixer in a state dict. If empty, only a config can tell that a block has this mixer.
        shown: state dict of one mixer -> arguments of the constructor of SiT that can be read off it.
        silent: arguments that the mixer uses and that cannot be read off its state dict.
        spoken: result of `shown` -> name of the mixer in messages; None means its name in the table.
        needs_positions: true if it cannot tell tokens apart; SiT then adds a position embedding by default.
        multiply_adds: (config, grid_size) -> multiply-adds of one sample in linear layers, convolutions and the two
            products of attention; None lets torch count them.
    """

    build: Callable[[int, Mapping], nn.Module]
    parameters: tuple[str, ...] = ()
    shown: Callable[[Mapping[str, Tensor]], dict] = lambda tensors: {}
    silent: tuple[str, ...] = ()
    spoken: Callable[[dict], str] | None = None
    needs_positions: bool = False
    multiply_adds: Callable[[Mapping, tuple[int, int]], int] | None = None


def _atconv_multiply_adds(config: Mapping, grid_size: tuple[int, int]) -> int:
    N, D, taps = math.prod(grid_size), config["hidden_size"], config["kernel_size"] ** 2
    projections, convolution = 2 * N * D * D, taps * N * D
    if config["kernels"] == "static":
        return projections + convolution
    pooling, kernel_proj, kernel_gen = taps * N * D, taps * D * D, taps * taps * D
    return projections + pooling + kernel_proj + kernel_gen + convolution


def _shown_by_atconv(tensors: Mapping[str, Tensor]) -> dict:
    is_static = "static_kernels" in tensors
    if not is_static and "kernel_gen.weight" not in tensors:
        raise ValueError("weights that are not a SiT's: an ATConv has no kernel_gen.weight")
    taps = tensors["static_kernels"].shape[1] if is_static else math.isqrt(tensors["kernel_gen.weight"].numel())
    return {
        "kernel_size": math.isqrt(taps),
        "kernels": "static" if is_static else "dynamic",
        "kernel_inhibition": "learned" if "difference_control" in tensors else "none",
    }


def _spoken_of_atconv(shown: Mapping) -> str:
    without = {"kernels": ("static", "static kernels"), "kernel_inhibition": ("none", "no inhibition")}
    changes = [words for option, (value, words) in without.items() if shown[option] == value]
    return "{kernel_size}x{kernel_size} ATConv".format(**shown) + (f" with {' and '.join(changes)}" if changes else "")


def _attention_multiply_adds(config: Mapping, grid_size: tuple[int, int]) -> int:
    N, D = math.prod(grid_size), config["hidden_size"]
    return 4 * N * D * D + 2 * N * N * D  # qkv and output; q k^T and its product with v


MIXERS = Table(
    "mixer",
    Mixer,
    {
        "atconv": Mixer(
            build=lambda dim, config: ATConv(
                dim,
                config["kernel_size"],
                config["kernel_act"],
                config["kernel_pool"],
                config["kernel_inhibition"],
                config["kernels"],
            ),
            parameters=(
                "x_proj.weight",
                "x_proj.bias",
                "proj.weight",
                "proj.bias",
                "kernel_gen.weight",
                "kernel_gen.bias",
                "kernel_proj.weight",
                "kernel_proj.bias",
                "static_kernels",
                "difference_control",
            ),
            shown=_shown_by_atconv,
            silent=("kernel_act", "kernel_pool"),
            spoken=_spoken_of_atconv,
            multiply_adds=_atconv_multiply_adds,
        ),
        "attention": Mixer(
            build=lambda dim, config: Attention(dim, config["num_heads"], config["qk_norm"]),
            parameters=(
                "qkv.weight",
                "qkv.bias",
                "q_norm.weight",
                "q_norm.bias",
                "k_norm.weight",
                "k_norm.bias",
                "proj.weight",
                "proj.bias",
            ),
            shown=lambda tensors: {"qk_norm": "q_norm.weight" in tensors},
            silent=("num_heads",),
            spoken=lambda shown: "attention" + (" with qk_norm" if shown["qk_norm"] else ""),
            needs_positions=True,
            multiply_adds=_attention_multiply_adds,
        ),
    },
)
PATTERNS = {  # repeated from block 0 on
    "hybrid": ("attention", "atconv"),  # published
    "sparse-hybrid": ("atconv", "atconv", "atconv", "attention", "atconv", "atconv"),
}


def mixer_names(mixer: str | list[str], depth: int) -> list[str]:
    """Returns the name of the token mixer of each block.

    Args:
        mixer: a name in MIXERS or PATTERNS, the path of an entry in an imported module, or a list of `depth` names or
            paths.
        depth: number of blocks.

    Raises:
        ValueError: a mixer is unknown, or the list does not have `depth` entries.
    """
    if isinstance(mixer, str):
        names = list(itertools.islice(itertools.cycle(PATTERNS.get(mixer, (mixer,))), depth))
    else:
        names = list(mixer)
    for name in dict.fromkeys(names):
        if name not in MIXERS and "." not in name:
            known = ", ".join([*PATTERNS, *MIXERS])
            raise ValueError(
                f"mixer must be one of {known}, your own as module.NAME, or a list of these, not {name!r} "
                "(give --import MODULE if a module of yours registers it)"
            )
        MIXERS.find(name)
    if len(names) != depth:
        raise ValueError(f"mixer names {len(names)} blocks, but depth is {depth}")
    return names


def recognise_mixer(tensors: Mapping[str, Tensor]) -> str | None:
    """Returns the name of the mixer that fits a state dict, or None."""
    for name, mixer in MIXERS.items():
        if mixer.parameters and mixer.parameters[0] in tensors and tensors.keys() <= set(mixer.parameters):
            return name
    return None
