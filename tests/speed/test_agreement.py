"""Every form agrees with its second computation, and wrong computations are rejected in every dtype."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from sit_atconv.models.atconv import ATConv
from sit_atconv.models.attention import Attention
from sit_atconv.ops.reference import dynamic_depthwise_conv2d_reference
from sit_atconv.runtime.dtypes import torch_dtype
from sit_atconv.speed.agreement import BOUNDS, Check, attention_definition, check, check_operator, take_form
from sit_atconv.speed.computations import FloorMixer, PublishedATConv, TimmAttention, attend, published_conv2d
from sit_atconv.speed.forms import FORMS
from sit_atconv.speed.levels import Case, random_model
from sit_atconv.speed.options import SpeedOptions

CPU = torch.device("cpu")


def taken(form, dtype="fp32", training=False) -> float:
    config = SpeedOptions("Tiny/2", depth=3).model_config(form, 64)
    model = random_model(config, "fp32" if training else dtype, CPU).train(training)
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.int64)
    with torch.autocast("cpu", torch_dtype(dtype), enabled=training and dtype != "fp32"):
        found = take_form(model, form, *inputs, gradients=training)
    kinds = {
        "attention": Attention,
        "timm": TimmAttention,
        "published": PublishedATConv,
        "atconv": ATConv,
        "hybrid": (Attention, ATConv),
        "sparse-hybrid": (Attention, ATConv),
        "floor": FloorMixer,
    }
    assert len(model.blocks) == 3 and all(isinstance(block.attn, kinds[form]) for block in model.blocks)
    return found.error


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("form", [form for form, entry in FORMS.items() if entry.twin])
def test_forms_agree_with_errors_well_below_the_bound(form, dtype, training):
    assert taken(form, dtype, training) < BOUNDS[dtype] / 2.5


def transposed_taps(x, kernels, grid_size):
    return published_conv2d(x, kernels.transpose(-1, -2), grid_size)


def wrong_edges(x, kernels, grid_size):
    (B, N, C), (H, W) = x.shape, grid_size
    image = F.pad(x.transpose(1, 2).reshape(1, B * C, H, W), [1] * 4, mode="circular")
    y = F.conv2d(image, kernels.reshape(B * C, 1, 3, 3), groups=B * C)
    return y.reshape(B, C, N).transpose(1, 2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("conv", [transposed_taps, wrong_edges])
@pytest.mark.parametrize("form", ["published", "atconv", "hybrid", "floor"])
def test_a_wrong_convolution_is_found(monkeypatch, form, conv, dtype):
    if form == "floor":  # its twin has identity kernels, so change the form itself
        monkeypatch.setattr(FloorMixer, "forward", lambda self, x, grid_size: self.proj(self.x_proj(x).roll(1, 1)))
    monkeypatch.setattr("sit_atconv.speed.computations.published_conv2d", conv)
    assert taken(form, dtype) > BOUNDS[dtype]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("form", ["published", "atconv"])
def test_missing_inhibition_is_found(monkeypatch, form, dtype):
    generate = PublishedATConv.generate_kernels

    def without(self, x):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "sigmoid", torch.zeros_like)
            return generate(self, x)

    monkeypatch.setattr(PublishedATConv, "generate_kernels", without)
    assert taken(form, dtype) > BOUNDS[dtype]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("form", ["attention", "timm", "hybrid"])
def test_a_wrong_attention_is_found(monkeypatch, form, dtype):
    forward = TimmAttention.forward
    monkeypatch.setattr(
        TimmAttention,
        "forward",
        lambda self, x, grid_size: forward(self, x[:, :-1], None)[:, [*range(x.shape[1] - 1), 0]],
    )  # leaves out the last token
    assert taken(form, dtype) > BOUNDS[dtype]


def test_a_wrong_gradient_is_found_in_training_only(monkeypatch):
    """The values are right, but no weight gets a gradient."""
    forward = PublishedATConv.forward

    def detached(self, x, grid_size):
        y = forward(self, x, grid_size)
        return y.detach() + 0 * x if torch.is_grad_enabled() else y

    monkeypatch.setattr(PublishedATConv, "forward", detached)
    assert taken("published") < 1e-5
    assert taken("published", training=True) > 0.5


def test_the_operator_is_checked_with_its_gradients():
    x, kernels, grid_size = torch.randn(2, 15, 4), torch.randn(2, 4, 3, 3), (3, 5)

    def right(x, kernels):
        return dynamic_depthwise_conv2d_reference(x, kernels, grid_size)

    assert check_operator("right", right, right, x, kernels).error == 0
    for wrong in (
        lambda x, k: transposed_taps(x, k, grid_size),
        lambda x, k: right(x, k.detach()) + 0 * k.sum(),
        lambda x, k: right(x.detach(), k) + 0 * x,
    ):
        assert check_operator("wrong", wrong, right, x, kernels).error > 0.1


def test_the_operator_of_attention_is_checked():
    qkv, definition = torch.randn(2, 100, 3 * 8), partial(attention_definition, num_heads=2)
    assert definition(qkv).shape == (2, 64, 8)
    assert check_operator("right", lambda qkv: attend(qkv, 2), definition, qkv).error < 1e-6
    assert check_operator("one head", lambda qkv: attend(qkv, 1), definition, qkv).error > 0.1


@pytest.mark.parametrize("error", [2e-4, float("nan"), float("inf")])
def test_an_error_above_the_bound_is_rejected_with_its_value(error):
    Case(SpeedOptions(), 256, "fp32", CPU).require(Check("a and b", 9e-5))
    Case(SpeedOptions(), 256, "bf16", CPU).require(Check("a and b", 2e-4))
    here = Case(SpeedOptions(), 256, "fp32", CPU)
    with pytest.raises(ValueError, match=f"a and b do not agree at 256 px in fp32 .*error {error:.2g}, at most"):
        here.require(Check("a and b", error))
    assert here.checks == []


def test_the_largest_error_counts_and_nan_is_never_below_a_bound():
    zeros, ones, nan = torch.zeros(3), torch.ones(3), torch.full((3,), torch.nan)
    assert check("", [zeros, ones], [zeros, ones]).error == 0
    assert check("", [ones, ones, ones * 1.5], [ones, ones * 2, ones]).error == 0.5
    assert check("", [ones], [zeros]).error > 1
    for pair in ([nan], [ones]), ([ones], [nan]):
        assert not check("", *pair).error <= 1e9
