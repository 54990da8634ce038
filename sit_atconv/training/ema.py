"""Exponential moving averages (EMA) of the weights, kept as separate models during training."""

import copy
from collections.abc import Callable, Sequence

import torch.nn as nn
from torch import Tensor

from sit_atconv.flow.step import move_averages
from sit_atconv.runtime.tables import Table

# (decay, step) -> decay in that step (0-based). A user's own function may give its first argument another meaning,
# such as the relative width of a power function average.
PROFILES: Table[Callable[[float, int], float]] = Table(
    "EMA profile",
    Callable,  # type: ignore[arg-type]  # not a plain class
    {
        "constant": lambda decay, step: decay,  # as in SiT
        "warmup": lambda decay, step: min(decay, (1 + step) / (10 + step)),
    },
)


class Averages:
    """Exponential moving averages of a model's weights, one for each decay.

    Args:
        net: the model being trained; the averages start as copies of it.
        decays: EMA decays in [0, 1), or what a user's own profile takes; each names its average.
        profile: rule by which the decay depends on the step: a name in PROFILES, or the path of a user's function.

    Raises:
        ValueError: `profile` is unknown.
    """

    def __init__(self, net: nn.Module, decays: Sequence[float], profile: str = "constant"):
        self.models = {decay: copy.deepcopy(net).eval().requires_grad_(False) for decay in decays}
        self.decay_at = PROFILES.find(profile)
        trained = [name for name, p in net.named_parameters() if p.requires_grad]
        self.weights = [net.get_parameter(name) for name in trained]
        self.averaged = {decay: [m.get_parameter(name) for name in trained] for decay, m in self.models.items()}

    @property
    def first(self) -> nn.Module:
        """The average of the first decay, from which previews and samples are drawn."""
        return next(iter(self.models.values()))

    def update(self, step: int, updated: Tensor) -> None:
        """Updates the averages after a step (0-based) if `updated`, a 0-d bool on the device, is True."""
        for decay, averaged in self.averaged.items():
            # A tensor, so that the host does not wait for the device to know `updated`.
            move_averages(averaged, self.weights, updated * (1 - self.decay_at(decay, step)))
