"""Flow matching along an interpolant (SiT, arXiv 2401.08740, sections 2 and 3): the default objective."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sit_atconv.flow.objective import Objective


@dataclass(frozen=True)
class Draw:
    """Random draws for a batch. `draw[rows]` is the draw of these samples.

    Args:
        noise: standard normal, (B, C, H, W).
        t: times (B,).
        dropped: True where the label becomes the null label, (B,).
    """

    noise: Tensor
    t: Tensor
    dropped: Tensor

    def __getitem__(self, rows) -> "Draw":
        return Draw(self.noise[rows], self.t[rows], self.dropped[rows])


@dataclass(frozen=True)
class FlowMatching(Objective):
    """The default objective: regression along an interpolant, with label dropout for guidance.

    Args:
        path: interpolant, "linear", "gvp" or "vp".
        prediction: quantity that the model predicts.
        weighting: weight of the squared error at each time. "none" takes the error of the prediction itself (of a
            score, in units of noise), "velocity" the error of the implied velocity, "likelihood" the likelihood bound.
        time_sampling: distribution of times, "uniform", or "logit_normal" as in SD3 (arXiv 2403.03206).
        logit_mean: mean of the logit of logit-normal times; a mean above 0 moves times towards data.
        logit_std: standard deviation of the logit of logit-normal times.
        time_shift: s > 1 moves times towards noise, t / (t + s (1 - t)). For a larger resolution SD3 takes the square
            root of the ratio of pixels, 2 from 256 to 512.
        class_dropout_prob: probability that a label is replaced by the null label, in [0, 1].
    """

    path: Literal["linear", "gvp", "vp"] = "linear"
    prediction: Literal["velocity", "noise", "score", "data"] = "velocity"
    weighting: Literal["none", "velocity", "likelihood"] = "none"
    time_sampling: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    time_shift: float = 1.0
    class_dropout_prob: float = 0.1

    def __post_init__(self):
        if not 0 <= self.class_dropout_prob <= 1:
            raise ValueError(f"flow.class_dropout_prob must be in [0, 1], not {self.class_dropout_prob}")
        for name in ("time_shift", "logit_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"flow.{name} must be positive and finite, not {getattr(self, name)}")
        if not math.isfinite(self.logit_mean):
            raise ValueError(f"flow.logit_mean must be finite, not {self.logit_mean}")
        if (self.prediction, self.weighting) == ("velocity", "likelihood"):
            raise ValueError(
                "flow.weighting likelihood is infinite at t = 1 for the prediction velocity: "
                "predict noise, score or data, or set flow.weighting to none"
            )

    def check(self, net, precision: str) -> None:
        """Raises ValueError if the model has two times, of which the second would stay untrained."""
        super().check(net, precision)
        if net.config.get("two_times"):
            raise ValueError("model.two_times is true, and FlowMatching trains one time: give --flow MeanFlow")

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Draw:
        """Draws noise, times and label dropout for a batch (B, C, H, W), on the generator's device."""
        device = generator.device
        noise = torch.randn(shape, generator=generator, device=device)
        if self.time_sampling == "logit_normal":
            normal = torch.randn(shape[0], generator=generator, device=device)
            u = torch.sigmoid(self.logit_mean + self.logit_std * normal)
        else:
            u = torch.rand(shape[0], generator=generator, device=device)
        u = u / (u + self.time_shift * (1 - u))
        t0, t1 = self.interpolant.interval(self.prediction, training=True)
        dropped = torch.rand(shape[0], generator=generator, device=device) < self.class_dropout_prob
        return Draw(noise, t0 + (t1 - t0) * u, dropped)

    def loss(self, model, data: Tensor, y: Tensor, draw: Draw, null_label: int | None) -> dict[str, Tensor]:
        """Computes the weighted mean squared error of each sample, (B,)."""
        if self.class_dropout_prob > 0:
            assert null_label is not None, "there is no null label to drop labels to"
            y = torch.where(draw.dropped, null_label, y)
        path, noise, t = self.interpolant, draw.noise, draw.t
        output = model(path.interpolate(data, noise, t), t, y).float()
        if self.prediction == "velocity":
            target = path.velocity(data, noise, t)
        else:
            target = data if self.prediction == "data" else noise
        if self.prediction == "score":  # a score is -noise / sigma, infinite at t = 1: compared as noise, it is finite
            output = path.noise_from_score(output, t)
        return {"loss": self.weights(t) * (output - target).square().flatten(1).mean(1)}

    def weights(self, t: Tensor) -> Tensor:
        """Returns the weight of the squared error at each time, (B,)."""
        if self.weighting == "none":
            return torch.ones_like(t)
        path = self.interpolant
        alpha, sigma = path.alpha(t), path.sigma(t)
        slope = path.d_alpha(t) * sigma - alpha * path.d_sigma(t)
        # The error of the velocity if the error of the prediction is one.
        ratio = {"velocity": torch.ones_like(t), "noise": slope / alpha, "score": slope / alpha, "data": slope / sigma}
        weights = ratio[self.prediction] ** 2
        return weights if self.weighting == "velocity" else weights * alpha / (slope * sigma)
