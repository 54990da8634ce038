"""BatchNorm over groups of images, whose size does not depend on processes and micro-batches."""

import functools

import torch
import torch.nn as nn
from accelerate import Accelerator
from torch import Tensor


class NormOfGroups:
    """Mixin for a BatchNorm that normalises each of `num_groups` equal parts of its input by itself.

    While the forward passes of a step run, the running statistics hold those of the last group (momentum 1), and their
    sums over all groups are in `totals`. `GroupNorms.settle` then sets the running statistics of the step.
    """

    num_groups: int
    usual_momentum: float
    kept: Tensor  # running mean and variance before this step (2, C)
    totals: Tensor  # sums over this step's groups of their mean and variance (2, C)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:  # type: ignore[attr-defined]
            return super().forward(x)  # type: ignore[misc]
        parts = []
        for group in x.chunk(self.num_groups):
            parts.append(super().forward(group))  # type: ignore[misc]
            self.totals += self.statistics()
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def statistics(self) -> Tensor:
        """Returns running mean and variance as one tensor (2, C)."""
        return torch.stack([self.running_mean, self.running_var])  # type: ignore[attr-defined]


@functools.cache
def _of_groups(kind: type) -> type:
    """Returns the subclass of a BatchNorm class that normalises in groups."""
    return type(f"{kind.__name__}OfGroups", (NormOfGroups, kind), {})


class GroupNorms:
    """All BatchNorms of a model in training, changed in place; the names in its state dict stay the same.

    The published code normalises over the images of one GPU. A group is that batch by another name: the result depends
    on its size, and no longer on the number of processes and micro-batches. Running statistics move once a step, to the
    mean over all groups of the batch.

    Args:
        net: the model, with the running statistics that training starts from.
        num_groups: number of groups in one micro-batch.
        groups_of_step: number of groups in the whole batch.
    """

    def __init__(self, net: nn.Module, num_groups: int, groups_of_step: int):
        self.groups_of_step = groups_of_step
        self.norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.norms = [norm for norm in self.norms if norm.running_mean is not None]
        for norm in self.norms:
            norm.__class__ = _of_groups(type(norm))
            norm.num_groups, norm.usual_momentum, norm.momentum = num_groups, norm.momentum or 0.1, 1.0
            norm.register_buffer("kept", norm.statistics().clone(), persistent=False)
            norm.register_buffer("totals", torch.zeros_like(norm.kept), persistent=False)
        self.steps = [norm.num_batches_tracked.clone() for norm in self.norms]

    @torch.no_grad()
    def settle(self, accelerator: Accelerator, updated: Tensor) -> None:
        """Sets the running statistics at the end of a step, unless `updated`, a 0-d bool, is False."""
        if not self.norms:
            return
        flat = accelerator.reduce(torch.cat([norm.totals for norm in self.norms], 1), "sum") / self.groups_of_step
        means = flat.split([norm.num_features for norm in self.norms], 1)
        for norm, mean, count in zip(self.norms, means, self.steps, strict=True):
            norm.kept.copy_(torch.where(updated, norm.kept.lerp(mean, norm.usual_momentum), norm.kept))
            norm.running_mean.copy_(norm.kept[0])
            norm.running_var.copy_(norm.kept[1])
            norm.num_batches_tracked.copy_(count.add_(updated))
            norm.totals.zero_()
