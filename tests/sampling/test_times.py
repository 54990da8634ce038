import pytest
import torch

from sit_atconv.sampling import time_grid


def test_uniform_times_are_exact_fractions():
    assert all(time_grid(n).tolist() == [i / n for i in range(n + 1)] for n in (1, 7, 50, 250))
    assert time_grid(50).dtype == torch.float64


def test_shift_moves_times_towards_noise():
    """SD3's formula, with t = 1 for noise: s t / (1 + (s - 1) t)."""
    u = 1 - time_grid(10)
    torch.testing.assert_close(1 - time_grid(10, shift=3.0), 3 * u / (1 + 2 * u))
    assert time_grid(10, shift=3.0)[5] < 0.5 < time_grid(10, shift=0.5)[5]


def test_ends_are_kept():
    for shift in (0.3, 1.0, 4.0):
        times = time_grid(9, 0.001, 0.999, shift)
        assert times[0] == 0.001 and times[-1] == pytest.approx(0.999, abs=1e-15) and (times.diff() > 0).all()


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="not 0"):
        time_grid(0)
    with pytest.raises(ValueError, match=r"not -1\.0"):
        time_grid(3, shift=-1.0)
