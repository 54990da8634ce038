"""Guidance: wrappers that turn a class-conditional model into a velocity, and their table.

Commands read the table for their options, so this file does not import torch at the top.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sit_atconv.runtime.tables import Table

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_CFG = 4.0  # with a trained null label or a weak model
SCHEDULES = {  # factor of cfg - 1 at time t; each is 1 on average
    "constant": lambda t: 1.0,
    "linear": lambda t: 2 * t,
    "cosine": lambda t: 1 - math.cos(math.pi * t),
}


def guidance_schedule(name: str, cfg: float) -> float | Callable[[float], float]:
    """Returns the scale for `guided`: constant, or rising with t from 1 at noise (arXiv 2404.13040).

    Args:
        name: one of SCHEDULES; "linear" is 1 + (cfg - 1) 2 t, "cosine" is 1 + (cfg - 1) (1 - cos(pi t)).
        cfg: average of the scale over t.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"guidance schedule must be one of {sorted(SCHEDULES)}, not {name!r}")
    if name == "constant" or cfg == 1:
        return cfg
    return lambda t: 1 + (cfg - 1) * SCHEDULES[name](t)


def default_cfg(null_label: int | None, weak: bool = False, is_asked: bool = False) -> float:
    """Returns the default scale: 1, which is off, without a trained null label or a weak model.

    `is_asked`: another option asks for guidance. The scale is then not 1, so that `check_guidance` raises an error.
    """
    return 1.0 if null_label is None and not weak and not is_asked else DEFAULT_CFG


