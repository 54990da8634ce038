"""Time grids, in float64.

In float32, a time at an end of the guidance interval may be rounded to the wrong side.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def time_grid(num_steps: int, t0: float = 0.0, t1: float = 1.0, shift: float = 1.0) -> Tensor:
    """Returns num_steps + 1 increasing times from t0 to t1, float64 on the CPU.

    Args:
        num_steps: number of intervals, at least 1.
        t0, t1: the first and the last time.
        shift: 1 is uniform; s > 1 puts more steps near noise, u -> u / (u + s (1 - u)), as SD3 (arXiv 2403.03206) and
            as the `time_shift` of training.

    Raises:
        ValueError: fewer than one step, or a shift that is not positive.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, not {num_steps}")
    if not 0 < shift < float("inf"):
        raise ValueError(f"shift must be positive and finite, not {shift}")
    u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    return t0 + (t1 - t0) * (u / (u + shift * (1 - u)))


def as_times(times: Iterable[float] | Tensor) -> Tensor:
    """Returns times as float64 on the CPU. ValueError: fewer than two, or they do not increase."""
    times = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    if times.ndim != 1 or len(times) < 2 or not (times.diff() > 0).all():
        raise ValueError(f"times must be two or more increasing numbers, not {times.tolist()}")
    return times
