"""Solvers: loops that integrate from noise (t = 0) to data (t = 1), and the table of all of them.

Commands read the table for their options, so this file does not import torch at the top.

SDE solvers (SiT, arXiv 2401.08740, sections 2.4 and 3.4) add noise, which the score in the drift corrects:

    dx = drift dt + sqrt(2 w(t)) dW,    drift = v + w(t) * score

has the marginals of dx = v dt for every diffusion w.

Jumps need a model with two times, which predicts the average velocity u(x, t, r) from t to r (`flow.MeanFlow`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from sit_atconv.runtime.tables import Table

if TYPE_CHECKING:
    from torch import Tensor

    Field = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> velocity, drift or diffusion


def euler(velocity: Field, x: Tensor, times: Tensor) -> Tensor:
    """Takes Euler steps: order 1."""
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, t)
    return x


def heun(velocity: Field, x: Tensor, times: Tensor) -> Tensor:
    """Takes Heun steps (the explicit trapezoidal rule): order 2."""
    for t, t_next in pairwise(times):
        dt = t_next - t
        v = velocity(x, t)
        v_next = velocity(x + dt * v, t_next)
        x = x + dt * (v + v_next) / 2
    return x


def dopri5(velocity: Field, x: Tensor, times: Tensor, *, rtol: float = 1e-3, atol: float = 1e-6) -> Tensor:
    """Takes adaptive steps of order 5 (torchdiffeq, SiT's tolerances) between the two ends of `times`."""
    from torchdiffeq import odeint

    ends = times[[0, -1]].to(x.device)
    return odeint(lambda t, x: velocity(x, t), x, ends, method="dopri5", rtol=rtol, atol=atol)[-1]


def unipc(velocity: Field, x: Tensor, times: Tensor) -> Tensor:
    """Takes multistep steps of diffusers' UniPC (arXiv 2302.04867): order 2."""
    from diffusers import UniPCMultistepScheduler

    return _multistep(velocity, x, times, UniPCMultistepScheduler(**FLOW))


def dpm_pp(velocity: Field, x: Tensor, times: Tensor) -> Tensor:
    """Takes multistep steps of diffusers' DPM-Solver++(2M) (arXiv 2211.01095): order 2."""
    from diffusers import DPMSolverMultistepScheduler

    return _multistep(velocity, x, times, DPMSolverMultistepScheduler(**FLOW))


FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)  # the linear interpolant, in diffusers' words
NEARLY_NOISE = 1 - 1e-6  # largest sigma of diffusers' schedulers: at 1 they would take the logarithm of 0


def _multistep(velocity: Field, x: Tensor, times: Tensor, scheduler) -> Tensor:
    """Runs a diffusers scheduler on our times: its sigma is 1 - t, its prediction is noise - data = -v."""
    scheduler.set_timesteps(len(times) - 1)
    scheduler.set_begin_index(0)  # otherwise it finds its position by timesteps, which are rounded
    scheduler.sigmas = (1 - times).clamp(max=NEARLY_NOISE).float()
    shape, x = x.shape, x.reshape(len(x), -1)  # UniPC needs at least two axes
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
    """Takes SiT's stochastic Heun steps: noise first, then the trapezoidal rule."""
    for t, t_next in pairwise(times):
        dt = t_next - t
        x = x + (2 * dt * diffusion(x, t)).sqrt().to(x.dtype) * randn(x)
        d = drift(x, t)
        x = x + dt * (d + drift(x + dt * d, t_next)) / 2
    return x


def jump(average_velocity: Callable, x: Tensor, times: Tensor, randn: Callable[[Tensor], Tensor]) -> Tensor:
    """Jumps from each time to the next: x_r = x_t + (r - t) u(x_t, t, r) (MeanFlow, arXiv 2505.13447)."""
    for t, r in pairwise(times):
        x = x + (r - t) * average_velocity(x, t, r)
    return x


def jump_renoise(average_velocity: Callable, x: Tensor, times: Tensor, randn: Callable[[Tensor], Tensor]) -> Tensor:
    """Jumps to data from each time, and puts noise back for the next (arXiv 2303.01469, algorithm 1)."""
    end = times[-1]
    for t, t_next in pairwise(times):
        x = x + (end - t) * average_velocity(x, t, end)
        if t_next < end:
            x = t_next * x + (1 - t_next) * randn(x)
    return x


