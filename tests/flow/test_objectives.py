import pytest
import torch

from sit_atconv.flow import FlowMatching, get_interpolant


class Recorder:
    """A model that keeps what it was asked."""

    def __call__(self, x, t, y):
        self.x, self.t, self.y = x, t, y
        return torch.zeros_like(x)


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_loss_is_zero_for_the_true_velocity_and_not_otherwise(path):
    """All data alike: then x and t say what the noise was, and the model can be perfect."""
    interpolant, data = get_interpolant(path), torch.full((64, 1, 2, 2), 0.7)

    def oracle(x, t, y):
        return interpolant.velocity_from_data(data, x.double(), t.double())

    y, objective = torch.zeros(64, dtype=torch.long), FlowMatching(path, class_dropout_prob=0.0)
    loss = objective.loss(oracle, data, y, torch.Generator().manual_seed(0), None)
    wrong = objective.loss(Recorder(), data, y, torch.Generator().manual_seed(0), None)
    assert loss.shape == (64,) and loss.max() < 1e-3 * wrong.mean()


def test_labels_are_dropped_at_random_to_the_null_label():
    model, y = Recorder(), torch.arange(10_000) % 10
    objective = FlowMatching(class_dropout_prob=0.1)
    objective.loss(model, torch.zeros(10_000, 1, 1, 1), y, torch.Generator().manual_seed(0), 10)
    dropped = model.y == 10
    assert 0.09 < dropped.float().mean() < 0.11
    assert torch.equal(model.y[~dropped], y[~dropped])
    assert model.t.min() >= 0 and model.t.max() <= 1 and model.t.std() > 0.28


def test_the_generator_is_the_only_source_of_randomness():
    def draw(seed):
        model = Recorder()
        generator = torch.Generator().manual_seed(seed)
        FlowMatching().loss(model, torch.zeros(8, 1, 2, 2), torch.zeros(8).long(), generator, 10)
        return torch.cat([model.x.flatten(), model.t, model.y])

    torch.manual_seed(0)
    first = draw(1)
    torch.manual_seed(5)
    assert torch.equal(first, draw(1)) and not torch.equal(first, draw(2))


def test_dropout_out_of_range():
    with pytest.raises(ValueError, match=r"1\.5"):
        FlowMatching(class_dropout_prob=1.5)
