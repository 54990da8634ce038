import pytest
import torch

from sit_atconv.sampling import guidance_schedule, guided, sample_ode
from tests.models.test_sit import randomised

X, T, Y = torch.randn(3, 4, 8, 8), torch.tensor(0.3, dtype=torch.float64), torch.tensor([1, 2, 3])


class Counting:
    """A model that records the sizes of its batches."""

    def __init__(self, model):
        self.model, self.null_label, self.batches = model, model.null_label, []

    def __call__(self, x, t, y):
        self.batches.append(len(x))
        return self.model(x, t, y)


@pytest.fixture
def model():
    return Counting(randomised())


def branches(model, x=X):
    t = torch.full((len(x),), 0.3)
    return model(x, t, Y), model(x, t, torch.full_like(Y, model.null_label))


def test_guides_all_channels_in_one_forward(model):
    cond, null = branches(model.model)
    v = guided(model, Y, cfg=2.5)(X, T)
    assert model.batches == [6]
    torch.testing.assert_close(v, null + 2.5 * (cond - null), rtol=1e-4, atol=1e-5)


def test_cfg_1_and_cfg_0_need_one_branch_only(model):
    cond, null = branches(model.model)
    assert torch.equal(guided(model, Y, cfg=1.0)(X, T), cond)
    assert torch.equal(guided(model, Y, cfg=0.0)(X, T), null)
    assert model.batches == [3, 3]


def test_channels_limits_guidance_to_the_first_channels(model):
    cond, _ = branches(model.model)
    everything, three = guided(model, Y, cfg=4.0)(X, T), guided(model, Y, cfg=4.0, channels=3)(X, T)
    torch.testing.assert_close(three[:, :3], everything[:, :3])
    torch.testing.assert_close(three[:, 3:], cond[:, 3:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(everything[:, 3:], cond[:, 3:], atol=1e-2)


def test_the_interval_excludes_its_upper_end_unless_that_is_1(model):
    velocity = guided(model, Y, cfg=4.0, interval=(0.2, 0.7))
    sample_ode(velocity, X, solver="euler", num_steps=10)  # t = 0, 0.1, ... 0.9
    assert model.batches == [3, 3, 6, 6, 6, 6, 6, 3, 3, 3]
    model.batches.clear()
    guided(model, Y, cfg=4.0)(X, torch.tensor(1.0, dtype=torch.float64))
    assert model.batches == [6]


def test_scale_may_depend_on_time(model):
    schedule = guided(model, Y, cfg=lambda t: 1 + 5 * t)
    torch.testing.assert_close(schedule(X, T), guided(model, Y, cfg=2.5)(X, T), rtol=1e-5, atol=1e-5)


def test_an_interval_of_half_the_time_guides_half_of_the_steps():
    counting = Counting(randomised())
    sample_ode(guided(counting, Y, cfg=4.0, interval=(0.3, 0.8)), X, solver="euler", num_steps=50)
    assert sorted(counting.batches) == [3] * 25 + [6] * 25


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedules_rise_from_1_and_average_to_the_scale(name):
    scale = guidance_schedule(name, 4.0)
    values = [scale(i / 1000) for i in range(1001)]
    assert values[0] == 1 and values == sorted(values) and sum(values) / 1001 == pytest.approx(4.0)
    assert guidance_schedule("linear", 4.0)(0.25) == 2.5 and guidance_schedule("cosine", 4.0)(0.5) == pytest.approx(4.0)


def test_a_constant_schedule_is_the_scale_itself():
    assert guidance_schedule("constant", 4.0) == 4.0 and guidance_schedule("linear", 1.0) == 1.0
    with pytest.raises(ValueError, match="'steep'"):
        guidance_schedule("steep", 4.0)


def test_times_may_differ_within_the_batch(model):
    velocity = guided(model, Y, cfg=4.0, interval=(0.0, 0.5))
    t = torch.tensor([0.1, 0.3, 0.8])
    mixed = velocity(X, t)
    for i in range(3):
        alone = guided(model, Y[i : i + 1], cfg=4.0, interval=(0.0, 0.5))(X[i : i + 1], t[i])
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_a_weak_model_replaces_the_null_branch(model):
    cond, null = branches(model.model)
    velocity = guided(model, Y, cfg=3.0, weak=lambda x, t, y: null)
    torch.testing.assert_close(velocity(X, T), null + 3 * (cond - null))


def test_guidance_without_a_null_label_is_an_error():
    model = randomised(has_null_label=False)
    assert model.null_label is None
    with pytest.raises(ValueError, match=r"cfg = 4\.0 needs a null label"):
        guided(model, Y)
    with pytest.raises(ValueError, match="null label"):
        guided(model, Y, cfg=0.0)
    assert guided(model, Y, cfg=1.0)(X, T).shape == X.shape
