"""SDE solvers on a Gaussian whose flow, score and target are known."""

import math
from itertools import product

import pytest
import torch

from sit_atconv.flow import get_interpolant
from sit_atconv.flow.interpolants import DIFFUSION_FORMS
from sit_atconv.sampling import SampleStream, sample_sde
from sit_atconv.sampling.solvers import SOLVERS, euler_maruyama

MEAN = torch.tensor([0.7, -0.3])
DEVIATION = torch.tensor([0.5, 0.2])
SAMPLES = 20_000
SDE_SOLVERS = [name for name, solver in SOLVERS.items() if solver.is_sde]
QUICK = ("sbdm", "increasing-decreasing")  # the other forms are slow tests


@pytest.fixture(autouse=True)
def one_thread():
    """Uses one thread: work this small is slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gaussian_velocity(path):
    """The exact velocity towards N(MEAN, diag(DEVIATION^2))."""

    def velocity(x, t):
        alpha, sigma, d_alpha, d_sigma = (f(t).item() for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
        gain = (alpha * d_alpha * DEVIATION**2 + sigma * d_sigma) / (alpha**2 * DEVIATION**2 + sigma**2)
        return torch.addcmul(d_alpha * MEAN - alpha * MEAN * gain, x, gain)

    return velocity


def sample(path, **options):
    generator = torch.Generator().manual_seed(0)
    interpolant = get_interpolant(path)
    noise = torch.randn(SAMPLES, 2, generator=generator)
    return sample_sde(
        gaussian_velocity(interpolant),
        noise,
        interpolant,
        randn=lambda x: torch.randn(x.shape, generator=generator),
        **options,
    )


def standard_errors(x) -> float:
    """Returns the largest error of the mean and covariance of x, in standard errors."""
    mean = (x.mean(0) - MEAN) / (DEVIATION / len(x) ** 0.5)
    variances = (DEVIATION**2).outer(DEVIATION**2)
    covariance = (x.T.cov() - (DEVIATION**2).diag()) / ((variances + (DEVIATION**2).diag() ** 2) / len(x)).sqrt()
    return max(mean.abs().max(), covariance.abs().max()).item()


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[] if form in QUICK else pytest.mark.slow) for form in DIFFUSION_FORMS]
)
@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_reaches_the_target(path, form):
    assert standard_errors(sample(path, num_steps=1000, diffusion_form=form, last_step="none")) < 4


@pytest.mark.parametrize("last_step", ["mean", "tweedie", "euler"])
@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_stochastic_heun_reaches_the_target_in_few_steps(path, last_step):
    x = sample(path, solver="heun", num_steps=100, last_step=last_step, last_step_size=2e-3)
    assert standard_errors(x) < 4


@pytest.mark.slow
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
@pytest.mark.parametrize("last_step", ["mean", "tweedie", "euler"])
@pytest.mark.parametrize("solver", SDE_SOLVERS)
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_every_solver_and_last_step_reaches_the_target(path, solver, last_step, form):
    """Uses a short last step: it adds no noise, so "mean" lowers the variance by 2 w times its length."""
    x = sample(path, solver=solver, num_steps=1000, diffusion_form=form, last_step=last_step, last_step_size=2e-4)
    assert standard_errors(x) < 4


def test_a_wrong_score_would_show():
    """Without the score, the added noise widens the result."""
    linear = get_interpolant("linear")
    linear.score_from_velocity = lambda v, x, t: torch.zeros_like(x)
    x = sample_sde(gaussian_velocity(linear), torch.randn(SAMPLES, 2), linear, num_steps=100)
    assert standard_errors(x) > 20


@pytest.mark.parametrize(
    ("solver", "last_step", "num_steps", "evaluations", "last"),
    [
        ("euler", "mean", 10, 10, 0.96),
        ("euler", "none", 10, 10, 0.8991),
        ("euler", "Tweedie", 10, 10, 0.96),
        ("euler", "euler", 1, 1, 0.0),
        ("heun", "mean", 10, 19, 0.96),
        ("heun", None, 10, 20, 0.999),
    ],
)
def test_evaluations(solver, last_step, num_steps, evaluations, last):
    times = []
    sample_sde(
        lambda x, t: times.append(t) or -x,
        torch.zeros(2, 3),
        get_interpolant("linear"),
        solver=solver,
        num_steps=num_steps,
        last_step=last_step,
    )
    assert len(times) == evaluations
    assert all(t.dtype == torch.float64 and t.ndim == 0 and t.device.type == "cpu" for t in times)
    assert max(times).item() == pytest.approx(last)


def test_last_steps_by_hand():
    """Checks one step from 1 - size with the velocity 2 x against SiT's formulas; it adds no noise."""
    x, t, size = torch.tensor([0.5, -1.0]), 0.9, 0.1
    linear = get_interpolant("linear")
    score = -(x - t * 2 * x) / (1 - t)  # -noise / sigma, noise = x - t v
    expected = {
        "mean": x + size * (2 * x + (1 - t) * score),
        "euler": x + size * 2 * x,
        "tweedie": (x + (1 - t) ** 2 * score) / t,
    }
    for last_step, value in expected.items():
        result = sample_sde(
            lambda x, t: 2 * x,
            x,
            linear,
            times=[t, 1.0],
            last_step=last_step,
            randn=lambda x: torch.full_like(x, math.nan),
        )
        torch.testing.assert_close(result, value)