def check_guidance(
    cfg: float | Callable[[float], float],
    null_label: int | None,
    weak: bool = False,
    interval: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Checks guidance options; every way to sample calls it.

    `null_label` is None if the model has none or never trained it; `weak` is True if a weak model replaces it.

    Raises:
        ValueError: the scale is not finite, the interval is not two increasing times in [0, 1], or guidance has
            neither a null label nor a weak model.
    """
    if not callable(cfg) and not math.isfinite(cfg):
        raise ValueError(f"the guidance scale must be a finite number, not {cfg}")
    try:
        lo, hi = interval
        is_interval = 0 <= lo < hi <= 1
    except (TypeError, ValueError):
        is_interval = False
    if not is_interval:
        shown = list(interval) if isinstance(interval, tuple) else interval
        raise ValueError(f"the guidance interval must be two increasing times in [0, 1], not {shown}")
    if null_label is None and not weak and (callable(cfg) or cfg != 1):
        raise ValueError(
            f"cfg = {'a schedule' if callable(cfg) else cfg} needs a null label, and this model was "
            "trained without one: use cfg = 1 or a weak model"
        )


def branches(model, x: Tensor, t: Tensor, y: Tensor, weak=None, r: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the velocities (B, C, H, W) with and without labels, in one batched forward.

    With `weak`, a second model, its velocity replaces the one without labels (autoguidance, arXiv 2406.02507). With
    `r`, they are the average velocities from t to r.
    """
    import torch

    times = _batch_times(x, t, r)
    if weak is not None:
        return _predict(model, x, y, times), _predict(weak, x, y, times)
    labels = torch.cat([y, torch.full_like(y, model.null_label)])
    cond, null = _predict(model, torch.cat([x, x]), labels, [torch.cat([time, time]) for time in times]).chunk(2)
    return cond, null


def _predict(model, x: Tensor, y: Tensor, times: list[Tensor]) -> Tensor:
    t, *r = times
    return model(x, t, y, *r)


def _batch_times(x: Tensor, t: Tensor, r: Tensor | None) -> list[Tensor]:
    """Returns t, and r unless it is None, as models take them."""
    return [_batch_time(x, time) for time in (t, r) if time is not None]


def _batch_time(x: Tensor, t: Tensor) -> Tensor:
    """Converts a 0-d or (B,) time to what models take: (B,), float32, on the device of x."""
    import torch

    if t.ndim == 0:  # created on the device: a copy from the CPU would synchronise
        t = torch.full((len(x),), t.item(), device=x.device, dtype=torch.float32)
    return t.to(x.device, torch.float32)


def guided(
    model,
    y: Tensor,
    *,
    cfg: float | Callable[[float], float] = 4.0,
    channels: int | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    weak=None,
) -> Callable[..., Tensor]:
    """Returns the guided velocity(x, t) = v_null + cfg * (v_cond - v_null) (arXiv 2207.12598).

    Args:
        model: (x, t, y) -> velocity (B, C, H, W), with an attribute `null_label`.
        y: labels (B,) of the samples.
        cfg: guidance scale, or a function of t. 1 is off and 0 is v_null alone; both need one forward of B.
        channels: guide only the first `channels` channels, as DiT and SiT published (3); None guides all.
        interval: guidance is on where lo <= t < hi (arXiv 2404.07724), at t = 1 too if hi is 1; elsewhere only v_cond
            is computed.
        weak: another model (x, t, y) -> velocity that gives v_null.

    Returns:
        velocity(x, t), where t is (B,) or a 0-d tensor (on the CPU, so that comparing it needs no synchronisation);
        velocity(x, t, r) is the average velocity of a model with two times.

    Raises:
        ValueError: as `check_guidance`.
    """
    import torch

    check_guidance(cfg, model.null_label, weak is not None, interval)
    lo, hi = interval
    scale_at = cfg if callable(cfg) else lambda t: cfg

    def inside(t: float) -> bool:
        return lo <= t and (t < hi or hi >= 1)

    def velocity(x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        scales = [scale_at(s) if inside(s) else 1.0 for s in t.reshape(-1).tolist()]
        times = _batch_times(x, t, r)
        if all(scale == 1 for scale in scales):
            return _predict(model, x, y, times)
        if all(scale == 0 for scale in scales) and channels is None:
            labels = torch.full_like(y, model.null_label) if weak is None else y
            return _predict(weak or model, x, labels, times)
        cond, null = branches(model, x, t, y, weak, r)
        scale: float | Tensor = scales[0]
        if len(scales) > 1:
            scale = torch.tensor(scales, device=x.device, dtype=x.dtype).view(-1, *[1] * (x.ndim - 1))
        v = null + scale * (cond - null)
        return v if channels is None else torch.cat([v[:, :channels], cond[:, channels:]], dim=1)

    return velocity


@dataclass(frozen=True)
class Guidance:
    """A kind of guidance.

    Args:
        build: (model, y, sampler, weak) -> velocity(x, t, step, num_steps). It is called for each batch, so the
            velocity may keep a state. `model`, `y` and `weak` (or None) are as in `guided`; `sampler` is the `Sampler`
            with all settings. `step` counts from 0, and several calls may have the same step; an adaptive solver gives
            None for both numbers. Solvers that jump call it with one more argument r, the end of the jump.
        needs_null_label: True if a scale other than 1 is an error without a trained null label or a weak model.
        guides_again: True if a scale other than 1 is allowed for weights that have learned guidance.
    """

    build: Callable[..., Callable]
    needs_null_label: bool = False
    guides_again: bool = False


def classifier_free(model, y: Tensor, sampler, weak=None) -> Callable:
    """Builds `guided` with the settings of a sampler."""
    velocity = guided(
        model,
        y,
        cfg=guidance_schedule(sampler.cfg_schedule, sampler.cfg),
        weak=weak,
        channels=sampler.cfg_channels,
        interval=sampler.cfg_interval,
    )
    return lambda x, t, step, num_steps, r=None: velocity(x, t, r)


GUIDANCE = Table(
    "guidance",
    Guidance,
    {
        "cfg": Guidance(classifier_free, needs_null_label=True),
        "two-branch": Guidance(classifier_free, needs_null_label=True, guides_again=True),
    },
)
