"""How noise becomes data, in one value: guidance, solver and grid together, as a command or a config names them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sit_atconv.flow import as_velocity, get_interpolant
from sit_atconv.sampling.guidance import check_guidance, guidance_schedule, guided
from sit_atconv.sampling.ode import BEGIN, LINEAR_ONLY, SOLVERS, sample_ode
from sit_atconv.sampling.sde import SDE_SOLVERS, sample_sde, sde_times
from sit_atconv.sampling.times import as_times, time_grid

SDE = "sde-"  # before the name of an SDE solver
SOLVER_NAMES = (*SOLVERS, *(SDE + name for name in SDE_SOLVERS))


def default_solver(path: str) -> str:
    """The solver that needs the fewest evaluations on a path: docs/sampling.md has the comparison."""
    return "unipc" if path == "linear" else "heun"


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Called with a model, it samples.

    Args:
        cfg: guidance scale; 1 is off, 0 the null branch alone.
        cfg_schedule: "constant", or rising with t ("linear", "cosine") to the same scale on average.
        cfg_channels: guide the first so many channels only; None guides all.
        interval: guidance is on where lo <= t < hi.
        solver: a name in SOLVER_NAMES: those of SOLVERS, and of SDE_SOLVERS with "sde-" before.
        steps: intervals of the grid.
        shift: of the grid; above 1 it has more steps near noise (`time_grid`).
        times: an explicit grid in place of steps and shift; () is none.
        diffusion_form: of an SDE solver, like what follows; see `sample_sde`.
        diffusion_norm: a factor of it.
        last_step: how the last step goes.
        last_step_size: how long it is.
    """

    cfg: float = 4.0
    cfg_schedule: str = "constant"
    cfg_channels: int | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    solver: str = "euler"
    steps: int = 50
    shift: float = 1.0
    times: tuple[float, ...] = ()
    diffusion_form: str = "sigma"
    diffusion_norm: float = 1.0
    last_step: str = "mean"
    last_step_size: float = 0.04

    def check(self, path: str, prediction: str, null_label: int | None, weak: bool = False) -> None:
        """Raises ValueError where these settings do not suit each other, the path, the prediction or the model."""
        if not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ValueError(f"interval must be two increasing times in [0, 1], not {list(self.interval)}")
        if self.solver in LINEAR_ONLY and path != "linear":
            others = [name for name in SOLVER_NAMES if name not in LINEAR_ONLY]
            raise ValueError(f"solver {self.solver} is right on the linear path alone, and this model was trained on "
                             f"{path}: use one of {', '.join(others)}")
        check_guidance(guidance_schedule(self.cfg_schedule, self.cfg), null_label, weak)
        t0, t1 = self._interval(path, prediction)
        times = self.grid(path, prediction)
        at_both_ends = self.solver in ("heun", "dopri5") or (self.is_sde and self.last_step == "none")
        last = times[-1] if at_both_ends else times[-2]  # where the velocity is still evaluated
        if times[0] < t0 or last > t1 or times[-1] > 1:
            raise ValueError(f"times must lie in [{t0:g}, {t1:g}], where the formulas of {prediction} on the {path} "
                             f"path are finite, not {times.tolist()}")

    def _interval(self, path: str, prediction: str) -> tuple[float, float]:
        return get_interpolant(path).interval(prediction, diffusion_form=self.diffusion_form if self.is_sde else None)

    def grid(self, path: str, prediction: str) -> Tensor:
        """The times at which the solver stops, float64."""
        if self.times:
            return as_times(self.times)
        t0, t1 = self._interval(path, prediction)
        if self.is_sde:
            return sde_times(self.steps, (t0, t1), self.last_step, self.last_step_size, self.shift)
        return time_grid(self.steps, max(t0, BEGIN.get(self.solver, 0.0)), t1, self.shift)

    @property
    def is_sde(self) -> bool:
        return self.solver.startswith(SDE)

    def __call__(
        self,
        model,
        noise: Tensor,
        y: Tensor,
        *,
        path: str = "linear",
        prediction: str = "velocity",
        weak=None,
        randn: Callable[[Tensor], Tensor] = torch.randn_like,
    ) -> Tensor:
        """Noise (B, C, H, W) and labels (B,) -> data (B, C, H, W).

        Args:
            model: (x, t, y) -> the prediction, with a `null_label`.
            path: name of the interpolant it was trained on.
            prediction: what its output stands for.
            weak: a second model (x, t, y) -> velocity, for autoguidance.
            randn: of an SDE solver, x -> the next standard-normal tensor like x.
        """
        interpolant = get_interpolant(path)
        velocity = guided(
            as_velocity(model, interpolant, prediction), y, cfg=guidance_schedule(self.cfg_schedule, self.cfg),
            channels=self.cfg_channels, interval=self.interval, weak=weak,
        )
        times = self.grid(path, prediction)
        if not self.is_sde:
            return sample_ode(velocity, noise, solver=self.solver, times=times)
        return sample_sde(
            velocity, noise, interpolant, solver=self.solver.removeprefix(SDE), times=times, randn=randn,
            diffusion_form=self.diffusion_form, diffusion_norm=self.diffusion_norm, last_step=self.last_step,
        )


class Counted:
    """A model (x, t, y) that counts its evaluations, and the samples they were for.

    With both branches of guidance in one forward, an evaluation is for twice as many.
    """

    def __init__(self, model):
        self.model = model
        self.evaluations = self.samples = 0

    @property
    def null_label(self) -> int | None:
        return self.model.null_label

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.evaluations += 1
        self.samples += len(x)
        return self.model(x, t, y)
