import pytest
import torch

from sit_atconv.models import ATConv
from sit_atconv.models.attention import Attention
from sit_atconv.ops.reference import dynamic_depthwise_conv2d_reference
from sit_atconv.speed.computations import FloorMixer, PublishedATConv, TimmAttention, attend, published_conv2d
from tests.conftest import relative_error


@pytest.mark.parametrize(
    ("name", "dim", "k", "side"), [("atconv_dim16_k5_grid8", 16, 5, 8), ("atconv_dim24_k3_grid6", 24, 3, 6)]
)
def test_the_published_form_agrees_with_the_golden_tensors(golden, name, dim, k, side):
    tensors, weights = golden(name)
    mixer = PublishedATConv(ATConv(dim, k))
    mixer.load_state_dict(weights)
    x = tensors["input"].requires_grad_()
    output = mixer(x, (side, side))
    (output * tensors["cotangent"]).sum().backward()
    assert relative_error(output, tensors["output"]) < 1e-5
    assert relative_error(mixer.generate_kernels(x), tensors["kernels"]) < 1e-5
    gradients = {name: p.grad for name, p in mixer.named_parameters()} | {"input": x.grad}
    for name, gradient in gradients.items():
        assert relative_error(gradient, tensors[f"grad.{name}"]) < 1e-5, name


def test_the_published_form_pools_in_raster_order():
    with pytest.raises(ValueError, match="pools in raster order, not 'grid'"):
        PublishedATConv(ATConv(8, pool="grid"))


@pytest.mark.parametrize("k, grid_size", [(3, (5, 7)), (5, (4, 4)), (7, (2, 3))])
def test_the_published_convolution_agrees_with_the_definition(k, grid_size):
    x, kernels = torch.randn(2, grid_size[0] * grid_size[1], 6), torch.randn(2, 6, k, k)
    expected = dynamic_depthwise_conv2d_reference(x, kernels, grid_size)
    assert relative_error(published_conv2d(x, kernels, grid_size), expected) < 1e-6


@pytest.mark.parametrize("qk_norm", [False, True])
def test_timms_attention_has_our_weights_and_gives_our_values(qk_norm):
    ours, x = Attention(16, 4, qk_norm), torch.randn(2, 9, 16)
    timms = TimmAttention(ours)
    assert dict(timms.named_parameters()).keys() == dict(ours.named_parameters()).keys()
    assert all(p is q for p, q in zip(timms.parameters(), ours.parameters(), strict=True))
    assert relative_error(timms(x, (3, 3)), ours(x, (3, 3))) < 1e-6
    assert timms.fused_attn


def test_attend_is_attention_between_its_projections():
    mixer, x = Attention(16, 4), torch.randn(2, 9, 16)
    assert relative_error(mixer.proj(attend(mixer.qkv(x), 4)), mixer(x)) < 1e-6


def test_the_floor_has_only_the_projections():
    mixer, x = ATConv(16), torch.randn(2, 9, 16)
    assert torch.equal(FloorMixer(mixer)(x, (3, 3)), mixer.proj(mixer.x_proj(x)))
    assert sum(p.numel() for p in FloorMixer(mixer).parameters()) == 2 * 17 * 16
