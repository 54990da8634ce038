"""Flow matching along an interpolant (SiT, arXiv 2401.08740, sections 2 and 3): the default objective."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sit_atconv.flow.objective import Objective


@dataclass(frozen=True)
class Draw:
    """All that chance decides for a batch. `draw[rows]` is that of some of its samples.

    Args:
        noise: (B, C, H, W), standard normal.
        t: times (B,).
        dropped: whose label becomes the null label, (B,) bool.
    """

    noise: Tensor
    t: Tensor
    dropped: Tensor

    def __getitem__(self, rows) -> "Draw":
        return Draw(self.noise[rows], self.t[rows], self.dropped[rows])


@dataclass(frozen=True)
class FlowMatching(Objective):
    """The training objective: a regression along an interpolant, with label dropout for guidance.

    Args:
        path: the interpolant, "linear", "gvp" or "vp".
        prediction: what the model's output stands for.
        weighting: of the squared error at each time. "none" takes the prediction's as it is (a score's in units of
            noise), "velocity" turns it into the velocity's, "likelihood" into that of the likelihood bound.
        time_sampling: "uniform", or "logit_normal" as in SD3 (arXiv 2403.03206).
        logit_mean: of logit-normal times; above 0 is nearer to data.
        logit_std: of logit-normal times.
        time_shift: s > 1 moves times towards noise, t / (t + s (1 - t)): for a larger resolution SD3 takes the square
            root of the ratio of pixels, 2 from 256 to 512.
        class_dropout_prob: chance of each label to be replaced by the null label, in [0, 1].
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
            raise ValueError(f"flow.class_dropout_prob must lie in [0, 1], not {self.class_dropout_prob}")
        for name in ("time_shift", "logit_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"flow.{name} must be positive and finite, not {getattr(self, name)}")
        if not math.isfinite(self.logit_mean):
            raise ValueError(f"flow.logit_mean must be finite, not {self.logit_mean}")
        if (self.prediction, self.weighting) == ("velocity", "likelihood"):
            raise ValueError("flow.weighting likelihood is infinite at t = 1 for the prediction velocity: "
                             "predict noise, score or data, or set flow.weighting to none")

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Draw:
        """Noise, times and label dropout of a batch (B, C, H, W), on the generator's device."""
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
            y = torch.where(draw.dropped, null_label, y)
        path, noise, t = self.interpolant, draw.noise, draw.t
        output = model(path.interpolate(data, noise, t), t, y).float()
        if self.prediction == "velocity":
            error = output - path.velocity(data, noise, t)
        elif self.prediction == "data":
            error = output - data
        elif self.prediction == "noise":
            error = output - noise
        else:  # a score is -noise / sigma: compared as noise, it is finite
            error = path.noise_from_score(output, t) - noise
        return {"loss": self.weights(t) * error.square().flatten(1).mean(1)}

    def weights(self, t: Tensor) -> Tensor:
        """What each time's squared error is multiplied with, (B,)."""
        if self.weighting == "none":
            return torch.ones_like(t)
        path = self.interpolant
        alpha, sigma = path.alpha(t), path.sigma(t)
        slope = path.d_alpha(t) * sigma - alpha * path.d_sigma(t)
        # By how much the velocity is wrong where the prediction is wrong by one.
        ratio = {"velocity": torch.ones_like(t), "noise": slope / alpha, "score": slope / alpha, "data": slope / sigma}
        weights = ratio[self.prediction] ** 2
        return weights if self.weighting == "velocity" else weights * alpha / (slope * sigma)