@dataclass(frozen=True)
class Solver:
    """A loop and its properties, which commands, checks, counts and records read.

    Args:
        loop: (velocity, x, times) -> x at the last time; (drift, diffusion, x, times, randn) -> x for an SDE;
            (average_velocity, x, times, randn) -> x for jumps, where average_velocity is a function of (x, t, r).
        evaluations: NFE (number of function evaluations) of each step but the last, which may need fewer; None for an
            adaptive solver, which chooses its steps for the whole batch (samples depend on it, within a tolerance).
        at_last_time: True if it evaluates the velocity at the last time too.
        linear_only: True if its formulas hold for the linear interpolant only.
        begin: first time of its default grid.
        is_sde: True if it integrates the SDE.
        jumps: True if it needs a model with two times.
        default_steps: number of steps if none is given.
        library: module that the loop imports; timings import it first.
    """

    loop: Callable[..., Tensor]
    evaluations: int | None = 1
    at_last_time: bool = False
    linear_only: bool = False
    begin: float = 0.0
    is_sde: bool = False
    jumps: bool = False
    default_steps: int = 25
    library: str | None = None

    @property
    def is_adaptive(self) -> bool:
        return self.evaluations is None

    def suits(self, path: str) -> bool:
        return path == "linear" or not self.linear_only

    @property
    def summary(self) -> str:
        """A few words for the help of a command."""
        nfe = "chooses its own steps for the whole batch" if self.is_adaptive else f"NFE {self.evaluations} per step"
        traits = (
            nfe,
            "linear interpolant only" if self.linear_only and not self.jumps else "",
            "adds noise" if self.is_sde else "",
            "MeanFlow models only" if self.jumps else "",
        )
        return ", ".join(filter(None, traits))


SOLVERS = Table(
    "solver",
    Solver,
    {
        "euler": Solver(euler),
        "heun": Solver(heun, evaluations=2, at_last_time=True),
        "dopri5": Solver(dopri5, evaluations=None, at_last_time=True, library="torchdiffeq"),
        "unipc": Solver(unipc, linear_only=True, library="diffusers.schedulers.scheduling_unipc_multistep"),
        "dpm++": Solver(
            dpm_pp,
            linear_only=True,
            begin=1e-3,  # as in diffusers' own grid
            library="diffusers.schedulers.scheduling_dpmsolver_multistep",
        ),
        "sde-euler": Solver(euler_maruyama, is_sde=True),
        "sde-heun": Solver(stochastic_heun, evaluations=2, at_last_time=True, is_sde=True),
        "jump": Solver(jump, linear_only=True, jumps=True, default_steps=1),
        "jump-renoise": Solver(jump_renoise, linear_only=True, jumps=True, default_steps=2),
    },
)
DEFAULTS = ("unipc", "heun")  # the first that suits the interpolant; they need the fewest steps (docs/sampling.md)
LAST_STEPS = ("none", "mean", "tweedie", "euler")  # last steps of an SDE: see `sample_sde`


def default_solver(path: str, two_times: bool = False) -> str:
    """Returns the name of the default solver for an interpolant, or for a model with two times."""
    return "jump" if two_times else next(name for name in DEFAULTS if SOLVERS[name].suits(path))


def find_solver(solver: str | Solver | Callable[..., Tensor], is_sde: bool = False) -> Solver:
    """Returns the `Solver` for a name, a `Solver` or a loop.

    Raises:
        ValueError: an unknown name, a solver that jumps, an ODE solver for an SDE, or an SDE solver for an ODE.
    """
    entry = SOLVERS.find(solver) if isinstance(solver, str) else solver
    if not isinstance(entry, Solver):
        entry = Solver(entry, is_sde=is_sde)
    if entry.jumps:
        raise ValueError(f"solver {solver} needs a function of (x, t, r): call its loop, or Sampler(solver=...)")
    if entry.is_sde != is_sde:
        raise ValueError(
            f"solver {solver} is for sample_{'sde' if entry.is_sde else 'ode'}: use that function, or another solver"
        )
    return entry
