"""BatchNorm over groups of images, whose size does not depend on processes and micro-batches."""

import functools
from typing import cast

import torch
import torch.nn as nn
from accelerate import Accelerator
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm  # torch has no public name for the base of them all


class NormOfGroups(_BatchNorm):
    """BatchNorm that normalises each of `num_groups` equal parts of its input by itself.

    While the forward passes of a step run, the running statistics are those of the last group (momentum 1), and
    `totals` has their sums over all groups. `settle` then sets the running statistics of the step.
    """

    num_groups: int
    usual_momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    steps: Tensor  # number of steps, as `num_batches_tracked` counts them
    kept: Tensor  # running mean and variance before this step (2, C)
    totals: Tensor  # sums over this step's groups of mean and variance (2, C)

    def start(self, num_groups: int) -> None:
        """Takes over the running statistics of the norm, whose class was changed to this one."""
        self.num_groups, self.usual_momentum, self.momentum = num_groups, self.momentum or 0.1, 1.0
        self.register_buffer("steps", self.num_batches_tracked.clone(), persistent=False)
        self.register_buffer("kept", self.statistics(), persistent=False)
        self.register_buffer("totals", torch.zeros_like(self.kept), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        parts = []
        for group in x.chunk(self.num_groups):
            parts.append(super().forward(group))
            self.totals += self.statistics()
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def statistics(self) -> Tensor:
        """Returns running mean and variance as one tensor (2, C)."""
        return torch.stack([self.running_mean, self.running_var])

    def settle(self, mean: Tensor, updated: Tensor) -> None:
        """Moves the running statistics towards `mean` (2, C), unless `updated` is False."""
        self.kept.copy_(torch.where(updated, self.kept.lerp(mean, self.usual_momentum), self.kept))
        self.running_mean.copy_(self.kept[0])
        self.running_var.copy_(self.kept[1])
        self.num_batches_tracked.copy_(self.steps.add_(updated))
        self.totals.zero_()


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
        self.norms: list[NormOfGroups] = []
        for norm in net.modules():
            if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
                kind: type = type(norm)
                norm.__class__ = _of_groups(kind)
                self.norms.append(cast(NormOfGroups, norm))
                self.norms[-1].start(num_groups)

    @torch.no_grad()
    def settle(self, accelerator: Accelerator, updated: Tensor) -> None:
        """Sets the running statistics at the end of a step, unless `updated`, a 0-d bool, is False."""
        if not self.norms:
            return
        flat = accelerator.reduce(torch.cat([norm.totals for norm in self.norms], 1), "sum") / self.groups_of_step
        means = flat.split([norm.num_features for norm in self.norms], 1)
        for norm, mean in zip(self.norms, means, strict=True):
            norm.settle(mean, updated)
