"""Auxiliary losses: the contract, and a wrapper of the model that gives them hidden tokens.

accelerate launch sit_atconv/train.py --auxiliary my_module.MyLoss --auxiliary.coefficient 0.5
"""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor

from sit_atconv.flow.objective import Objective

Extra = Literal["pixels", "features"]


@dataclass(frozen=True, kw_only=True)
class AuxiliaryInputs:
    """One micro-batch, as auxiliary losses see it.

    Args:
        data: images or latents (B, C, H, W) that the model learns.
        y: labels (B,) as the model saw them: dropped ones are the null label.
        hidden: tokens (B, N, D) after the block of the loss, with gradient; None if it names no block. If the objective
            calls the model several times, those of the first call with gradient.
        pixels: images (B, 1 or 3, h, w) in [-1, 1], flipped as `data` is; None unless the loss needs them.
        features: tokens (B, N, width) of an encoder, stored beside the latents; None unless the loss needs them.
        objective: objective of this step.
        draw: its random draws for these samples.
        random: uniform numbers (B,) for the loss's own use, a function of seed and step.
        average: the EMA of the model, without gradient.
    """

    data: Tensor
    y: Tensor
    hidden: Tensor | None
    pixels: Tensor | None
    features: Tensor | None
    objective: Objective
    draw: Any
    random: Tensor
    average: nn.Module


class AuxiliaryLoss(nn.Module, abc.ABC):
    """Auxiliary loss that is added to the objective's loss in training.

    The constructor's arguments of a subclass are the options of the group `auxiliary`. Its parameters, such as those of
    a projector, are trained, averaged, synchronised between processes, saved and resumed with the model's; exported
    weights do not contain them. Frozen parameters are not saved. Create both in `build`, which is called once.

    Attributes:
        enabled: False if the options switch the loss off: the run is then the same as without it.
        block: number of the block, counted from 1, whose output `forward` gets; None if it needs no hidden tokens.
        needs_pixels: True if `forward` needs the images.
        couples_samples: True if the loss of a sample depends on the others of its micro-batch, so that the number of
            processes and micro-batches must not change when a run is resumed.
        features_shape: shape (N, width) of the stored features that `forward` needs; None if it needs none.
        image_shape: shape (C, h, w) of the images, set before `check`.
    """

    enabled: bool = True
    block: int | None = None
    needs_pixels: bool = False
    couples_samples: bool = False
    features_shape: tuple[int, int] | None = None
    image_shape: tuple[int, int, int]

    def check(self, net: Any, features: Mapping | None) -> Extra | None:
        """Returns what `forward` needs besides the latents; called before `build`.

        Args:
            net: the model; `net.config` holds hidden_size, depth and so on.
            features: `encoder`, `weights`, `grid_size` and `width` of the features that are stored beside latents, or
                None.

        Raises:
            ValueError: the loss cannot be computed for this model.
        """
        return "pixels" if self.needs_pixels else None

    def blank_inputs(self, num_images: int, device: torch.device) -> dict[str, Tensor | None]:
        """Returns zeros as `pixels` and `features`, for trials of a step."""
        features = torch.zeros(num_images, *self.features_shape, device=device) if self.features_shape else None
        return {"pixels": torch.zeros(num_images, *self.image_shape, device=device), "features": features}

    def build(self, net: Any) -> None:
        """Creates the parameters."""

    def describe(self) -> dict:
        """Returns what must be unchanged for a run to resume, besides the options: JSON, such as a checksum."""
        return {}

    def is_active(self, step: int) -> bool:
        """True if the loss is computed in this step (0-based); by default, in every step."""
        return True

    def multiply_adds(self, net: Any) -> float:
        """Returns the multiply-adds that this loss adds to a step for each image; by default 0, not counted."""
        return 0.0

    @abc.abstractmethod
    def forward(self, inputs: AuxiliaryInputs) -> dict[str, Tensor]:
        """Computes the loss of each sample.

        Returns:
            Terms by name, each (B,) and already weighted. Their sum is minimised together with the objective.
        """


class HiddenTap:
    """Wrapper of a model that keeps what an auxiliary loss needs: labels and hidden tokens.

    They are those of the first call with gradient since `serve` or `take`.

    Args:
        model: the model in training, (x, t, y) or (x, t, y, r).
        net: the bare module of it.
    """

    def __init__(self, model, net: nn.Module):
        self.model, self.net = model, net
        self.serve(None)

    def serve(self, loss: AuxiliaryLoss | None) -> None:
        """Keeps what `loss` needs from now on; nothing for None."""
        self.is_serving, self.block = loss is not None, None if loss is None else loss.block
        self.kept: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.block is None:
            v, hidden = self.model(*inputs), None
        else:
            v, hidden = self.model(*inputs, return_hidden=self.block)
        has_gradient = self.kept is not None and (self.kept[1] is None or self.kept[1].requires_grad)
        if self.is_serving and not has_gradient:
            self.kept = inputs[2], hidden
        return v

    def take(self) -> tuple[Tensor, Tensor | None]:
        """Returns labels (B,) and hidden tokens (B, N, D) of a call, and forgets them."""
        assert self.kept is not None, "the model was not called"
        kept, self.kept = self.kept, None
        return kept
