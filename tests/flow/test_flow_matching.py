import pytest
import torch

from sit_atconv.flow import FlowMatching, as_velocity, get_interpolant

PATHS, PREDICTIONS = ["linear", "gvp", "vp"], ["velocity", "noise", "score", "data"]


class Recorder:
    """A model that records its inputs and returns `answer`."""

    def __init__(self, answer=0.0):
        self.answer = answer

    def __call__(self, x, t, y):
        self.x, self.t, self.y = x, t, y
        return torch.zeros_like(x) + self.answer


def draw_and_loss(flow, model, data, y=None, null_label=None, seed=0):
    draw = flow.draw(data.shape, torch.Generator().manual_seed(seed))
    y = torch.zeros(len(data), dtype=torch.long) if y is None else y
    return draw, flow.loss(model, data, y, draw, null_label)["loss"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_is_zero_for_a_perfect_model_only(path, prediction):
    """All data are equal, so that x and t determine the noise, and a model can be perfect."""
    flow, data = FlowMatching(path, prediction, class_dropout_prob=0.0), torch.full((64, 1, 2, 2), 0.7)
    interpolant = get_interpolant(path)

    def oracle(x, t, y):
        x, t, z = x.double(), t.double(), data.double()
        v = interpolant.velocity_from_data(z, x, t)
        return {
            "velocity": lambda: v,
            "data": lambda: z,
            "noise": lambda: interpolant.noise_from_velocity(v, x, t),
            "score": lambda: interpolant.score_from_velocity(v, x, t),
        }[prediction]()

    _, loss = draw_and_loss(flow, oracle, data)
    _, wrong = draw_and_loss(flow, Recorder(), data)
    assert loss.shape == (64,) and loss.max() < 1e-3 * wrong.mean()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_velocity_weighting_is_the_error_of_the_velocity(path, prediction):
    """The weight is SiT's lambda (appendix): the loss equals that of the velocity implied by the prediction."""
    flow, data = FlowMatching(path, prediction, "velocity", class_dropout_prob=0.0), torch.randn(64, 1, 2, 2)
    answer = torch.randn(64, 1, 2, 2)
    draw, loss = draw_and_loss(flow, Recorder(answer), data)
    interpolant, t = get_interpolant(path), draw.t.double()
    x = interpolant.interpolate(data.double(), draw.noise.double(), t)
    v = as_velocity(Recorder(answer.double()), interpolant, prediction)(x, t, None)
    error = (v - interpolant.velocity(data.double(), draw.noise.double(), t)).square().flatten(1).mean(1)
    torch.testing.assert_close(loss.double(), error, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ["noise", "score", "data"])
def test_likelihood_weighting_follows_sits_formula(path, prediction):
    """The weight of the noise's squared error is (alpha'/alpha sigma^2 - sigma sigma') / sigma^2."""
    flow, interpolant = FlowMatching(path, prediction, "likelihood"), get_interpolant(path)
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    alpha, sigma, d_alpha, d_sigma = (getattr(interpolant, n)(t) for n in ("alpha", "sigma", "d_alpha", "d_sigma"))
    diffusion = d_alpha / alpha * sigma**2 - sigma * d_sigma
    noise_per_prediction = alpha / sigma if prediction == "data" else 1.0
    torch.testing.assert_close(flow.weights(t), diffusion / sigma**2 * noise_per_prediction**2)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", ["none", "velocity", "likelihood"])
def test_the_loss_is_finite_at_the_ends_of_the_training_interval(path, prediction, weighting):
    if (prediction, weighting) == ("velocity", "likelihood"):
        with pytest.raises(ValueError, match=r"flow.weighting likelihood is infinite .* velocity"):
            FlowMatching(path, prediction, weighting)
        return
    flow = FlowMatching(path, prediction, weighting)
    t0, t1 = get_interpolant(path).interval(prediction, training=True)
    draw = flow.draw((4, 1, 2, 2), torch.Generator().manual_seed(0))
    ends = type(draw)(draw.noise, torch.tensor([t0, t1, t0, t1]), draw.dropped)
    assert flow.loss(Recorder(1.0), torch.ones(4, 1, 2, 2), torch.zeros(4).long(), ends, 1)["loss"].isfinite().all()


def test_labels_are_replaced_at_random_by_the_null_label():
    model, y = Recorder(), torch.arange(10_000) % 10
    draw_and_loss(FlowMatching(class_dropout_prob=0.1), model, torch.zeros(10_000, 1, 1, 1), y, 10)
    dropped = model.y == 10
    assert 0.09 < dropped.float().mean() < 0.11
    assert torch.equal(model.y[~dropped], y[~dropped])


def times(**options):
    return FlowMatching(**options).draw((50_000, 1, 1, 1), torch.Generator().manual_seed(0)).t.double()


def test_times_are_uniform_or_logit_normal_and_shifted_towards_noise():
    t = times()
    assert 0 <= t.min() < 1e-3 and 1 - 1e-3 < t.max() <= 1
    quantiles = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    torch.testing.assert_close(t.quantile(quantiles), quantiles, atol=0.01, rtol=0)
    logits = torch.logit(times(time_sampling="logit_normal", logit_mean=-0.5, logit_std=0.8))
    assert logits.mean() == pytest.approx(-0.5, abs=0.02) and logits.std() == pytest.approx(0.8, abs=0.02)
    shifted = times(time_shift=2.0)  # SD3, equation 23, in time from data to noise: s u / (1 + (s - 1) u)
    noise_time = 1 - quantiles
    torch.testing.assert_close(shifted.quantile(quantiles), 1 - 2 * noise_time / (1 + noise_time), atol=0.01, rtol=0)
    assert shifted.mean() < 0.42
    interval = get_interpolant("linear").interval("noise", training=True)
    bounded = times(prediction="noise")
    assert bounded.min() >= interval[0] and bounded.max() <= interval[1] and interval != (0.0, 1.0)


def test_only_the_generator_decides_the_draw_and_rows_are_parts_of_it():
    flow = FlowMatching()

    def draw(seed):
        return flow.draw((8, 1, 2, 2), torch.Generator().manual_seed(seed))

    torch.manual_seed(0)
    first = draw(1)
    torch.manual_seed(5)
    again, other = draw(1), draw(2)
    assert torch.equal(first.noise, again.noise) and torch.equal(first.t, again.t)
    assert not torch.equal(first.noise, other.noise) and not torch.equal(first.t, other.t)
    part = first[slice(2, 5)]
    assert torch.equal(part.noise, first.noise[2:5]) and torch.equal(part.t, first.t[2:5]) and len(part.dropped) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"class_dropout_prob": 1.5},
        {"time_shift": 0.0},
        {"logit_std": -1.0},
        {"time_shift": float("nan")},
        {"logit_mean": float("nan")},
    ],
)
def test_values_out_of_range_are_named(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=rf"flow\.{name} must .*{value}"):
        FlowMatching(**options)
