"""MeanFlow (arXiv 2505.13447): models that jump from noise to data in one step, or a few.

The average velocity of the flow from time t to r >= t is

    u(x, t, r) = 1 / (r - t) * integral of v(x_s, s) ds from t to r        x_r = x_t + (r - t) u(x_t, t, r)

Differentiated along the flow by its start t it gives what training regresses, without solving the ODE:

    u = v + (r - t) du/dt        du/dt = (d/dx u) v + d/dt u

(The paper's time runs from data to noise, so that its sign is the opposite.) With r = t this is flow matching.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sit_atconv.flow.objective import Objective


@dataclass(frozen=True)
class IntervalDraw:
    """Random draws for a batch. `draw[rows]` is the draw of these samples.

    Args:
        noise: standard normal, (B, C, H, W).
        t: times (B,) at which intervals begin.
        r: times (B,) at which they end; r = t on rows of plain flow matching.
        dropped: True where the label becomes the null label, (B,).
        jumps: True where r > t is trained, (B,), on the CPU: it does not depend on the random numbers.
        share: share of these rows in the whole batch.
    """

    noise: Tensor
    t: Tensor
    r: Tensor
    dropped: Tensor
    jumps: Tensor
    share: float

    def __getitem__(self, rows) -> "IntervalDraw":
        return IntervalDraw(
            self.noise[rows], self.t[rows], self.r[rows], self.dropped[rows], self.jumps[rows], self.share
        )


@dataclass(frozen=True)
class MeanFlow(Objective):
    """MeanFlow (arXiv 2505.13447): jumps from t to r on some rows of a batch, flow matching on the others.

    It needs a model with two times (`model.two_times true`), the linear interpolant, and predicts the velocity. The
    trained model jumps with the solver "jump", and is a flow model for every other solver.

    Args:
        jump_every: every so many rows of the batch, one is trained on a jump; 4 is 25%, 1 is all.
        derivative: "forward" computes du/dt exactly, by forward-mode differentiation. "difference" needs no such rule
            of the mixer: it compares u at t and a share of the way to r (alpha-Flow, arXiv 2510.20771), and needs fp32.
        shares: first and last share of the "difference"; it falls geometrically over `train.steps`.
        tangent: direction of the derivative: "velocity" of the sample, or "model", the model's own velocity (iMF, arXiv
            2512.02012), which varies less and costs another forward of the jumping rows.
        logit_mean: mean of the logit of logit-normal times.
        logit_std: standard deviation of this logit.
        end_logit_mean: the same for r, if it is drawn from another distribution: r is then the larger of t and that
            draw. Without it, t and r are the smaller and the larger of two draws.
        end_logit_std: standard deviation of that logit.
        power: p of the adaptive weight 1 / (error + floor)^p, which has no gradient; 0 is none.
        floor: c of the adaptive weight, in units of the squared error of a value.
        guidance: guidance scale w that is trained into the weights, which are then sampled without guidance; 1 is off.
        guidance_interval: times lo, hi between which it is trained in.
        class_dropout_prob: probability that a label is replaced by the null label, in [0, 1].

    Raises:
        ValueError: a value is out of range, or guidance has no null label to train.
    """

    jump_every: int = 4
    derivative: Literal["forward", "difference"] = "forward"
    shares: tuple[float, float] = (0.1, 0.002)
    tangent: Literal["velocity", "model"] = "velocity"
    logit_mean: float = 0.4
    logit_std: float = 1.0
    end_logit_mean: float | None = None
    end_logit_std: float | None = None
    power: float = 1.0
    floor: float = 1e-3
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    class_dropout_prob: float = 0.1

    def __post_init__(self):
        if self.jump_every < 1:
            raise ValueError(f"flow.jump_every must be at least 1, not {self.jump_every}")
        if not 0 <= self.class_dropout_prob <= 1:
            raise ValueError(f"flow.class_dropout_prob must be in [0, 1], not {self.class_dropout_prob}")
        for name in ("logit_std", "end_logit_std", "floor"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"flow.{name} must be positive and finite, not {value}")
        for name in ("logit_mean", "end_logit_mean", "power"):
            if (value := getattr(self, name)) is not None and not math.isfinite(value):
                raise ValueError(f"flow.{name} must be finite, not {value}")
        if (self.end_logit_mean is None) != (self.end_logit_std is None):
            raise ValueError("flow.end_logit_mean and flow.end_logit_std must be given together, or neither")
        first, last = self.shares
        if not 0 < last <= first <= 1:
            raise ValueError(f"flow.shares must be two falling numbers in (0, 1], not {[*self.shares]}")
        lo, hi = self.guidance_interval
        if not 0 <= lo < hi <= 1:
            raise ValueError(f"flow.guidance_interval must be two increasing times in [0, 1], not {[lo, hi]}")
        if not 1 <= self.guidance < math.inf:
            raise ValueError(f"flow.guidance must be at least 1, which is off, and finite, not {self.guidance}")
        if self.guidance != 1 and self.class_dropout_prob == 0:
            raise ValueError(
                f"flow.guidance {self.guidance:g} needs a null label that is trained: "
                "set flow.class_dropout_prob to 0.1, or flow.guidance to 1"
            )

    def check(self, net, precision: str) -> None:
        """Raises ValueError if the model has one time, or the precision is too low for differences."""
        super().check(net, precision)
        if not net.config.get("two_times"):
            raise ValueError("MeanFlow needs a model with two times: set model.two_times to true")
        if self.derivative == "difference" and precision != "fp32":
            raise ValueError(
                f"flow.derivative difference is only noise in {precision}: set train.precision to fp32 and train.tf32 "
                "to false, or flow.derivative to forward"
            )

    def at(self, progress: float) -> "MeanFlow":
        """Returns the objective of a step: the share of the difference depends on the progress in [0, 1)."""
        first, last = self.shares
        share = first ** (1 - progress) * last**progress
        return self if self.derivative == "forward" else replace(self, shares=(share, share))

    @property
    def period(self) -> int:
        """Number of rows after which one jumps again."""
        return self.jump_every

    @property
    def trained_cfg(self) -> float:
        """Guidance scale that the weights learn."""
        return self.guidance

    @property
    def forwards(self) -> float:
        """Forwards of an image in a step besides the one with gradient."""
        of_jump = 2 + (self.tangent == "model") if self.derivative == "forward" else 1 + (self.tangent == "model")
        return of_jump / self.jump_every + (2 if self.guidance != 1 else 0)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> IntervalDraw:
        """Draws noise, intervals and label dropout for a batch (B, C, H, W), on the generator's device."""
        B, device = shape[0], generator.device
        noise = torch.randn(shape, generator=generator, device=device)
        one, two = torch.randn(2, B, generator=generator, device=device)
        dropped = torch.rand(B, generator=generator, device=device) < self.class_dropout_prob
        t = torch.sigmoid(self.logit_mean + self.logit_std * one)
        if self.end_logit_mean is None or self.end_logit_std is None:
            other = torch.sigmoid(self.logit_mean + self.logit_std * two)
            start, end = torch.minimum(t, other), torch.maximum(t, other)
        else:
            start, end = t, torch.maximum(t, torch.sigmoid(self.end_logit_mean + self.end_logit_std * two))
        # By position and not at random, so that nothing waits for the GPU; micro-batches and processes have the same
        # share where jump_every divides them.
        jumps = torch.arange(B, device="cpu") % self.jump_every == 0
        here = jumps.to(device, non_blocking=True)
        return IntervalDraw(
            noise, torch.where(here, start, t), torch.where(here, end, t), dropped, jumps, jumps.double().mean().item()
        )

    def loss(self, model, data: Tensor, y: Tensor, draw: IntervalDraw, null_label: int | None) -> dict[str, Tensor]:
        """Computes the weighted squared error of each sample, (B,), and the errors of both kinds of rows.

        The target is computed without gradient by the bare module, `model.net`: a derivative through DDP would fail.

        Raises:
            ValueError: `model` does not name its bare module.
        """
        net, t, r = getattr(model, "net", None), draw.t, draw.r
        if net is None:
            raise ValueError("MeanFlow needs model.net, the bare module: keep it if you wrap the model")
        if self.class_dropout_prob > 0:
            assert null_label is not None, "there is no null label to drop labels to"
            y = torch.where(draw.dropped, null_label, y)
        x, v = self.interpolant.interpolate(data, draw.noise, t), self.interpolant.velocity(data, draw.noise, t)
        u = model(x, t, y, r).to(data.dtype)
        error = (u - self.target(net, x, v, y, u, draw, null_label)).square().flatten(1).mean(1)
        weighted = error * (error.detach() + self.floor) ** -self.power
        jumps = draw.jumps.to(x.device, non_blocking=True)
        kinds = {"error_of_flow": (~jumps, 1 - draw.share), "error_of_jumps": (jumps, draw.share)}
        errors = {name: error.detach() * of_kind / share for name, (of_kind, share) in kinds.items() if share}
        return {"loss": weighted, **errors}

    @torch.no_grad()
    def target(
        self, net, x: Tensor, v: Tensor, y: Tensor, u: Tensor, draw: IntervalDraw, null_label: int | None
    ) -> Tensor:
        """Returns what `u` is regressed to: v + (r - t) du/dt (B, C, H, W).

        Args:
            net: (x, t, y, r) -> average velocity, the bare module.
            x: interpolated samples x_t (B, C, H, W).
            v: their velocities (B, C, H, W).
            y: labels (B,), dropped ones replaced.
            u: the model's prediction (B, C, H, W).
            draw: times and rows.
            null_label: label of the null branch, if guidance is trained.
        """
        v = self._guided(net, x, v, draw.t, y, draw.dropped, null_label)
        rows = draw.jumps.nonzero().flatten().to(x.device, non_blocking=True)
        if not len(rows):
            return v
        of_rows = (tensor[rows] for tensor in (x, v, draw.t, draw.r, y, u))
        return v.index_add(0, rows, self._correction(net, *of_rows))

    def _guided(
        self, net, x: Tensor, v: Tensor, t: Tensor, y: Tensor, dropped: Tensor, null_label: int | None
    ) -> Tensor:
        """Returns the velocity (B, C, H, W) to learn: v_null + w (v - v_null) at its fixed point."""
        if self.guidance == 1:
            return v
        assert null_label is not None, "there is no null label to learn guidance with"
        lo, hi = self.guidance_interval
        with_label, without = net(x, t, y, t), net(x, t, torch.full_like(y, null_label), t)
        factor = ((lo <= t) & (t <= hi) & ~dropped) * (1 - 1 / self.guidance)
        return v + _column(factor, v) * (with_label - without)

    def _correction(self, net, x: Tensor, v: Tensor, t: Tensor, r: Tensor, y: Tensor, u: Tensor) -> Tensor:
        """Returns (r - t) du/dt (B, C, H, W) along the flow."""
        tangent = net(x, t, y, t).to(v.dtype) if self.tangent == "model" else v
        if self.derivative == "forward":
            with sdpa_kernel(SDPBackend.MATH):  # the only attention with a forward-mode rule
                du = torch.func.jvp(lambda x, t: net(x, t, y, r), (x, t), (tangent, torch.ones_like(t)))[1]
            return _column(r - t, v) * du
        share, _ = self.shares
        s = t + share * (r - t)
        return (1 / share - 1) * (net(x + _column(s - t, x) * tangent, s, y, r) - u)


def _column(t: Tensor, x: Tensor) -> Tensor:
    """Shapes numbers (B,) to multiply x (B, C, H, W)."""
    return t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
