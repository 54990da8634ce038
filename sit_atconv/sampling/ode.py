"""ODE solvers: each carries noise at t = 0 to data at t = 1 along velocity(x, t), in one visible loop."""

from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]


def euler(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """First order, one evaluation a step."""
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, t)
    return x


def heun(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """Second order (the explicit trapezoidal rule), two evaluations a step."""
    for t, t_next in pairwise(times):
        dt = t_next - t
        v = velocity(x, t)
        v_next = velocity(x + dt * v, t_next)
        x = x + dt * (v + v_next) / 2
    return x


def dopri5(velocity: Velocity, x: Tensor, times: Tensor, *, rtol: float = 1e-3, atol: float = 1e-6) -> Tensor:
    """Adaptive fifth order, by torchdiffeq, with SiT's tolerances; only the two ends of `times` matter.

    It chooses its steps for the batch as a whole, so a sample depends on its batch to within the tolerance.
    """
    from torchdiffeq import odeint

    ends = times[[0, -1]].to(x.device)
    return odeint(lambda t, x: velocity(x, t), x, ends, method="dopri5", rtol=rtol, atol=atol)[-1]


SOLVERS = {"euler": euler, "heun": heun, "dopri5": dopri5}


def sample_ode(
    velocity: Velocity,
    noise: Tensor,
    *,
    solver: str = "euler",
    num_steps: int = 50,
    times: Iterable[float] | Tensor | None = None,
) -> Tensor:
    """Integrates dx/dt = velocity(x, t) from noise to data.

    Args:
        velocity: (x, t) -> velocity of x's shape; t is a 0-d float64 tensor on the CPU (dopri5: on x's device).
        noise: x at the first time (B, ...).
        solver: a name in SOLVERS.
        num_steps: number of intervals, uniform in t. (SiT counts points: its 50 is our 49.)
        times: increasing times that override `num_steps`, e.g. a shifted grid, or one that ends early.

    Returns:
        x at the last time, like `noise`.

    Raises:
        ValueError: an unknown solver, fewer than one step, or times that do not increase.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {sorted(SOLVERS)}, not {solver!r}")
    if times is None:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, not {num_steps}")
        times = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    times = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    if times.ndim != 1 or len(times) < 2 or not (times.diff() > 0).all():
        raise ValueError(f"times must be two or more increasing numbers, not {times.tolist()}")
    return SOLVERS[solver](velocity, noise, times)
