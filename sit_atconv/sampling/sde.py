"""SDE solvers (SiT, arXiv 2401.08740, sections 2.4 and 3.4): noise is added on the way, and the score pulls it back.

    dx = (v + w(t) * score) dt + sqrt(2 w(t)) dW

has the marginals of dx = v dt for every w. One evaluation of the velocity gives drift and score together.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch import Tensor

from sit_atconv.flow import Interpolant
from sit_atconv.sampling.ode import Velocity
from sit_atconv.sampling.times import as_times, time_grid

Coefficient = Callable[[Tensor, Tensor], Tensor]  # of (x, t)


def euler_maruyama(
    drift: Velocity, diffusion: Coefficient, x: Tensor, times: Tensor, randn: Callable[[Tensor], Tensor]
) -> Tensor:
    """Weak order 1, one evaluation a step."""
    for t, t_next in pairwise(times):
        dt = t_next - t
        x = x + dt * drift(x, t) + torch.sqrt(2 * dt * diffusion(x, t)).to(x.dtype) * randn(x)
    return x


def stochastic_heun(
    drift: Velocity, diffusion: Coefficient, x: Tensor, times: Tensor, randn: Callable[[Tensor], Tensor]
) -> Tensor:
    """SiT's: the noise of a step first, then the trapezoidal rule; two evaluations a step."""
    for t, t_next in pairwise(times):
        dt = t_next - t
        x = x + torch.sqrt(2 * dt * diffusion(x, t)).to(x.dtype) * randn(x)
        d = drift(x, t)
        x = x + dt * (d + drift(x + dt * d, t_next)) / 2
    return x


SDE_SOLVERS = {"euler": euler_maruyama, "heun": stochastic_heun}
LAST_STEPS = ("none", "mean", "tweedie", "euler")


def sample_sde(
    velocity: Velocity,
    noise: Tensor,
    interpolant: Interpolant,
    *,
    solver: str = "euler",
    num_steps: int = 250,
    times: Iterable[float] | Tensor | None = None,
    diffusion_form: str = "sigma",
    diffusion_norm: float = 1.0,
    last_step: str | None = "mean",
    last_step_size: float = 0.04,
    randn: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """Integrates dx = (v + w * score) dt + sqrt(2 w) dW from noise to data.

    Args:
        velocity: (x, t) -> velocity of x's shape; t is a 0-d float64 tensor on the CPU. Where it comes from another
            prediction (`as_velocity`) it is infinite at t = 0: give `times` that begin later.
        noise: x at the first time (B, ...).
        interpolant: the path, which turns velocity into score.
        solver: a name in SDE_SOLVERS.
        num_steps: steps in all: the last one and uniform ones before it.
        times: increasing times that override `num_steps`; the last interval is that of the last step.
        diffusion_form: w(t), a name in DIFFUSION_FORMS (`Interpolant.diffusion`).
        diffusion_norm: its factor.
        last_step: from 1 - last_step_size to 1, where the score is infinite, without noise: "mean" by the drift,
            "euler" by the velocity, "tweedie" to the expected data; "none" (or None) ends just before 1.
        last_step_size: its length, in (0, 1).
        randn: x -> the next standard-normal tensor like x (`SampleStream.randn_like`).

    Returns:
        x at the last time, like `noise`.

    Raises:
        ValueError: unknown names, fewer than one step, or times that do not increase.
    """
    last_step = (last_step or "none").lower()
    if solver not in SDE_SOLVERS:
        raise ValueError(f"solver must be one of {sorted(SDE_SOLVERS)}, not {solver!r}")
    if last_step not in LAST_STEPS:
        raise ValueError(f"last_step must be one of {LAST_STEPS}, not {last_step!r}")
    if diffusion_norm < 0:
        raise ValueError(f"diffusion_norm must not be negative: {diffusion_norm}")
    if times is None:
        times = sde_times(num_steps, interpolant.interval(diffusion_form=diffusion_form), last_step, last_step_size)
    times = as_times(times)

    def diffusion(x: Tensor, t: Tensor) -> Tensor:
        return interpolant.diffusion(x, t, diffusion_form, diffusion_norm)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        v = velocity(x, t)
        return v + diffusion(x, t) * interpolant.score_from_velocity(v, x, t)

    if last_step == "none":
        return SDE_SOLVERS[solver](drift, diffusion, noise, times, randn)
    x = SDE_SOLVERS[solver](drift, diffusion, noise, times[:-1], randn)
    t, dt = times[-2], times[-1] - times[-2]
    if last_step == "mean":
        return x + dt * drift(x, t)
    v = velocity(x, t)
    return interpolant.data_from_velocity(v, x, t) if last_step == "tweedie" else x + dt * v


def sde_times(
    num_steps: int, interval: tuple[float, float], last_step: str, last_step_size: float, shift: float = 1.0
) -> Tensor:
    """(num_steps + 1,) times for `sample_sde`: a grid (`time_grid`) up to 1 - last_step_size, and 1; or without a
    last step a grid on the interval where the score is finite. ValueError: fewer than one step, or a last step that
    leaves no time before it."""
    t0, t1 = interval
    if last_step == "none":
        return time_grid(num_steps, t0, t1, shift)
    if not 0 < last_step_size < 1 - t0:
        raise ValueError(f"last_step_size must lie between 0 and {1 - t0:g}, not {last_step_size}")
    if num_steps < 2:
        return time_grid(num_steps, t0)
    return torch.cat([time_grid(num_steps - 1, t0, 1 - last_step_size, shift), torch.ones(1, dtype=torch.float64)])
