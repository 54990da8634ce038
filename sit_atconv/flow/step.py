"""Parts of a training step that training, `--dry-run` and the speed comparison share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sit_atconv.flow.objective import Objective
from sit_atconv.runtime.dtypes import torch_dtype


def forward_and_backward(
    objective: Objective,
    model,
    data: Tensor,
    y: Tensor,
    generator: torch.Generator,
    precision: str,
    null_label: int | None,
    scaler: torch.amp.GradScaler | None = None,
    auxiliary: Callable[..., dict[str, Tensor]] | None = None,
) -> None:
    """Runs forward and backward of one micro-batch; gradients are added to existing ones.

    Args:
        objective: computes the loss, of which the mean over the batch is minimised.
        model: (x, t, y) -> its prediction (B, C, H, W).
        data: images or latents (B, C, H, W).
        y: labels (B,).
        generator: random numbers for `objective.draw`, on the device of `data`.
        precision: "fp32", "bf16" or "fp16", for autocast in the forward pass.
        null_label: label that replaces dropped ones; None if the model has none.
        scaler: scales the loss in fp16.
        auxiliary: called with the draw after the objective; its terms (B,) are added.
    """
    with torch.autocast(data.device.type, torch_dtype(precision), enabled=precision != "fp32"):
        draw = objective.draw(data.shape, generator)
        terms = objective.loss(model, data, y, draw, null_label)
        added = auxiliary(draw) if auxiliary is not None else {}
    loss = sum((term.mean() for term in added.values()), start=next(iter(terms.values())).mean())
    (loss if scaler is None else scaler.scale(loss)).backward()


@torch.no_grad()
def move_averages(averaged: Sequence[Tensor], weights: Sequence[Tensor], fraction: Tensor) -> None:
    """Moves each average towards its weight by `fraction`, a 0-d tensor on their device."""
    # torch's foreach functions have no public names.
    torch._foreach_lerp_([*averaged], [*weights], [fraction] * len(averaged))
