"""ODE solvers: each carries noise at t = 0 to data at t = 1 along velocity(x, t), in one visible loop."""

from collections.abc import Callable, Iterable
from itertools import pairwise

from torch import Tensor

from sit_atconv.sampling.times import as_times, time_grid

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


def unipc(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """UniPC (arXiv 2302.04867) of order 2 by diffusers, one evaluation a step; the linear path alone."""
    from diffusers import UniPCMultistepScheduler

    return _multistep(velocity, x, times, UniPCMultistepScheduler(**FLOW))


def dpm_pp(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095) by diffusers, one evaluation a step; the linear path alone."""
    from diffusers import DPMSolverMultistepScheduler

    return _multistep(velocity, x, times, DPMSolverMultistepScheduler(**FLOW))


FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)  # diffusers' schedulers on the linear path
NEARLY_NOISE = 1 - 1e-6  # their largest sigma: at 1 they would take the logarithm of 0


def _multistep(velocity: Velocity, x: Tensor, times: Tensor, scheduler) -> Tensor:
    """A scheduler of diffusers on our times: its sigma is 1 - t, and its prediction noise - data, our -v."""
    scheduler.set_timesteps(len(times) - 1)
    scheduler.set_begin_index(0)  # else it looks its place up by timesteps, which are rounded
    scheduler.sigmas = (1 - times).clamp(max=NEARLY_NOISE).float()
    shape, x = x.shape, x.reshape(len(x), -1)  # UniPC takes no fewer than two axes
    for t, timestep in zip(times[:-1], scheduler.timesteps, strict=True):
        v = velocity(x.reshape(shape), t).reshape(x.shape)
        x = scheduler.step(-v, timestep, x, return_dict=False)[0]
    return x.reshape(shape)


SOLVERS = {"euler": euler, "heun": heun, "dopri5": dopri5, "unipc": unipc, "dpm++": dpm_pp}
LINEAR_ONLY = ("unipc", "dpm++")  # their formulas are those of the linear path
BEGIN = {"dpm++": 1e-3}  # where the grid of a solver begins by default, if not at 0: as diffusers' own does


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
        velocity: (x, t) -> velocity of x's shape; t is a 0-d float64 tensor on the CPU (dopri5: on x's device). Where
            it is infinite at an end (VP, other predictions by `as_velocity`), give `times` within
            `Interpolant.interval`.
        noise: x at the first time (B, ...).
        solver: a name in SOLVERS. Those in LINEAR_ONLY are right on the linear path alone.
        num_steps: number of intervals, uniform in t. (SiT counts points: its 50 is our 49.)
        times: increasing times that override `num_steps`, e.g. `time_grid(20, shift=2.0)`.

    Returns:
        x at the last time, like `noise`.

    Raises:
        ValueError: an unknown solver, fewer than one step, or times that do not increase.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {sorted(SOLVERS)}, not {solver!r}")
    if times is None:
        times = time_grid(num_steps, BEGIN.get(solver, 0.0))
    return SOLVERS[solver](velocity, noise, as_times(times))
