"""Guidance as a wrapper: a class-conditional model becomes a velocity. GUIDANCE is the table of all kinds.

Commands read the table for their options, so torch is not imported here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sit_atconv.runtime.tables import Table

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_CFG = 4.0  # where there is something to guide with
SCHEDULES = {  # how far above 1 the scale is at time t, as a multiple of cfg - 1; each is 1 on average
    "constant": lambda t: 1.0,
    "linear": lambda t: 2 * t,
    "cosine": lambda t: 1 - math.cos(math.pi * t),
}


def guidance_schedule(name: str, cfg: float) -> float | Callable[[float], float]:
    """The scale for `guided`: one that rises with t, from 1 at noise (arXiv 2404.13040), or the constant cfg.

    Args:
        name: one of SCHEDULES; "linear" is 1 + (cfg - 1) 2 t, "cosine" 1 + (cfg - 1) (1 - cos(pi t)).
        cfg: the scale, which a schedule has on average.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"guidance schedule must be one of {sorted(SCHEDULES)}, not {name!r}")
    if name == "constant" or cfg == 1:
        return cfg
    return lambda t: 1 + (cfg - 1) * SCHEDULES[name](t)


def default_cfg(null_label: int | None, weak: bool = False, is_asked: bool = False) -> float:
    """Returns the scale where none is given: 1, which is off, without a trained null label or a weak model.

    If another option asks for guidance (`is_asked`), it is not dropped silently: `check_guidance` refuses the scale.
    """
    return 1.0 if null_label is None and not weak and not is_asked else DEFAULT_CFG


def check_guidance(
    cfg: float | Callable[[float], float],
    null_label: int | None,
    weak: bool = False,
    interval: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Checks what users ask of guidance; every way to sample calls it.

    Args:
        cfg: guidance scale, or a function of t.
        null_label: the model's; None where it has none, or none that was trained.
        weak: whether a weak model takes its place.
        interval: the times between which guidance is on.

    Raises:
        ValueError: a scale that is not finite, an interval that is not two increasing times in [0, 1], or guidance
            without a null label or a weak model.
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
        raise ValueError(f"the interval of guidance must be two increasing times in [0, 1], not {shown}")
    if null_label is None and not weak and (callable(cfg) or cfg != 1):
        raise ValueError(f"cfg = {'a schedule' if callable(cfg) else cfg} needs a null label, and this model was "
                         "trained without one: use cfg = 1, or a weak model")


def branches(model, x: Tensor, t: Tensor, y: Tensor, weak=None) -> tuple[Tensor, Tensor]:
    """Returns the velocities (B, C, H, W) with labels and without, in one batched forward.

    Another model, `weak`, takes the null branch's place, for autoguidance (arXiv 2406.02507).
    """
    import torch

    t = _batch_time(x, t)
    if weak is not None:
        return model(x, t, y), weak(x, t, y)
    labels = torch.cat([y, torch.full_like(y, model.null_label)])
    return model(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)


def _batch_time(x: Tensor, t: Tensor) -> Tensor:
    """Returns a time, 0-d or (B,), as models take it: (B,) float32 on x's device."""
    import torch

    if t.ndim == 0:  # filled in on the device: a copy from the CPU would wait for it
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
) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns velocity(x, t) = v_null + cfg * (v_cond - v_null), by classifier-free guidance (arXiv 2207.12598).

    Args:
        model: (x, t, y) -> velocity (B, C, H, W), with an attribute `null_label`.
        y: labels (B,) of the samples.
        cfg: guidance scale, or a function of t. 1 is off and 0 the null branch alone: one forward of B each.
        channels: guide the first so many channels only, as DiT and SiT published (3); None guides all.
        interval: guidance is on where lo <= t < hi (arXiv 2404.07724), up to and including the end where hi is 1;
            elsewhere the conditional branch alone is computed.
        weak: another model (x, t, y) -> velocity that takes the null branch's place.

    Returns:
        velocity(x, t), t a 0-d tensor (kept on the CPU, its comparisons cost no synchronisation) or (B,).

    Raises:
        ValueError: as `check_guidance`.
    """
    import torch

    check_guidance(cfg, model.null_label, weak is not None, interval)
    lo, hi = interval
    scale_at = cfg if callable(cfg) else lambda t: cfg

    def inside(t: float) -> bool:
        return lo <= t and (t < hi or hi >= 1)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        scales = [scale_at(s) if inside(s) else 1.0 for s in t.reshape(-1).tolist()]
        t = _batch_time(x, t)
        if all(scale == 1 for scale in scales):
            return model(x, t, y)
        if all(scale == 0 for scale in scales) and channels is None:
            return weak(x, t, y) if weak is not None else model(x, t, torch.full_like(y, model.null_label))
        cond, null = branches(model, x, t, y, weak)
        scale = scales[0]
        if len(scales) > 1:
            scale = torch.tensor(scales, device=x.device, dtype=x.dtype).view(-1, *[1] * (x.ndim - 1))
        v = null + scale * (cond - null)
        return v if channels is None else torch.cat([v[:, :channels], cond[:, channels:]], dim=1)

    return velocity


@dataclass(frozen=True)
class Guidance:
    """A kind of guidance.

    Args:
        build: (model, y, sampler, weak) -> velocity(x, t, step, num_steps). Called for each batch, so what it returns
            may keep a state. Model, labels and weak (None, mostly) are as in `guided`, `sampler` is the `Sampler` with
            all settings. Steps count from 0; a solver may evaluate several times in one; of an adaptive one they are
            None.
        needs_null_label: whether a scale other than 1 is an error without a trained null label or a weak model.
    """

    build: Callable[..., Callable]
    needs_null_label: bool = False


def classifier_free(model, y: Tensor, sampler, weak=None) -> Callable:
    """Builds what `guided` is with the settings of a sampler."""
    velocity = guided(model, y, cfg=guidance_schedule(sampler.cfg_schedule, sampler.cfg), weak=weak,
                      channels=sampler.cfg_channels, interval=sampler.cfg_interval)
    return lambda x, t, step, num_steps: velocity(x, t)


GUIDANCE = Table("guidance", Guidance, {"cfg": Guidance(classifier_free, needs_null_label=True)})
