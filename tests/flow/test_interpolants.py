import math

import pytest
import torch

from sit_atconv.flow import as_velocity, get_interpolant
from sit_atconv.flow.interpolants import DIFFUSION_FORMS
from tests.conftest import relative_error

NAMES = ["linear", "gvp", "vp"]


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 3, 2, 2, generator=generator, dtype=torch.float64).unbind()


@pytest.mark.parametrize(
    ("name", "alpha", "sigma"),
    [
        ("linear", lambda t: t, lambda t: 1 - t),
        ("gvp", lambda t: math.sin(math.pi * t / 2), lambda t: math.cos(math.pi * t / 2)),
        (
            "vp",
            lambda t: math.exp(-4.975 * (1 - t) ** 2 - 0.05 * (1 - t)),
            lambda t: math.sqrt(1 - math.exp(-9.95 * (1 - t) ** 2 - 0.1 * (1 - t))),
        ),
    ],
)
def test_alpha_and_sigma_equal_their_closed_forms(name, alpha, sigma):
    path = get_interpolant(name)
    for t in (0.0, 0.1, 0.5, 0.9):
        at = torch.tensor(t, dtype=torch.float64)
        assert path.alpha(at).item() == pytest.approx(alpha(t), abs=1e-12)
        assert path.sigma(at).item() == pytest.approx(sigma(t), abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_paths_start_as_noise_and_end_as_data(name, pair):
    data, noise = pair
    path = get_interpolant(name)
    assert relative_error(path.interpolate(data, noise, torch.zeros(5)), noise) < 0.01
    assert relative_error(path.interpolate(data, noise, torch.ones(5)), data) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_velocity_is_the_derivative_of_the_path(name, pair):
    data, noise = pair
    path = get_interpolant(name)
    t = torch.tensor([0.05, 0.3, 0.5, 0.7, 0.95], dtype=torch.float64)
    _, derivative = torch.func.jvp(lambda t: path.interpolate(data, noise, t), (t,), (torch.ones_like(t),))
    assert relative_error(path.velocity(data, noise, t), derivative) < 1e-12


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("t", [torch.tensor([0.05, 0.3, 0.5, 0.7, 0.95]), torch.tensor(0.4), 0.4])
def test_conversions_round_trip(name, t, pair):
    data, noise = pair
    path = get_interpolant(name)
    t = t.double() if isinstance(t, torch.Tensor) else t
    x, v = path.interpolate(data, noise, t), path.velocity(data, noise, t)
    score = path.score_from_velocity(v, x, t)
    assert relative_error(path.data_from_velocity(v, x, t), data) < 1e-9
    assert relative_error(path.noise_from_velocity(v, x, t), noise) < 1e-9
    assert relative_error(path.noise_from_score(score, t), noise) < 1e-9
    for back in (
        path.velocity_from_data(data, x, t),
        path.velocity_from_noise(noise, x, t),
        path.velocity_from_score(score, x, t),
    ):
        assert relative_error(back, v) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_score_is_that_of_the_gaussian_around_the_data(name, pair):
    """p(x_t | data) is Gaussian with mean alpha * data and standard deviation sigma."""
    data, noise = pair
    path, t = get_interpolant(name), torch.tensor(0.6, dtype=torch.float64)
    x = path.interpolate(data, noise, t)
    gaussian = torch.distributions.Normal(path.alpha(t) * data, path.sigma(t))
    score = torch.func.grad(lambda x: gaussian.log_prob(x).sum())(x)
    assert relative_error(path.score_from_velocity(path.velocity(data, noise, t), x, t), score) < 1e-9


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score", "data"])
@pytest.mark.parametrize("training", [False, True])
def test_formulas_are_finite_on_the_interval(name, prediction, training, pair):
    data, noise = pair
    path = get_interpolant(name)
    for t in path.interval(prediction, training):
        t = torch.tensor(t, dtype=torch.float64)
        assert path.velocity(data, noise, t).isfinite().all()
        x, score = path.interpolate(data, noise, t), path.score_from_noise(noise, t)
        model = {"velocity": path.velocity(data, noise, t), "noise": noise, "score": score, "data": data}[prediction]
        assert as_velocity(lambda x, t, y, model=model: model, path, prediction)(x, t, None).isfinite().all()


def test_intervals_of_the_ode_equal_those_of_sit():
    assert get_interpolant("linear").interval() == get_interpolant("gvp").interval(training=True) == (0.0, 1.0)
    assert get_interpolant("vp").interval() == (0.0, 1 - 1e-3)
    assert get_interpolant("vp").interval(training=True) == (0.0, 1 - 1e-5)
    assert get_interpolant("linear").interval("noise") == (1e-3, 1 - 1e-3)


DIFFUSIONS = {  # w(t) written out, with norm 0.7
    "constant": lambda t, sbdm, sigma: 0.7,
    "SBDM": lambda t, sbdm, sigma: 0.7 * sbdm,
    "sigma": lambda t, sbdm, sigma: 0.7 * sigma,
    "linear": lambda t, sbdm, sigma: 0.7 * (1 - t),
    "decreasing": lambda t, sbdm, sigma: 0.25 * (0.7 * math.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda t, sbdm, sigma: 0.7 * math.sin(math.pi * t) ** 2,
}
SBDM = {  # alpha' / alpha sigma^2 - sigma sigma', simplified; for VP it is beta(t) / 2
    "linear": lambda t: (1 - t) / t,
    "gvp": lambda t: math.pi / 2 / math.tan(math.pi * t / 2),
    "vp": lambda t: (0.1 + (1 - t) * 19.9) / 2,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", DIFFUSIONS)
def test_diffusion_forms_equal_closed_forms(name, form, pair):
    path, x = get_interpolant(name), pair[0]
    sigma = {
        "linear": lambda t: 1 - t,
        "gvp": lambda t: math.cos(math.pi * t / 2),
        "vp": lambda t: path.sigma(torch.tensor(t, dtype=torch.float64)).item(),
    }[name]
    times = [0.05, 0.3, 0.5, 0.7, 0.95]
    expected = [DIFFUSIONS[form](t, SBDM[name](t), sigma(t)) for t in times]
    together = path.diffusion(x, torch.tensor(times, dtype=torch.float64), form, 0.7)
    assert together.shape == (5, 1, 1, 1)
    torch.testing.assert_close(together.flatten(), torch.tensor(expected, dtype=torch.float64))
    for t, value in zip(times, expected, strict=True):
        alone = path.diffusion(x, torch.tensor(t, dtype=torch.float64), form.lower(), 0.7)
        assert alone.ndim == 0 and alone.item() == pytest.approx(value) == path.diffusion(x, t, form, 0.7).item()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
def test_drift_of_the_sde_is_finite_on_its_interval(name, form, pair):
    data, noise = pair
    path = get_interpolant(name)
    for t in path.interval(diffusion_form=form):
        t = torch.tensor(t, dtype=torch.float64)
        x, v = path.interpolate(data, noise, t), path.velocity(data, noise, t)
        assert (v + path.diffusion(x, t, form) * path.score_from_velocity(v, x, t)).isfinite().all()


def test_intervals_of_sdes_equal_those_of_sit():
    linear, vp = get_interpolant("linear"), get_interpolant("vp")
    assert linear.interval(diffusion_form="sigma") == (0.0, 1 - 1e-3)
    assert linear.interval(diffusion_form="SBDM") == linear.interval("data", diffusion_form="sigma") == (1e-3, 1 - 1e-3)
    assert vp.interval(diffusion_form="sbdm") == (0.0, 1 - 1e-3)


def test_as_velocity_keeps_the_null_label():
    class Model:
        null_label = 7

    assert as_velocity(Model(), get_interpolant("linear"), "noise").null_label == 7
    model = Model()
    assert as_velocity(model, get_interpolant("linear"), "velocity") is model


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'cosine'"):
        get_interpolant("cosine")
    with pytest.raises(ValueError, match="'cubic'"):
        get_interpolant("linear").diffusion(torch.zeros(1), 0.5, "cubic")
    with pytest.raises(ValueError, match="'flow'"):
        as_velocity(None, get_interpolant("linear"), "flow")
