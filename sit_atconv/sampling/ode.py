"""The flow's ODE, from noise to data."""

from collections.abc import Callable, Iterable

from torch import Tensor

from sit_atconv.sampling.solvers import Solver, find_solver
from sit_atconv.sampling.times import as_times, time_grid


def sample_ode(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    *,
    solver: str | Solver | Callable[..., Tensor] = "euler",
    num_steps: int = 50,
    times: Iterable[float] | Tensor | None = None,
) -> Tensor:
    """Integrates dx/dt = velocity(x, t) from noise to data.

    Args:
        velocity: (x, t) -> velocity of x's shape; t is a 0-d float64 tensor on the CPU (dopri5: on x's device). If it
            is infinite at an end (VP, or `as_velocity` of another prediction), give `times` inside
            `Interpolant.interval`.
        noise: x at the first time (B, ...).
        solver: a name in SOLVERS, a `Solver`, or a loop (velocity, x, times) -> x.
        num_steps: number of intervals, uniform in t. (SiT counts points: its 50 is our 49.)
        times: increasing times that override `num_steps`, e.g. `time_grid(20, shift=2.0)`.

    Returns:
        x at the last time, like `noise`.

    Raises:
        ValueError: an unknown solver, fewer than one step, or times that do not increase.
    """
    solver = find_solver(solver)
    return solver.loop(velocity, noise, as_times(time_grid(num_steps, solver.begin) if times is None else times))
