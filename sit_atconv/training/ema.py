"""The optimizer's parameter groups, and the averages of what it produces."""

import copy
from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor


def parameter_groups(net: nn.Module, weight_decay: float) -> list[dict]:
    """The trainable parameters: matrices decay; norms, biases, embeddings and `difference_control` do not."""
    tables = {p for module in net.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    trained = [p for p in net.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1 and p not in tables]
    others = [p for p in trained if p.ndim <= 1 or p in tables]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


class Averages:
    """Exponential moving averages of a model's weights, one for each decay, as models of their own.

    Args:
        net: the model being trained; its averages start as copies of it.
        decays: each constant, as in SiT.
        warmup: let them rise from 0.1 instead, min(decay, (1 + step) / (10 + step)).
    """

    def __init__(self, net: nn.Module, decays: Sequence[float], warmup: bool = False):
        self.models = {decay: copy.deepcopy(net).eval().requires_grad_(False) for decay in decays}
        self.warmup = warmup
        trained = [name for name, p in net.named_parameters() if p.requires_grad]
        self.weights = [net.get_parameter(name) for name in trained]
        self.averaged = {decay: [m.get_parameter(name) for name in trained] for decay, m in self.models.items()}

    @property
    def first(self) -> nn.Module:
        """The average of the first decay: what previews and samples are drawn from."""
        return next(iter(self.models.values()))

    @torch.no_grad()
    def update(self, step: int, updated: Tensor) -> None:
        """Follows the weights after a step (0-based), where `updated`, a 0-d bool on their device, is true."""
        for decay, averaged in self.averaged.items():
            if self.warmup:
                decay = min(decay, (1 + step) / (10 + step))
            weight = updated * (1 - decay)  # a tensor, so that the device decides and the host need not wait
            torch._foreach_lerp_(averaged, self.weights, [weight] * len(averaged))
