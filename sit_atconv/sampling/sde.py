"""The SDE with the marginals of the flow's ODE: dx = (v + w(t) * score) dt + sqrt(2 w(t)) dW."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sit_atconv.flow import Interpolant
from sit_atconv.sampling.solvers import LAST_STEPS, SOLVERS, Solver, find_solver
from sit_atconv.sampling.times import as_times, time_grid


def sample_sde(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    interpolant: Interpolant,
    *,
    solver: str | Solver | Callable[..., Tensor] = "euler",
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
        velocity: (x, t) -> velocity of x's shape; t is a 0-d float64 tensor on the CPU. If it comes from another
            prediction (`as_velocity`), it is infinite at t = 0: give `times` that begin later.
        noise: x at the first time (B, ...).
        interpolant: converts velocity to score.
        solver: the name of an SDE solver in SOLVERS, with or without "sde-", a `Solver`, or a loop
            (drift, diffusion, x, times, randn) -> x.
        num_steps: total number of steps: uniform ones, then the last step.
        times: increasing times that override `num_steps`; the last step covers the last interval.
        diffusion_form: w(t), a name in DIFFUSION_FORMS (`Interpolant.diffusion`).
        diffusion_norm: factor of w(t), at least 0.
        last_step: step without noise from 1 - last_step_size to 1, where the score is infinite: "mean" follows the
            drift, "euler" the velocity, "tweedie" jumps to the expected data; "none" (or None) ends just before 1.
        last_step_size: length of the last step in time, in (0, 1).
        randn: x -> the next standard-normal tensor like x (`SampleStream.randn_like`).

    Returns:
        x at the last time, like `noise`.

    Raises:
        ValueError: unknown names, fewer than one step, or times that do not increase.
    """
    last_step = (last_step or "none").lower()
    solver = find_solver(f"sde-{solver}" if f"sde-{solver}" in SOLVERS else solver, is_sde=True)
    if last_step not in LAST_STEPS:
        raise ValueError(f"last_step must be one of {LAST_STEPS}, not {last_step!r}")
    if diffusion_norm < 0:
        raise ValueError(f"diffusion_norm must not be negative: {diffusion_norm}")
    if times is None:
        t0, t1 = interpolant.interval(diffusion_form=diffusion_form)
        times = sde_times(num_steps, (max(t0, solver.begin), t1), last_step, last_step_size)
    times = as_times(times)

    def diffusion(x: Tensor, t: Tensor) -> Tensor:
        return interpolant.diffusion(x, t, diffusion_form, diffusion_norm)

    def drift(x: Tensor, t: Tensor) -> Tensor:  # the score needs no second evaluation
        v = velocity(x, t)
        return v + diffusion(x, t) * interpolant.score_from_velocity(v, x, t)

    if last_step == "none":
        return solver.loop(drift, diffusion, noise, times, randn)
    x = solver.loop(drift, diffusion, noise, times[:-1], randn)
    t, dt = times[-2], times[-1] - times[-2]
    if last_step == "mean":
        return x + dt * drift(x, t)
    v = velocity(x, t)
    return interpolant.data_from_velocity(v, x, t) if last_step == "tweedie" else x + dt * v


def sde_times(
    num_steps: int, interval: tuple[float, float], last_step: str, last_step_size: float, shift: float = 1.0
) -> Tensor:
    """Returns num_steps + 1 times for `sample_sde`: a `time_grid` up to 1 - last_step_size, then 1.

    Without a last step, the grid covers `interval`, where the score is finite. ValueError: fewer than one step, or a
    last step that leaves no time before it.
    """
    t0, t1 = interval
    if last_step == "none":
        return time_grid(num_steps, t0, t1, shift)
    if not 0 < last_step_size < 1 - t0:
        raise ValueError(f"last_step_size must be between 0 and {1 - t0:g}, not {last_step_size}")
    if num_steps < 2:
        return time_grid(num_steps, t0)
    return torch.cat([time_grid(num_steps - 1, t0, 1 - last_step_size, shift), torch.ones(1, dtype=torch.float64)])