@pytest.mark.parametrize(("path", "form", "solver"), product(["linear", "gvp", "vp"], DIFFUSION_FORMS, SDE_SOLVERS))
def test_everything_is_finite_in_float32(path, form, solver):
    noise, interpolant = torch.randn(64, 1, 2, 2), get_interpolant(path)
    for last_step in ("none", "mean", "tweedie", "euler"):
        x = sample_sde(
            lambda x, t: interpolant.velocity(x.new_full((), 0.3), x, t),
            noise,
            interpolant,
            solver=solver,
            num_steps=5,
            diffusion_form=form.upper(),
            last_step=last_step,
        )
        assert x.dtype == torch.float32 and x.isfinite().all()


@pytest.mark.parametrize("solver", SDE_SOLVERS)
def test_noise_comes_from_the_stream_and_never_twice(solver):
    """Checks that the first increment is not the initial noise, and that a sample does not depend on its batch."""
    drawn = []

    def run(indices):
        stream = SampleStream(3, indices)
        noise = stream.randn((1, 4, 4))
        drawn.clear()

        def randn(x):
            drawn.append(stream.randn_like(x))
            return drawn[-1]

        x = sample_sde(lambda x, t: -x, noise, get_interpolant("linear"), solver=solver, num_steps=5, randn=randn)
        return noise, torch.stack(drawn), x

    noise, increments, x = run(range(7))
    assert len(increments) == 4
    draws = torch.cat([noise[None], increments]).flatten(2).flatten(0, 1)  # of all times and samples
    assert len(draws.unique(dim=0)) == 5 * 7
    alone = run([5])
    assert torch.equal(alone[1][:, 0], increments[:, 5]) and torch.equal(alone[2][0], x[5])


def test_a_loop_is_a_solver_too_and_the_prefix_sde_is_optional():
    x = [
        sample_sde(
            lambda x, t: -x,
            torch.ones(2, 3),
            get_interpolant("linear"),
            solver=solver,
            num_steps=4,
            randn=torch.ones_like,
        )
        for solver in ("euler", "sde-euler", euler_maruyama, SOLVERS["sde-euler"])
    ]
    assert all(torch.equal(x[0], other) for other in x)


def test_errors_name_the_value():
    wrong = [
        ({"solver": "rk4"}, "'rk4'"),
        ({"solver": "dopri5"}, "dopri5 is for sample_ode"),
        ({"num_steps": 0}, "not 0"),
        ({"last_step": "best"}, "'best'"),
        ({"diffusion_form": "cubic"}, "'cubic'"),
        ({"diffusion_norm": -1.0}, r"negative: -1\.0"),
        ({"last_step_size": 1.0}, r"not 1\.0"),
        ({"times": [0.5]}, r"\[0\.5"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            sample_sde(lambda x, t: x, torch.zeros(2), get_interpolant("linear"), **options)
