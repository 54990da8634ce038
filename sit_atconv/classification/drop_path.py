"""Stochastic depth whose draws are a function of (seed, step, position in the batch)."""

import torch
import torch.nn as nn
from timm.layers import DropPath
from torch import Tensor

from sit_atconv.classification.streams import DROP_PATH, stream_seed


class DrawnDropPath(DropPath):
    """Drop path by given factors (B,): 0 drops an image's path, 1 / (1 - rate) keeps it."""

    factors: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * self.factors.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class DropPaths:
    """All drop paths of a model in training, changed in place.

    Args:
        net: the model, on its device.
        batch_size: images in the whole batch.
        micro_batch: images in one micro-batch.
        seed: the run's seed.
    """

    def __init__(self, net: nn.Module, batch_size: int, micro_batch: int, seed: int):
        device = next(net.parameters()).device
        self.batch_size, self.seed, self.generator = batch_size, seed, torch.Generator(device)
        self.layers = [m for m in net.modules() if isinstance(m, DropPath) and m.drop_prob > 0]
        self.kept = 1 - torch.tensor([layer.drop_prob for layer in self.layers], device=device)
        for layer in self.layers:
            layer.__class__ = DrawnDropPath
            layer.register_buffer("factors", torch.ones(micro_batch, device=device), persistent=False)

    def draw(self, step: int, rows: slice) -> None:
        """Draws for the whole batch of a step, and sets the factors of these rows of it."""
        self.generator.manual_seed(stream_seed(DROP_PATH, self.seed, step))
        shape = len(self.layers), self.batch_size
        drawn = torch.rand(shape, generator=self.generator, device=self.kept.device) < self.kept[:, None]
        for layer, factors in zip(self.layers, (drawn / self.kept[:, None])[:, rows], strict=True):
            layer.factors.copy_(factors)
