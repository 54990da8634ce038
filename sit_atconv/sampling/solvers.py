"""Solvers: each carries noise at t = 0 to data at t = 1 in one visible loop. SOLVERS says all that others need to know.

Commands read the table for their options, so torch is not imported here.

The SDE's (SiT, arXiv 2401.08740, sections 2.4 and 3.4) add noise on the way, and the score pulls it back:

    dx = drift dt + sqrt(2 w(t)) dW,    drift = v + w(t) * score

has the marginals of dx = v dt for every diffusion w.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from sit_atconv.runtime.tables import Table

if TYPE_CHECKING:
    from torch import Tensor

    Field = Callable[[Tensor, Tensor], Tensor]  # of (x, t): velocity, drift, diffusion


def euler(velocity: Field, x: Tensor, times: Tensor) -> Tensor:
    """Takes Euler steps: order 1."""
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, t)
    return x


def heun(velocity: Field, x: Tensor, times: Tensor) -> Tensor:
    """Takes Heun steps, by the explicit trapezoidal rule: order 2."""
    for t, t_next in pairwise(times):
        dt = t_next - t
        v = velocity(x, t)
        v_next = velocity(x + dt * v, t_next)
        x = x + dt * (v + v_next) / 2
    return x


def dopri5(velocity: Field, x: Tensor, times: Tensor, *, rtol: float = 1e-3, atol: float = 1e-6) -> Tensor:
    """Takes adaptive steps of order 5, by torchdiffeq, with SiT's tolerances, between the two ends of `times`."""
    from torchdiffeq import odeint

    ends = times[[0, -1]].to(x.device)
    return odeint(lambda t, x: velocity(x, t), x, ends, method="dopri5", rtol=rtol, atol=atol)[-1]


def unipc(velocity: Field, x: Tensor, times: Tensor) -> Tensor:
    """Takes multistep steps of UniPC (arXiv 2302.04867), by diffusers: order 2."""
    from diffusers import UniPCMultistepScheduler

    return _multistep(velocity, x, times, UniPCMultistepScheduler(**FLOW))


def dpm_pp(velocity: Field, x: Tensor, times: Tensor) -> Tensor:
    """Takes multistep steps of DPM-Solver++(2M) (arXiv 2211.01095), by diffusers: order 2."""
    from diffusers import DPMSolverMultistepScheduler

    return _multistep(velocity, x, times, DPMSolverMultistepScheduler(**FLOW))


FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)  # diffusers' schedulers on the linear path
NEARLY_NOISE = 1 - 1e-6  # their largest sigma: at 1 they would take the logarithm of 0


def _multistep(velocity: Field, x: Tensor, times: Tensor, scheduler) -> Tensor:
    """Runs a scheduler of diffusers on our times: its sigma is 1 - t, and its prediction noise - data, our -v."""
    scheduler.set_timesteps(len(times) - 1)
    scheduler.set_begin_index(0)  # else it looks its place up by timesteps, which are rounded
    scheduler.sigmas = (1 - times).clamp(max=NEARLY_NOISE).float()
    shape, x = x.shape, x.reshape(len(x), -1)  # UniPC takes no fewer than two axes
    for t, timestep in zip(times[:-1], scheduler.timesteps, strict=True):
        v = velocity(x.reshape(shape), t).reshape(x.shape)
        x = scheduler.step(-v, timestep, x, return_dict=False)[0]
    return x.reshape(shape)


def euler_maruyama(
    drift: Field, diffusion: Field, x: Tensor, times: Tensor, randn: Callable[[Tensor], Tensor]
) -> Tensor:
    """Takes Euler-Maruyama steps: weak order 1."""
    for t, t_next in pairwise(times):
        dt = t_next - t
        x = x + dt * drift(x, t) + (2 * dt * diffusion(x, t)).sqrt().to(x.dtype) * randn(x)
    return x


def stochastic_heun(
    drift: Field, diffusion: Field, x: Tensor, times: Tensor, randn: Callable[[Tensor], Tensor]
) -> Tensor:
    """Takes SiT's stochastic Heun steps: the noise first, then the trapezoidal rule."""
    for t, t_next in pairwise(times):
        dt = t_next - t
        x = x + (2 * dt * diffusion(x, t)).sqrt().to(x.dtype) * randn(x)
        d = drift(x, t)
        x = x + dt * (d + drift(x + dt * d, t_next)) / 2
    return x


@dataclass(frozen=True)
class Solver:
    """A loop, and what commands, checks, counts and records need to know of it.

    Args:
        loop: (velocity, x, times) -> x at the last time; of an SDE (drift, diffusion, x, times, randn) -> that.
        evaluations: of the velocity in each step (in the last one, perhaps fewer); None for an adaptive solver, which
            chooses its steps for the batch as a whole, so that a sample depends on its batch to within a tolerance.
        at_last_time: whether it evaluates the velocity at the last time too.
        linear_only: whether its formulas are those of the linear path.
        begin: where its grid begins by default.
        is_sde: whether it adds noise on the way.
    """

    loop: Callable[..., Tensor]
    evaluations: int | None = 1
    at_last_time: bool = False
    linear_only: bool = False
    begin: float = 0.0
    is_sde: bool = False

    @property
    def is_adaptive(self) -> bool:
        return self.evaluations is None

    def suits(self, path: str) -> bool:
        return path == "linear" or not self.linear_only

    @property
    def summary(self) -> str:
        """What the help of a command says of it."""
        work = f"{self.evaluations} evaluation{'s' if self.evaluations != 1 else ''} a step"
        traits = ("chooses its own steps, for the batch" if self.is_adaptive else work,
                  "linear path only" if self.linear_only else "", "adds noise" if self.is_sde else "")
        return ", ".join(filter(None, traits))


SOLVERS = Table("solver", Solver, {
    "euler": Solver(euler),
    "heun": Solver(heun, evaluations=2, at_last_time=True),
    "dopri5": Solver(dopri5, evaluations=None, at_last_time=True),
    "unipc": Solver(unipc, linear_only=True),
    "dpm++": Solver(dpm_pp, linear_only=True, begin=1e-3),  # as diffusers' own grid
    "sde-euler": Solver(euler_maruyama, is_sde=True),
    "sde-heun": Solver(stochastic_heun, evaluations=2, at_last_time=True, is_sde=True),
})
DEFAULTS = ("unipc", "heun")  # the first that suits the path: these need the fewest evaluations (docs/sampling.md)
LAST_STEPS = ("none", "mean", "tweedie", "euler")  # of an SDE: see `sample_sde`


def default_solver(path: str) -> str:
    """Returns the name of the solver for an interpolant where none is given."""
    return next(name for name in DEFAULTS if SOLVERS[name].suits(path))


def find_solver(solver: str | Solver | Callable[..., Tensor], is_sde: bool = False) -> Solver:
    """Returns the entry of a name, an entry itself, or one made of a loop.

    Raises:
        ValueError: an unknown name, or an ODE solver for an SDE, or the reverse.
    """
    entry = SOLVERS.find(solver) if isinstance(solver, str) else solver
    if not isinstance(entry, Solver):
        entry = Solver(entry, is_sde=is_sde)
    if entry.is_sde != is_sde:
        raise ValueError(f"solver {solver} is for sample_{'sde' if entry.is_sde else 'ode'}")
    return entry
