"""Exponential moving averages of the weights in training, as models of their own."""

import copy
from collections.abc import Callable, Sequence

import torch.nn as nn
from torch import Tensor

from sit_atconv.flow.step import move_averages
from sit_atconv.runtime.tables import Table

# (decay, step) -> decay in that step (0-based). A user's own function may read its first argument otherwise, such as
# the relative width of a power function average.
PROFILES: Table[Callable[[float, int], float]] = Table("EMA profile", Callable, {
    "constant": lambda decay, step: decay,  # as in SiT
    "warmup": lambda decay, step: min(decay, (1 + step) / (10 + step)),
})


class Averages:
    """Exponential moving averages of a model's weights, one for each decay.

    Args:
        net: the model being trained; its averages start as copies of it.
        decays: names and arguments of the averages.
        profile: how the decay depends on the step; a name in PROFILES, or the path of a user's own function.

    Raises:
        ValueError: an unknown profile.
    """

    def __init__(self, net: nn.Module, decays: Sequence[float], profile: str = "constant"):
        self.models = {decay: copy.deepcopy(net).eval().requires_grad_(False) for decay in decays}
        self.decay_at = PROFILES.find(profile)
        trained = [name for name, p in net.named_parameters() if p.requires_grad]
        self.weights = [net.get_parameter(name) for name in trained]
        self.averaged = {decay: [m.get_parameter(name) for name in trained] for decay, m in self.models.items()}

    @property
    def first(self) -> nn.Module:
        """The average of the first decay: what previews and samples are drawn from."""
        return next(iter(self.models.values()))

    def update(self, step: int, updated: Tensor) -> None:
        """Follows the weights after a step (0-based), where `updated`, a 0-d bool on their device, is true."""
        for decay, averaged in self.averaged.items():
            # A tensor, so that the device decides and the host need not wait.
            move_averages(averaged, self.weights, updated * (1 - self.decay_at(decay, step)))
