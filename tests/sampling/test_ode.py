import math

import numpy as np
import pytest
import torch

from sit_atconv.flow import get_interpolant
from sit_atconv.sampling import SOLVERS, sample_ode, time_grid
from sit_atconv.sampling.solvers import Solver, dopri5, euler
from tests.conftest import relative_error

MEAN, DEVIATION = 0.7, 0.4


def gaussian_velocity(path, deviation=DEVIATION):
    """The exact velocity from N(0, 1) to N(MEAN, deviation^2)."""

    def velocity(x, t):
        curves = (path.alpha, path.sigma, path.d_alpha, path.d_sigma)
        alpha, sigma, d_alpha, d_sigma = (float(curve(t.double())) for curve in curves)
        variance = alpha**2 * deviation**2 + sigma**2
        return d_alpha * MEAN + (alpha * d_alpha * deviation**2 + sigma * d_sigma) / variance * (x - alpha * MEAN)

    return velocity


def error(path, deviation=DEVIATION, **options) -> float:
    noise = torch.linspace(-3, 3, 41, dtype=torch.float64)
    result = sample_ode(gaussian_velocity(get_interpolant(path), deviation), noise, **options)
    return (result - (MEAN + deviation * noise)).abs().max().item()


@pytest.mark.parametrize("path", ["linear", "gvp"])
@pytest.mark.parametrize(("solver", "bound"), [("euler", 0.05), ("heun", 2e-3), ("dopri5", 1e-2)])
def test_carries_a_gaussian_to_a_gaussian(path, solver, bound):
    assert error(path, solver=solver, num_steps=50) < bound


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver, order):
    coarse, fine = (error("linear", solver=solver, num_steps=n) for n in (40, 80))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_multistep_solvers_at_least_halve_their_error(solver):
    """Uses a deviation for which the error does not change sign."""
    coarse, fine = (error("linear", 0.3, solver=solver, num_steps=n) for n in (10, 20))
    assert fine < coarse / 2 and fine < error("linear", 0.3, solver="euler", num_steps=20) / 5


@pytest.mark.parametrize("rtol", [1e-3, 1e-5])
def test_dopri5_is_within_its_tolerance(rtol):
    def velocity(x, t):
        return gaussian_velocity(get_interpolant("linear"))(x, t)

    noise = torch.linspace(-3, 3, 41, dtype=torch.float64)
    result = dopri5(velocity, noise, time_grid(1), rtol=rtol, atol=1e-6)
    scale = (MEAN + DEVIATION * noise).abs().mean()
    assert (result - (MEAN + DEVIATION * noise)).abs().max() < 10 * rtol * scale


def test_multistep_solvers_equal_diffusers_on_its_own_grid():
    """Compares with diffusers' own loop and sigmas, on images (B, C, H, W)."""
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    velocity = gaussian_velocity(get_interpolant("linear"))
    noise = torch.randn(2, 3, 4, 4)
    options = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
    unipc, dpm = UniPCMultistepScheduler(**options), DPMSolverMultistepScheduler(**options)
    unipc.set_timesteps(sigmas=np.linspace(1, 0, 13)[:-1])
    dpm.set_timesteps(12)
    for name, scheduler in (("unipc", unipc), ("dpm++", dpm)):
        x = noise
        for i, timestep in enumerate(scheduler.timesteps):
            x = scheduler.step(-velocity(x, 1 - scheduler.sigmas[i]), timestep, x).prev_sample
        assert relative_error(sample_ode(velocity, noise, solver=name, num_steps=12), x) < 1e-5


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_multistep_solvers_take_any_grid(solver):
    noise = torch.linspace(-3, 3, 41)
    velocity = gaussian_velocity(get_interpolant("linear"))
    seen = []
    times = torch.cat([time_grid(550, 0, 0.5), torch.tensor([0.7, 1.0])])  # finer than their integer timesteps

    def recorded(x, t):
        seen.append(t.item())
        return velocity(x, t)

    sample_ode(recorded, noise, solver=solver, times=times)
    assert seen == times[:-1].tolist()
    result = sample_ode(velocity, noise, solver=solver, times=time_grid(40, shift=0.5))
    assert (result - (MEAN + DEVIATION * noise)).abs().max() < 0.02


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 10), ("heun", 20)])
def test_times_are_double_precision_fractions_on_the_cpu(solver, evaluations):
    times = []

    def velocity(x, t):
        times.append(t)
        return torch.zeros_like(x)

    sample_ode(velocity, torch.zeros(2, 3), solver=solver, num_steps=10)
    assert len(times) == evaluations
    assert all(t.dtype == torch.float64 and t.ndim == 0 and t.device.type == "cpu" for t in times)
    assert sorted({t.item() for t in times}) == [i / 10 for i in range(10 if solver == "euler" else 11)]


def test_explicit_times_override_the_number_of_steps():
    seen = []
    sample_ode(lambda x, t: seen.append(t.item()) or x, torch.ones(1), num_steps=3, times=[0.0, 0.5, 0.6, 0.9])
    assert seen == [0.0, 0.5, 0.6]


@pytest.mark.parametrize("solver", [name for name, solver in SOLVERS.items() if not (solver.is_sde or solver.jumps)])
def test_result_is_like_the_noise(solver):
    noise = torch.randn(2, 3, 4)
    assert sample_ode(lambda x, t: -x, noise, solver=solver, num_steps=3).dtype == torch.float32


@pytest.mark.parametrize("solver", [euler, Solver(euler, begin=0.5)])
def test_a_loop_or_an_entry_is_a_solver_too(solver):
    times = [0.0, 0.5, 1.0] if solver is euler else [0.5, 0.75, 1.0]
    expected = sample_ode(lambda x, t: x * t, torch.ones(2), times=times)
    assert torch.equal(sample_ode(lambda x, t: x * t, torch.ones(2), solver=solver, num_steps=2), expected)


def test_errors_name_the_value():
    wrong = [
        ({"solver": "rk9"}, "'rk9'"),
        ({"solver": "sde-heun"}, "sde-heun is for sample_sde"),
        ({"solver": "jump"}, r"jump needs a function of \(x, t, r\)"),
        ({"num_steps": 0}, "not 0"),
        ({"times": [0, 1, 1]}, "1.0, 1.0"),
        ({"times": [0.3]}, r"\[0\.3"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            sample_ode(lambda x, t: x, torch.zeros(1), **options)
