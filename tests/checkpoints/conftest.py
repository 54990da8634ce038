"""Fixtures: a training state to save, and a recipe for it."""

import pytest
import torch

from sit_atconv.checkpoints.recipe import Recipe
from sit_atconv.checkpoints.training_state import TrainingState
from tests.models.test_sit import randomised


def recipe(step: int) -> Recipe:
    codec = {"kind": "identity", "channels": 4, "downsample": 1}
    return Recipe("linear", "velocity", codec, [str(i) for i in range(10)], step)


@pytest.fixture
def state():
    model, ema = randomised(), randomised()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(1, 4, 8, 8), torch.rand(1), torch.tensor([1])).sum().backward()
    optimizer.step()
    return TrainingState(model, {0.99: ema, 0.9: randomised()}, optimizer)
