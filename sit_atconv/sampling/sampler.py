"""All sampling settings in one value: guidance, solver and time grid, as commands name them."""

import inspect
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from sit_atconv.flow import as_velocity, get_interpolant
from sit_atconv.flow.interpolants import DIFFUSION_FORMS
from sit_atconv.sampling.guidance import GUIDANCE, check_guidance, default_cfg, guidance_schedule
from sit_atconv.sampling.ode import sample_ode
from sit_atconv.sampling.sde import sample_sde, sde_times
from sit_atconv.sampling.solvers import LAST_STEPS, SOLVERS, Solver, default_solver
from sit_atconv.sampling.times import as_times, time_grid

Watch = Callable[[float, Tensor, Tensor, float], None]  # (t, x, v, r)
MARGIN = 1e-3  # largest distance of a grid's ends from 0 and 1, where some formulas are not finite


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Sampling settings; call it with a model, noise and labels to sample.

    Args:
        guidance: a name in GUIDANCE.
        cfg: guidance scale; 1 is off, 0 ignores the labels, None means `default_cfg`.
        cfg_schedule: "constant", or rising with t ("linear", "cosine") with the average `cfg`.
        cfg_channels: guide only the first `cfg_channels` channels; None guides all.
        cfg_interval: guidance is on where lo <= t < hi.
        solver: a name in SOLVERS; None means `default_solver`.
        steps: number of intervals of the grid; None means `Solver.default_steps`.
        shift: shift of the grid; above 1 puts more steps near noise (`time_grid`).
        times: explicit grid that replaces `steps` and `shift`.
        diffusion_form, diffusion_norm, last_step, last_step_size: options of SDE solvers, as in `sample_sde`.
    """

    guidance: str = "cfg"
    cfg: float | None = None
    cfg_schedule: str = "constant"
    cfg_channels: int | None = None
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    solver: str | None = None
    steps: int | None = None
    shift: float = 1.0
    times: tuple[float, ...] | None = None
    diffusion_form: str = "sigma"
    diffusion_norm: float = 1.0
    last_step: str = "mean"
    last_step_size: float = 0.04

    def settled(
        self,
        path: str,
        null_label: int | None = None,
        weak: bool = False,
        *,
        two_times: bool = False,
        trained_cfg: float = 1.0,
    ) -> "Sampler":
        """Fills in scale, solver and steps, and resets settings without effect.

        Equal results mean equal samples.

        Args:
            path: name of the interpolant.
            null_label, weak: as in `check_guidance`.
            two_times: True if the model predicts average velocities from t to r.
            trained_cfg: guidance scale that the weights have learned; 1 is none.
        """
        name, default = self.solver or default_solver(path, two_times), Sampler(steps=SOLVERS["euler"].default_steps)
        solver, cfg = SOLVERS.find(name), self.cfg
        if cfg is None:  # a guidance, schedule, interval or channels other than the default ask for guidance too
            asking = ("guidance", "cfg_schedule", "cfg_channels", "cfg_interval")
            is_asked = any(getattr(self, option) != getattr(default, option) for option in asking)
            is_off = (solver.jumps or trained_cfg != 1) and not (is_asked or weak)
            cfg = 1.0 if is_off else default_cfg(null_label, weak, is_asked)
        unused = [] if solver.is_sde else ["diffusion_form", "diffusion_norm", "last_step", "last_step_size"]
        unused += ["steps", "shift"] if self.times or solver.is_adaptive else []
        filled = replace(self, cfg=cfg, solver=name, steps=solver.default_steps if self.steps is None else self.steps)
        return replace(filled, **{option: getattr(default, option) for option in unused})

    def settings(self) -> dict:
        """Returns the settings for a manifest; the default guidance is left out, as in older manifests."""
        return {name: value for name, value in asdict(self).items() if name != "guidance" or value != Sampler.guidance}

    def check(
        self,
        path: str,
        prediction: str,
        null_label: int | None,
        weak: bool = False,
        *,
        two_times: bool = False,
        trained_cfg: float = 1.0,
    ) -> None:
        """Raises ValueError if the settings do not fit each other, the interpolant or the model."""
        settled = self.settled(path, null_label, weak, two_times=two_times, trained_cfg=trained_cfg)
        solver, cfg, (t0, t1) = settled._solver(path), settled.cfg, settled._finite_on(path, prediction)
        assert cfg is not None
        for name, value, known in (
            ("last_step", self.last_step, LAST_STEPS),
            ("diffusion_form", self.diffusion_form.lower(), DIFFUSION_FORMS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        if not solver.suits(path):
            others = [name for name, other in SOLVERS.items() if other.suits(path)]
            raise ValueError(
                f"solver {settled.solver} needs the linear interpolant, and this model was trained with "
                f"{path}: use one of {', '.join(others)}"
            )
        if solver.jumps and not (two_times and prediction == "velocity"):
            lacks = "has one time" if not two_times else f"predicts {prediction}"
            raise ValueError(
                f"solver {settled.solver} needs a model with two times, which MeanFlow trains, and this one {lacks}: "
                f"use {default_solver(path)}"
            )
        guidance = GUIDANCE.find(self.guidance)
        if trained_cfg != 1 and cfg != 1 and not guidance.guides_again:
            raise ValueError(
                f"these weights have learned the guidance scale {trained_cfg:g}, and cfg = {cfg:g} would guide them "
                "again: use cfg = 1 and no other option of guidance, or --guidance two-branch if you want that"
            )
        needs_null = guidance.needs_null_label and not weak
        check_guidance(guidance_schedule(self.cfg_schedule, cfg), null_label, not needs_null, self.cfg_interval)
        with_last_step = solver.is_sde and self.last_step != "none"
        if with_last_step and not self.times and not 1 - t1 <= self.last_step_size < 1 - t0:
            raise ValueError(f"last_step_size must be between {1 - t1:g} and {1 - t0:g}, not {self.last_step_size}")
        times = self.grid(path, prediction)
        evaluated = times if solver.at_last_time and not with_last_step else times[:-1]
        for t in (evaluated[0], evaluated[-1]):
            if not t0 <= t <= t1:
                raise ValueError(
                    f"times must be in [{t0:g}, {t1:g}], where the formulas for prediction {prediction} "
                    f"and interpolant {path} are finite, not {t:g}"
                )
        if times[0] > MARGIN or not 1 - MARGIN <= times[-1] <= 1:
            raise ValueError(f"times must lead from 0 (noise) to 1 (data), not from {times[0]:g} to {times[-1]:g}")

    def grid(self, path: str, prediction: str) -> Tensor:
        """Returns the times at which the solver stops, float64. ValueError: they do not increase."""
        if self.times:
            return as_times(self.times)
        solver, (t0, t1) = self._solver(path), self._finite_on(path, prediction)
        t0, steps = max(t0, solver.begin), solver.default_steps if self.steps is None else self.steps
        if solver.is_sde:
            return sde_times(steps, (t0, t1), self.last_step, self.last_step_size, self.shift)
        return time_grid(steps, t0, t1, self.shift)

    def _solver(self, path: str) -> Solver:
        return SOLVERS.find(self.solver or default_solver(path))

    def _finite_on(self, path: str, prediction: str) -> tuple[float, float]:
        form = self.diffusion_form if self._solver(path).is_sde else None
        return get_interpolant(path).interval(prediction, diffusion_form=form)

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
        two_times: bool = False,
        trained_cfg: float = 1.0,
        watch: Watch | None = None,
    ) -> Tensor:
        """Samples data (B, C, H, W) from noise (B, C, H, W) and labels (B,).

        Args:
            model: (x, t, y) -> prediction, with an attribute `null_label`; (x, t, y, r) for a solver that jumps.
            path: name of the interpolant that the model was trained with.
            prediction: meaning of the model's output, such as "velocity".
            weak: a second model (x, t, y) -> velocity, for autoguidance.
            randn: x -> the next standard-normal tensor like x, for solvers that add noise.
            two_times, trained_cfg: as in `settled`; they only matter if `solver` or `cfg` is None.
            watch: called at the start of each step, with an adaptive solver at each evaluation, as (t, x, v, r): the
                time, the state (B, C, H, W), its guided velocity, and the time r that a jump with v leads to (1
                without jumps). It must not change the tensors.

        Raises:
            ValueError: some of the errors of `check`.
        """
        settled = self.settled(path, model.null_label, weak is not None, two_times=two_times, trained_cfg=trained_cfg)
        interpolant, times = get_interpolant(path), settled.grid(path, prediction)
        solver = settled._solver(path)
        guide = GUIDANCE.find(self.guidance).build(as_velocity(model, interpolant, prediction), y, settled, weak)
        velocity = in_steps(guide, solver, len(times) - 1)
        if watch:
            velocity = watched(velocity, solver, watch)
        if solver.jumps:
            return solver.loop(velocity, noise, times, randn)
        if not solver.is_sde:
            return sample_ode(velocity, noise, solver=solver, times=times)
        return sample_sde(
            velocity,
            noise,
            interpolant,
            solver=solver,
            times=times,
            randn=randn,
            diffusion_form=self.diffusion_form,
            diffusion_norm=self.diffusion_norm,
            last_step=self.last_step,
        )


def in_steps(guide: Callable, solver: Solver, num_steps: int) -> Callable[..., Tensor]:
    """Returns velocity(x, t), which calls guide(x, t, step, num_steps) with the current step.

    Both take the end r of a jump as a last argument. It counts calls, so that solver loops need not report their steps;
    more calls per step than `Solver.evaluations` raise a ValueError, and so does a guide that takes no r if the solver
    jumps.
    """
    calls = itertools.count()
    if solver.jumps:
        try:
            inspect.signature(guide).bind("x", "t", "step", "num_steps", "r")
        except TypeError as error:
            raise ValueError(
                "this guidance takes no end r of a jump: give it a last argument r (docs/extending.md), or use another "
                "solver"
            ) from error

    def velocity(x: Tensor, t: Tensor, *r: Tensor) -> Tensor:
        if solver.evaluations is None:  # adaptive
            return guide(x, t, None, None, *r)
        step = next(calls) // solver.evaluations
        if step >= num_steps:
            raise ValueError(
                f"the solver has an NFE above {solver.evaluations} per step: give the right number in its "
                "Solver(loop, evaluations=...)"
            )
        return guide(x, t, step, num_steps, *r)

    return velocity


def watched(velocity: Callable[..., Tensor], solver: Solver, watch: Watch) -> Callable[..., Tensor]:
    """Returns velocity, which calls `watch` at the first evaluation of each step."""
    calls = itertools.count()

    def seen(x: Tensor, t: Tensor, *r: Tensor) -> Tensor:
        v = velocity(x, t, *r)
        if next(calls) % (solver.evaluations or 1) == 0:
            watch(float(t), x, v, *map(float, r or (1.0,)))
        return v

    return seen


class Counted:
    """A model (x, t, y) or (x, t, y, r) that counts its calls (`evaluations`) and their samples.

    With guidance, one call computes both branches and counts each sample twice.
    """

    def __init__(self, model):
        self.model = model
        self.evaluations = self.samples = 0

    @property
    def null_label(self) -> int | None:
        return self.model.null_label

    def __call__(self, x: Tensor, *conditions: Tensor) -> Tensor:
        self.evaluations += 1
        self.samples += len(x)
        return self.model(x, *conditions)
