"""Interpolants between noise (t = 0) and data (t = 1), SiT (arXiv 2401.08740) section 2.

    x_t = alpha(t) * data + sigma(t) * noise        alpha(0) = sigma(1) = 0, alpha(1) = sigma(0) = 1
    v_t = alpha'(t) * data + sigma'(t) * noise

Any one of velocity, score, noise and data, together with x_t, gives the others: two linear equations in data and noise.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Interpolant:
    """Base class of paths. A subclass defines `alpha`, `sigma` and their derivatives at times t in [0, 1].

    Times are a float, a 0-d tensor, or a tensor (B,) with one time for each sample of the other arguments (B, ...).
    """

    velocity_ends_early = False  # True if the velocity itself is singular at t = 1

    def alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def d_alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def d_sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def interpolate(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns x_t, (B, ...)."""
        alpha, sigma, _, _ = self._coefficients(t, data)
        return alpha * data + sigma * noise

    def velocity(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns v_t = d x_t / dt, (B, ...)."""
        _, _, d_alpha, d_sigma = self._coefficients(t, data)
        return d_alpha * data + d_sigma * noise

    def data_from_velocity(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma, d_alpha, d_sigma = self._coefficients(t, x)
        return (sigma * v - d_sigma * x) / (sigma * d_alpha - d_sigma * alpha)

    def noise_from_velocity(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma, d_alpha, d_sigma = self._coefficients(t, x)
        return (d_alpha * x - alpha * v) / (sigma * d_alpha - d_sigma * alpha)

    def score_from_velocity(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Returns the score, -noise / sigma: infinite at t = 1."""
        return self.score_from_noise(self.noise_from_velocity(v, x, t), t)

    def velocity_from_data(self, data: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Returns the velocity; singular at t = 1, where x does not depend on the noise."""
        alpha, sigma, _, _ = self._coefficients(t, x)
        return self.velocity(data, (x - alpha * data) / sigma, t)

    def velocity_from_noise(self, noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Returns the velocity; singular at t = 0, where x does not depend on the data."""
        alpha, sigma, _, _ = self._coefficients(t, x)
        return self.velocity((x - sigma * noise) / alpha, noise, t)

    def velocity_from_score(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Returns the velocity; singular at t = 0, like `velocity_from_noise`."""
        return self.velocity_from_noise(self.noise_from_score(score, t), x, t)

    def score_from_noise(self, noise: Tensor, t: Tensor) -> Tensor:
        return -noise / self._coefficients(t, noise)[1]

    def noise_from_score(self, score: Tensor, t: Tensor) -> Tensor:
        return -score * self._coefficients(t, score)[1]

    def diffusion(self, x: Tensor, t: Tensor, form: str = "sigma", norm: float = 1.0) -> Tensor:
        """Returns w(t) of the SDE dx = (v + w * score) dt + sqrt(2 w) dW.

        Its marginals are those of the ODE dx = v dt for any w >= 0 (SiT, equation 10). "sbdm" is the diffusion of
        score-based models, infinite at t = 0 on paths whose alpha starts at 0.

        Args:
            x: tensor (B, ...) that w will multiply: gives shape, dtype and device.
            t: 0-d or (B,).
            form: a name in DIFFUSION_FORMS, in any case.
            norm: factor on w; for "decreasing", on the part of it that depends on t.

        Returns:
            w(t), 0-d or (B, 1, ...).

        Raises:
            ValueError: `form` is unknown.
        """
        if form.lower() not in DIFFUSION_FORMS:
            raise ValueError(f"diffusion_form must be one of {DIFFUSION_FORMS}, not {form!r}")
        t = torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float64)
        sigma = self.sigma(t)
        w = {
            "constant": lambda: norm * torch.ones_like(t),
            "sbdm": lambda: norm * (self.d_alpha(t) / self.alpha(t) * sigma**2 - sigma * self.d_sigma(t)),
            "sigma": lambda: norm * sigma,
            "linear": lambda: norm * (1 - t),
            "decreasing": lambda: 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2,
            "increasing-decreasing": lambda: norm * torch.sin(math.pi * t) ** 2,
        }[form.lower()]()
        return _shaped(w, x)

    def interval(
        self, prediction: str = "velocity", training: bool = False, diffusion_form: str | None = None
    ) -> tuple[float, float]:
        """Returns the times (t0, t1) between which all formulas are finite, with SiT's margins.

        Args:
            prediction: quantity that the model predicts.
            training: True for training times, False for sampling.
            diffusion_form: diffusion form of an SDE, which needs the score; None for the ODE.
        """
        if self.velocity_ends_early:
            return 0.0, 1 - (1e-5 if training else 1e-3)
        begins_late = prediction != "velocity" or (diffusion_form or "").lower() == "sbdm"
        ends_early = prediction != "velocity" or diffusion_form is not None
        return 1e-3 if begins_late else 0.0, 1 - 1e-3 if ends_early else 1.0

    def _coefficients(self, t, like: Tensor) -> list[Tensor]:
        """Returns alpha, sigma and their derivatives at t, in t's precision, then cast to multiply `like`."""
        t = torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float64)
        return [_shaped(f(t), like) for f in (self.alpha, self.sigma, self.d_alpha, self.d_sigma)]


def _shaped(value: Tensor, like: Tensor) -> Tensor:
    """Shapes a value, 0-d or (B,), to multiply `like` (B, ...); a 0-d value stays on its device."""
    if value.ndim:
        return value.to(like).view(-1, *[1] * (like.ndim - 1))
    return value.to(like.dtype)


class Linear(Interpolant):
    """Straight lines: alpha = t, sigma = 1 - t, v = data - noise."""

    def alpha(self, t):
        return t

    def sigma(self, t):
        return 1 - t

    def d_alpha(self, t):
        return torch.ones_like(t)

    def d_sigma(self, t):
        return -torch.ones_like(t)


class GVP(Interpolant):
    """Variance-preserving path: alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""

    def alpha(self, t):
        return torch.sin(t * math.pi / 2)

    def sigma(self, t):
        return torch.cos(t * math.pi / 2)

    def d_alpha(self, t):
        return math.pi / 2 * torch.cos(t * math.pi / 2)

    def d_sigma(self, t):
        return -math.pi / 2 * torch.sin(t * math.pi / 2)


class VP(Interpolant):
    """The variance-preserving diffusion (arXiv 2011.13456), beta linear from 20 at t = 0 to 0.1 at t = 1.

    alpha = exp(-(1-t)^2 (20 - 0.1) / 4 - (1-t) 0.1 / 2), sigma^2 = 1 - alpha^2.
    """

    beta_min, beta_max = 0.1, 20.0
    velocity_ends_early = True

    def _log_alpha(self, t):
        return -0.25 * (1 - t) ** 2 * (self.beta_max - self.beta_min) - 0.5 * (1 - t) * self.beta_min

    def _d_log_alpha(self, t):
        return 0.5 * (1 - t) * (self.beta_max - self.beta_min) + 0.5 * self.beta_min

    def alpha(self, t):
        return torch.exp(self._log_alpha(t))

    def sigma(self, t):
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def d_alpha(self, t):
        return self.alpha(t) * self._d_log_alpha(t)

    def d_sigma(self, t):
        return -(self.alpha(t) ** 2) * self._d_log_alpha(t) / self.sigma(t)


DIFFUSION_FORMS = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing")
INTERPOLANTS = {"linear": Linear, "gvp": GVP, "vp": VP}


def get_interpolant(name: str) -> Interpolant:
    """Returns the interpolant "linear", "gvp" or "vp". Raises ValueError for another name."""
    if name not in INTERPOLANTS:
        raise ValueError(f"interpolant must be one of {sorted(INTERPOLANTS)}, not {name!r}")
    return INTERPOLANTS[name]()


def as_velocity(model, interpolant: Interpolant, prediction: str = "velocity"):
    """Turns a model (x, t, y) that predicts `prediction` into one that predicts the velocity."""
    if prediction == "velocity":
        return model
    if prediction not in ("noise", "score", "data"):
        raise ValueError(f"prediction must be velocity, noise, score or data, not {prediction!r}")
    return _AsVelocity(model, getattr(interpolant, f"velocity_from_{prediction}"))


class _AsVelocity:
    def __init__(self, model, convert: Callable[[Tensor, Tensor, Tensor], Tensor]):
        self.model, self.convert = model, convert

    @property
    def null_label(self):
        return self.model.null_label

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.convert(self.model(x, t, y), x, t)
