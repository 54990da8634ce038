"""Power function averages of the weights, of any width after training (EDM2, arXiv 2312.02696).

A power function average at step t weighs the weights of step tau by p(tau) = (g + 1) tau^g / t^(g + 1). The standard
deviation of p relative to t is its width, std = sqrt((g + 1) / ((g + 2)^2 (g + 3))). Averages of two widths, kept at
some steps, give that of any other width as a linear combination (section 3.2 and appendix C of the paper).
"""

import functools
from collections.abc import Sequence

import numpy as np

WIDEST = 12**-0.5  # std of the plain mean of all steps, g = 0


@functools.cache
def exponent_of(std: float) -> float:
    """Returns the exponent g of a relative width. ValueError: it is not in (0, 0.288)."""
    if not 0 < std < WIDEST:
        raise ValueError(f"the width of a power function average must be above 0 and below {WIDEST:.3f}, not {std}")
    t = std**-2
    roots = np.roots([1, 7, 16 - t, 12 - t])  # of (g + 2)^2 (g + 3) = t (g + 1)
    return float(max(roots[np.isreal(roots)].real))


def power_decay(std: float, step: int) -> float:
    """Returns the EMA decay in a step (0-based) that makes the average one of relative width `std`."""
    return (step / (step + 1)) ** (exponent_of(std) + 1)


def weights_of_steps(std: float, steps: int) -> np.ndarray:
    """Returns the weight of each of the first `steps` updates in the average, (steps,); they add up to 1."""
    powers = (np.arange(steps + 1) / steps) ** (exponent_of(std) + 1)
    return np.diff(powers)


def inner_products(of: Sequence[tuple[int, float]], others: Sequence[tuple[int, float]]) -> np.ndarray:
    """Returns the integrals of p_a p_b over the steps for averages (step, std), (len(of), len(others))."""
    t_a, t_b = (np.array([[step for step, _ in each]], np.float64) for each in (of, others))
    g_a, g_b = (np.array([[exponent_of(std) for _, std in each]]) for each in (of, others))
    t_a, g_a = t_a.T, g_a.T
    ratio = np.where(t_a < t_b, (t_a / t_b) ** g_b, (t_b / t_a) ** g_a)
    return (g_a + 1) * (g_b + 1) / (g_a + g_b + 1) * ratio / np.maximum(t_a, t_b)


def solve(kept: Sequence[tuple[int, float]], wanted: tuple[int, float]) -> tuple[np.ndarray, float]:
    """Returns the combination of kept averages that is closest to the wanted one.

    Args:
        kept: step and width of each average.
        wanted: step and width.

    Returns:
        Its coefficients (len(kept),), and the relative error of its weights of steps (root of the integral of squares).
    """
    products, target = inner_products(kept, kept), inner_products(kept, [wanted])[:, 0]
    coefficients = np.linalg.lstsq(products, target, rcond=1e-14)[0]
    size = float(inner_products([wanted], [wanted])[0, 0])
    rest = size - 2 * coefficients @ target + coefficients @ products @ coefficients
    return coefficients, float(max(0.0, rest) / size) ** 0.5
