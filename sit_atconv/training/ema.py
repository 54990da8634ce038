"""Exponential moving averages (EMA) of the weights, kept as separate models during training."""

import copy
from collections.abc import Callable, Sequence

import torch.nn as nn
from torch import Tensor

from sit_atconv.checkpoints.power_averages import power_decay
from sit_atconv.flow.step import move_averages
from sit_atconv.runtime.tables import Table

# (decay, step) -> decay in that step (0-based). A user's own function may give its first argument another meaning,
# such as the relative width of a power function average.
PROFILES: Table[Callable[[float, int], float]] = Table(
    "EMA profile",
    Callable,  # type: ignore[arg-type]  # not a plain class
    {
        "constant": lambda decay, step: decay,  # as in SiT
        "power": power_decay,  # of relative width `decay`, as in EDM2
        "warmup": lambda decay, step: min(decay, (1 + step) / (10 + step)),
    },
)


class Averages:
    """Exponential moving averages of a model's weights, one for each decay.

    The trained parameters of an auxiliary loss are averaged, too, in `auxiliary`: decay -> name -> tensor.

    Args:
        net: the model being trained; the averages start as copies of it.
        decays: EMA decays in [0, 1), or what a user's own profile takes; each names its average.
        profile: rule by which the decay depends on the step: a name in PROFILES, or the path of a user's function.
        auxiliary: the auxiliary loss, or None.

    Raises:
        ValueError: `profile` is unknown.
    """

    def __init__(
        self,
        net: nn.Module,
        decays: Sequence[float],
        profile: str = "constant",
        auxiliary: nn.Module | None = None,
    ):
        self.models = {decay: copy.deepcopy(net).eval().requires_grad_(False) for decay in decays}
        self.decay_at = PROFILES.find(profile)
        self.names = trained = [name for name, p in net.named_parameters() if p.requires_grad]
        self.weights: list[Tensor] = [net.get_parameter(name) for name in trained]
        self.averaged: dict[float, list[Tensor]] = {
            decay: [m.get_parameter(name) for name in trained] for decay, m in self.models.items()
        }
        named = auxiliary.named_parameters() if auxiliary is not None else ()
        beside = {name: p for name, p in named if p.requires_grad}
        self.auxiliary = {decay: {name: p.detach().clone() for name, p in beside.items()} for decay in decays}
        self.weights += beside.values()
        for decay, tensors in self.auxiliary.items():
            self.averaged[decay] += tensors.values()

    @property
    def first(self) -> nn.Module:
        """The average of the first decay, from which previews and samples are drawn."""
        return next(iter(self.models.values()))

    def tensors(self) -> dict[float, dict[str, Tensor]]:
        """Returns the trained tensors of each average by name."""
        return {decay: {name: m.get_parameter(name) for name in self.names} for decay, m in self.models.items()}

    def update(self, step: int, updated: Tensor) -> None:
        """Updates the averages after a step (0-based) if `updated`, a 0-d bool on the device, is True."""
        for decay, averaged in self.averaged.items():
            # A tensor, so that the host does not wait for the device to know `updated`.
            move_averages(averaged, self.weights, updated * (1 - self.decay_at(decay, step)))
