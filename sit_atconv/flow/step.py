"""Parts of a training step that training, its estimate and the speed comparison have in common."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sit_atconv.flow.objective import Objective
from sit_atconv.runtime.dtypes import torch_dtype


def forward_and_backward(
    objective: Objective, model, data: Tensor, y: Tensor, generator: torch.Generator, precision: str,
    null_label: int | None, scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Adds the gradients of a batch's mean loss to those of the model: one micro-batch of a training step.

    Args:
        objective: gives the loss.
        model: (x, t, y) -> its prediction (B, C, H, W).
        data: images or latents (B, C, H, W).
        y: labels (B,).
        generator: of the objective's draw, on the device of `data`.
        precision: "fp32", "bf16" or "fp16", of the forward pass.
        null_label: label that replaces dropped ones; None if the model has none.
        scaler: scales the loss.
    """
    with torch.autocast(data.device.type, torch_dtype(precision), enabled=precision != "fp32"):
        terms = objective.loss(model, data, y, objective.draw(data.shape, generator), null_label)
    loss = next(iter(terms.values())).mean()
    (loss if scaler is None else scaler.scale(loss)).backward()


@torch.no_grad()
def move_averages(averaged: Sequence[Tensor], weights: Sequence[Tensor], fraction: Tensor) -> None:
    """Moves each average towards its weight by `fraction`, a 0-d tensor on their device."""
    # Private, since torch's foreach functions have no public names.
    torch._foreach_lerp_(averaged, weights, [fraction] * len(averaged))
