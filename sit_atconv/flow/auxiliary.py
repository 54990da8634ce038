"""Losses beside the objective's: the contract for users' own, and how they see the model's hidden tokens.

    accelerate launch sit_atconv/train.py --auxiliary my_module.MyLoss --auxiliary.coefficient 0.5
"""

import abc

import torch.nn as nn
from torch import Tensor


class AuxiliaryLoss(nn.Module, abc.ABC):
    """A loss that is added to the objective's in training.

    The arguments of a subclass's constructor are the options of the group `auxiliary`. Its parameters, such as those of
    a projector, are trained, averaged over processes, saved and resumed with the model's; exported weights do not have
    them. Make them in `build`, which is called once with the model.

    Attributes:
        block: number of the block, counted from 1, whose output `forward` sees; None if it needs no hidden tokens.
        needs_pixels: whether `forward` sees the images, which cached latents do not hold.
    """

    block: int | None = None
    needs_pixels: bool = False

    def build(self, net: nn.Module) -> None:
        """Makes the parameters; `net.config` says hidden_size, depth and so on."""

    @abc.abstractmethod
    def forward(self, hidden: Tensor | None, data: Tensor, pixels: Tensor | None) -> dict[str, Tensor]:
        """Computes the loss of each sample.

        Args:
            hidden: tokens (B, N, D) after `block`, with gradient; of the first call, if the objective calls the model
                several times.
            data: images or latents (B, C, H, W) that the model learns.
            pixels: images (B, 3, H, W) in [-1, 1] where `needs_pixels`.

        Returns:
            Terms by name, (B,) each, scaled as they shall count. The sum of all is minimised with the objective.
        """


class HiddenTap:
    """A model (x, t, y) that keeps the hidden tokens of its first call with gradient, until they are taken.

    Args:
        model: the model in training.
        block: number of the block, counted from 1; None keeps nothing.
    """

    def __init__(self, model, block: int | None):
        self.model, self.block = model, block
        self.hidden: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.block is None:
            return self.model(x, t, y)
        v, hidden = self.model(x, t, y, return_hidden=self.block)
        if self.hidden is None or not self.hidden.requires_grad:
            self.hidden = hidden
        return v

    def take(self) -> Tensor | None:
        """Returns the hidden tokens, (B, N, D), and forgets them."""
        hidden, self.hidden = self.hidden, None
        return hidden
