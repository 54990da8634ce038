"""Multiply-adds of every level and form agree with torch's FlopCounterMode."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sit_atconv.models import SiT
from sit_atconv.models.atconv import ATConv
from sit_atconv.models.costs import multiply_adds
from sit_atconv.models.presets import preset_config
from sit_atconv.speed import computations
from sit_atconv.speed.computations import attend, published_conv2d
from sit_atconv.speed.costs import form_multiply_adds, operator_cost
from sit_atconv.speed.forms import FORMS

BASE = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=3, num_heads=4, num_classes=5)
CONFIGS = {
    "plain": {},
    "kernel 5": {"kernel_size": 5},
    "one output": {"learn_sigma": False, "mlp_ratio": 2.5},
    "pixels": {"patch_size": 1, "has_null_label": False},
}


class Counted(nn.Module):
    """ATConv with a convolution that torch can count."""

    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, x, grid_size):
        kernels = self.mixer.generate_kernels(x, grid_size)
        return self.mixer.proj(published_conv2d(self.mixer.x_proj(x), kernels, grid_size))


def counted(function, *inputs) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # as plain matrix products
        function(*inputs)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def model_of(form, config):
    model = SiT(**config)
    for block in model.blocks:
        block.attn = getattr(computations, FORMS[form].take)(block.attn)
        if isinstance(block.attn, ATConv):
            block.attn = Counted(block.attn)
    return model


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("form", FORMS)
def test_multiply_adds_of_mixer_block_and_model(form, changes):
    grid_size = (3, 5)
    config = {**BASE, "mixer": FORMS[form].mixer, **changes}
    model, (H, W), p = model_of(form, config), grid_size, config["patch_size"]
    x, c = torch.randn(2, H * W, 32), torch.randn(2, 32)
    runs = {
        "mixer": (model.blocks[0].attn, x, grid_size),
        "block": (model.blocks[0], x, c, grid_size),
        "model": (model, torch.randn(2, 3, H * p, W * p), torch.rand(2), torch.zeros(2, dtype=torch.int64)),
    }
    for level in [level for level in runs if level in FORMS[form].levels or level == "model"]:
        assert 2 * form_multiply_adds(level, form, config, grid_size) == counted(*runs[level]), level


@pytest.mark.parametrize("changes", [{"kernel_pool": "grid"}, {"mixer": ["attention", "atconv", "atconv"]}])
def test_multiply_adds_of_other_models(changes):
    config = {**BASE, **changes}
    inputs = torch.randn(1, 3, 8, 8), torch.rand(1), torch.zeros(1, dtype=torch.int64)
    assert multiply_adds(config, (4, 4)) == counted(model_of("atconv", config), *inputs)


@pytest.mark.parametrize(
    "form, k, D, quantities",
    [
        ("attention", 3, 32, {"backward": [0]}),
        # One channel of one sample: the gradient of a grouped kernel is counted by torch as if it were not grouped.
        ("published", 3, 1, {"backward": [0, 1], "grad_x": [0], "grad_kernels": [1]}),
        ("published", 5, 1, {"backward": [0, 1], "grad_x": [0], "grad_kernels": [1]}),
    ],
)
def test_multiply_adds_of_the_operators_and_their_gradients(form, k, D, quantities):
    config, N, grid_size = {"hidden_size": D, "kernel_size": k}, 15, (3, 5)
    if form == "attention":
        leaves = [torch.randn(1, N, 3 * D, requires_grad=True)]
    else:
        leaves = [torch.randn(1, N, D, requires_grad=True), torch.randn(1, D, k, k, requires_grad=True)]

    def function(*tensors):
        return attend(*tensors, 4) if form == "attention" else published_conv2d(*tensors, grid_size)

    cost = operator_cost(form, config, grid_size)
    assert cost["forward"][0] == counted(function, *leaves)
    with sdpa_kernel(SDPBackend.MATH):
        y = function(*leaves)
    for quantity, wanted in quantities.items():
        found = counted(lambda w=wanted: torch.autograd.grad(y.sum(), [leaves[i] for i in w], retain_graph=True))
        assert cost[quantity][0] == found, quantity


def test_multiply_adds_of_the_operator_grow_with_the_channels():
    (one, _), (eight, _) = (operator_cost("atconv", {"hidden_size": D}, (3, 5))["forward"] for D in (1, 8))
    assert eight == 8 * one and operator_cost("floor", {}, (3, 5))["forward"][0] == 0


def test_the_operator_reads_its_inputs_and_writes_its_outputs_once():
    found = {q: numbers for q, (_, numbers) in operator_cost("atconv", {"hidden_size": 8}, (4, 6)).items()}
    x, kernels = 24 * 8, 8 * 9
    one = 2 * x + kernels
    assert found == {"forward": one, "grad_x": one, "grad_kernels": one, "backward": 3 * x + 2 * kernels}
    assert operator_cost("attention", {"hidden_size": 8}, (4, 6))["forward"][1] == (3 + 1) * 24 * 8  # q, k, v; y


@pytest.mark.parametrize("form, giga", [("attention", 118.6), ("published", 105.0), ("atconv", 95.9)])
def test_multiply_adds_in_the_docs(form, giga):
    config = {**preset_config("SiT-XL/2"), "mixer": FORMS[form].mixer}
    assert round(form_multiply_adds("model", form, config, (16, 16)) / 1e9, 1) == giga
