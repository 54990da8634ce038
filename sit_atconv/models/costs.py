"""Multiply-adds of a SiT from shapes alone, counted as published figures are.

Linear layers, convolutions and the two matrix products of attention count; everything else is free.
"""

import inspect
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn as nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sit_atconv.models.mixers import MIXERS, mixer_names
from sit_atconv.models.sit import SiT

TIME_FEATURES = 256  # width of the sinusoidal embedding of t
DEFAULTS = {
    name: argument.default
    for name, argument in inspect.signature(SiT.__init__).parameters.items()
    if argument.default is not argument.empty
}  # of the constructor of SiT


def multiply_adds(
    model: SiT | Mapping, grid_size: tuple[int, int], of_mixer: Callable[[str], int] | None = None
) -> int:
    """Returns the multiply-adds of one forward of one image.

    Args:
        model: a SiT on any device, or arguments of its constructor; missing ones take their defaults.
        grid_size: (H, W) in tokens.
        of_mixer: function from the name of a mixer to its multiply-adds; None counts each mixer as in SiT.
    """
    if isinstance(model, SiT) and type(model) is not SiT:  # a user's backbone: its parts are unknown
        config, known = model.config, inspect.signature(type(model)).parameters
        x = 1, config["in_channels"], *(config["patch_size"] * n for n in grid_size)
        return _counted(
            f"backbone {type(model).__name__}",
            lambda: type(model)(**{k: config[k] for k in known}),
            lambda net: net(torch.empty(x), torch.empty(1), torch.zeros(1, dtype=torch.long)),
        )
    config = {**DEFAULTS, **(model.config if isinstance(model, SiT) else model)}
    N, D = math.prod(grid_size), config["hidden_size"]
    patch = config["patch_size"] ** 2 * config["in_channels"]
    names = mixer_names(config["mixer"], config["depth"])
    of_mixer = of_mixer or (lambda name: mixer_multiply_adds(name, config, grid_size))
    counts = {name: of_mixer(name) for name in dict.fromkeys(names)}
    embedders = N * patch * D + (TIME_FEATURES * D + D * D) * (2 if config["two_times"] else 1)
    blocks = sum(counts[name] + block_multiply_adds(config, grid_size) for name in names)
    final_layer = 2 * D * D + N * D * patch * (2 if config["learn_sigma"] else 1)
    return embedders + blocks + final_layer


def block_multiply_adds(config: Mapping, grid_size: tuple[int, int]) -> int:
    """Returns the multiply-adds of one block without its token mixer, for a complete `config`."""
    N, D = math.prod(grid_size), config["hidden_size"]
    return 2 * N * D * int(D * config["mlp_ratio"]) + 6 * D * D


def mixer_multiply_adds(name: str, config: Mapping, grid_size: tuple[int, int]) -> int:
    """Returns the multiply-adds of one token mixer, from its entry or else counted by torch.

    Raises:
        ValueError: torch cannot count them without data.
    """
    mixer, N, D = MIXERS.find(name), math.prod(grid_size), config["hidden_size"]
    if mixer.multiply_adds is not None:
        return mixer.multiply_adds(config, grid_size)
    return _counted(f"mixer {name}", lambda: mixer.build(D, config), lambda m: m(torch.empty(1, N, D), grid_size))


def _counted(what: str, build: Callable[[], nn.Module], run: Callable[[nn.Module], object]) -> int:
    """Counts the multiply-adds of a run by torch, on fake tensors (the device "meta" has no autocast)."""
    try:
        with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run(build())
    except (NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the multiply-adds of the {what} cannot be counted without data ({reason}): give its entry `multiply_adds`"
        ) from error
    return counter.get_total_flops() // 2
