"""Auxiliary losses: the contract for users' own, and a wrapper that gives them the hidden tokens.

accelerate launch sit_atconv/train.py --auxiliary my_module.MyLoss --auxiliary.coefficient 0.5
"""

import abc

import torch.nn as nn
from torch import Tensor


class AuxiliaryLoss(nn.Module, abc.ABC):
    """Auxiliary loss that is added to the objective's loss in training.

    The constructor's arguments of a subclass are the options of the group `auxiliary`. Its parameters, such as those of
    a projector, are trained, synchronised between processes, saved and resumed with the model's; exported weights do
    not contain them. Create them in `build`, which is called once with the model.

    Attributes:
        block: number of the block, counted from 1, whose output `forward` gets; None if it needs no hidden tokens.
        needs_pixels: True if `forward` needs the images, which cached latents do not contain.
    """

    block: int | None = None
    needs_pixels: bool = False

    def build(self, net: nn.Module) -> None:
        """Creates the parameters; `net.config` holds hidden_size, depth and so on."""

    @abc.abstractmethod
    def forward(self, hidden: Tensor | None, data: Tensor, pixels: Tensor | None) -> dict[str, Tensor]:
        """Computes the loss of each sample.

        Args:
            hidden: tokens (B, N, D) after `block`, with gradient; if the objective calls the model several times,
                those of the first call with gradient.
            data: images or latents (B, C, H, W) that the model learns.
            pixels: images (B, 3, H, W) in [-1, 1] if `needs_pixels`, else None.

        Returns:
            Terms by name, each (B,) and already weighted. Their sum is minimised together with the objective.
        """


class HiddenTap:
    """Wrapper of a model that keeps the hidden tokens of its first call with gradient.

    Args:
        model: the model in training, (x, t, y) or (x, t, y, r).
        net: the bare module of it.
        block: number of the block, counted from 1; None keeps nothing.
    """

    def __init__(self, model, net: nn.Module, block: int | None = None):
        self.model, self.net, self.block = model, net, block
        self.hidden: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.block is None:
            return self.model(*inputs)
        v, hidden = self.model(*inputs, return_hidden=self.block)
        if self.hidden is None or not self.hidden.requires_grad:
            self.hidden = hidden
        return v

    def take(self) -> Tensor | None:
        """Returns the hidden tokens, (B, N, D), and forgets them."""
        hidden, self.hidden = self.hidden, None
        return hidden
