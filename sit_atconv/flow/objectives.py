"""What is drawn and what is regressed in training (SiT, arXiv 2401.08740, equation 6)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sit_atconv.flow.interpolants import Interpolant, get_interpolant


@dataclass(frozen=True)
class FlowMatching:
    """The training objective: velocity regression along an interpolant, with label dropout for guidance.

    Args:
        path: the interpolant, "linear", "gvp" or "vp".
        prediction: what the model's output stands for.
        class_dropout_prob: chance of each label to be replaced by the null label, in [0, 1].
    """

    path: Literal["linear", "gvp", "vp"] = "linear"
    prediction: Literal["velocity"] = "velocity"
    class_dropout_prob: float = 0.1

    def __post_init__(self):
        if not 0 <= self.class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob must lie in [0, 1], not {self.class_dropout_prob}")

    @property
    def interpolant(self) -> Interpolant:
        return get_interpolant(self.path)

    def loss(self, model, data: Tensor, y: Tensor, generator: torch.Generator, null_label: int | None) -> Tensor:
        """Mean squared error of each sample, (B,).

        Args:
            model: (x, t, y) -> velocity.
            data: images or latents (B, C, H, W).
            y: labels (B,).
            generator: on the device of `data`; the only source of randomness.
            null_label: the label that dropped ones become; None where the model has none (dropout must be 0).
        """
        noise = torch.randn(data.shape, generator=generator, device=data.device, dtype=data.dtype)
        t0, t1 = self.interpolant.interval(self.prediction, training=True)
        t = t0 + (t1 - t0) * torch.rand(len(data), generator=generator, device=data.device)
        if self.class_dropout_prob > 0:
            dropped = torch.rand(len(data), generator=generator, device=data.device) < self.class_dropout_prob
            y = torch.where(dropped, null_label, y)

        x = self.interpolant.interpolate(data, noise, t)
        target = self.interpolant.velocity(data, noise, t)
        return (model(x, t, y).float() - target).square().flatten(1).mean(1)
