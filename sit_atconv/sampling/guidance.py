"""Classifier-free guidance (arXiv 2207.12598) as a wrapper: a class-conditional model becomes a velocity(x, t)."""

import math
from collections.abc import Callable

import torch
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


def guided(
    model,
    y: Tensor,
    *,
    cfg: float | Callable[[float], float] = 4.0,
    channels: int | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    weak=None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """velocity(x, t) = v_null + cfg * (v_cond - v_null), both branches in one batched forward.

    Args:
        model: (x, t, y) -> velocity (B, C, H, W), with an attribute `null_label`.
        y: labels (B,) of the samples.
        cfg: guidance scale, or a function of t. 1 is off and 0 the null branch alone: one forward of B each.
        channels: guide the first so many channels only, as DiT and SiT published (3); None guides all.
        interval: guidance is on where lo <= t < hi (arXiv 2404.07724), up to and including the end where hi is 1;
            elsewhere the conditional branch alone is computed.
        weak: another model (x, t, y) -> velocity that takes the null branch's place, for autoguidance
            (arXiv 2406.02507).

    Returns:
        velocity(x, t), t a 0-d tensor (kept on the CPU, its comparisons cost no synchronisation) or (B,).

    Raises:
        ValueError: as `check_guidance`.
    """
    check_guidance(cfg, model.null_label, weak is not None, interval)
    lo, hi = interval
    scale_at = cfg if callable(cfg) else lambda t: cfg

    def inside(t: float) -> bool:
        return lo <= t and (t < hi or hi >= 1)

    def null_branch(x: Tensor, t: Tensor) -> Tensor:
        return weak(x, t, y) if weak is not None else model(x, t, torch.full_like(y, model.null_label))

    def both_branches(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if weak is not None:
            return model(x, t, y), weak(x, t, y)
        labels = torch.cat([y, torch.full_like(y, model.null_label)])
        return model(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        scales = [scale_at(s) if inside(s) else 1.0 for s in t.reshape(-1).tolist()]
        if t.ndim == 0:  # filled in on the device: a copy from the CPU would wait for it
            t = torch.full((len(x),), t.item(), device=x.device, dtype=torch.float32)
        t = t.to(x.device, torch.float32)
        if all(scale == 1 for scale in scales):
            return model(x, t, y)
        if all(scale == 0 for scale in scales) and channels is None:
            return null_branch(x, t)
        cond, null = both_branches(x, t)
        scale = scales[0]
        if len(scales) > 1:
            scale = torch.tensor(scales, device=x.device, dtype=x.dtype).view(-1, *[1] * (x.ndim - 1))
        v = null + scale * (cond - null)
        return v if channels is None else torch.cat([v[:, :channels], cond[:, channels:]], dim=1)

    return velocity
