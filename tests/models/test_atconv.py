import pytest
import torch
import torch.nn.functional as F

from sit_atconv.models import ATConv
from sit_atconv.models.atconv import pool_tokens
from tests.conftest import relative_error


@pytest.mark.parametrize(
    ("name", "dim", "k", "side"), [("atconv_dim16_k5_grid8", 16, 5, 8), ("atconv_dim24_k3_grid6", 24, 3, 6)]
)
def test_golden_values_kernels_and_gradients(golden, name, dim, k, side):
    tensors, weights = golden(name)
    mixer = ATConv(dim, k)
    mixer.load_state_dict(weights)
    x = tensors["input"].requires_grad_()
    output = mixer(x)
    (output * tensors["cotangent"]).sum().backward()
    assert relative_error(output, tensors["output"]) < 1e-5
    assert relative_error(mixer.generate_kernels(x, (side, side)), tensors["kernels"]) < 1e-5
    gradients = {name: p.grad for name, p in mixer.named_parameters()} | {"input": x.grad}
    for name, gradient in gradients.items():
        assert relative_error(gradient, tensors[f"grad.{name}"]) < 1e-5, name


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (2, 2), (16, 9)])
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("pool", ["raster", "grid"])
def test_pooling_before_projecting_is_projecting_before_pooling(grid, k, pool):
    torch.manual_seed(0)
    x = torch.randn(2, grid[0] * grid[1], 8, dtype=torch.float64)
    weight, bias = torch.randn(8, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    pool_first = F.linear(pool_tokens(x, grid, k, pool), weight, bias)
    project_first = pool_tokens(F.linear(x, weight, bias), grid, k, pool)
    assert relative_error(pool_first, project_first) < 1e-14


def test_raster_bins_are_runs_of_tokens_and_grid_bins_tiles():
    x = torch.arange(20.0).reshape(1, 20, 1)
    bins = [(i * 20 // 9, -(-(i + 1) * 20 // 9)) for i in range(9)]
    expected = torch.tensor([x[0, a:b].mean() for a, b in bins])
    assert torch.allclose(pool_tokens(x, (4, 5), 3, "raster").flatten(), expected)
    image = torch.arange(36.0).reshape(6, 6)
    tiles = image.reshape(3, 2, 3, 2).mean((1, 3)).flatten()
    assert torch.allclose(pool_tokens(image.reshape(1, 36, 1), (6, 6), 3, "grid").flatten(), tiles)


def test_full_inhibition_takes_the_mean_of_the_taps_away():
    mixer = ATConv(4)
    kernels = mixer.generate_kernels(x := torch.randn(2, 16, 4), (4, 4))
    torch.nn.init.constant_(mixer.difference_control, 30.0)
    inhibited = mixer.generate_kernels(x, (4, 4))
    assert inhibited.mean((-1, -2)).abs().max() < 1e-6
    assert torch.allclose(kernels - inhibited, kernels.mean((-1, -2), keepdim=True).expand_as(kernels), atol=1e-6)


@pytest.mark.parametrize("grid", [(1, 2), (3, 3), (5, 7), (16, 9)])
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("pool", ["raster", "grid"])
def test_pooling_is_torchs_adaptive_one(grid, k, pool):
    (H, W), x = grid, torch.randn(2, grid[0] * grid[1], 4, dtype=torch.float64, requires_grad=True)
    size, bins = ((H, W), (k, k)) if pool == "grid" else ((H * W, 1), (k * k, 1))
    expected = F.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, size), bins).flatten(2).transpose(1, 2)
    pooled, cotangent = pool_tokens(x, grid, k, pool), torch.randn_like(expected)
    assert relative_error(pooled, expected) < 1e-14
    gradients = [torch.autograd.grad(y, x, cotangent)[0] for y in (pooled, expected)]
    assert relative_error(*gradients) < 1e-14


@pytest.mark.parametrize(
    ("name", "dim", "k", "grid"),
    [
        ("atconv2d_dim24_k3_7x7", 24, 3, (7, 7)),
        ("atconv2d_dim16_k3_5x9", 16, 3, (5, 9)),
        ("atconv2d_dim12_k5_3x4", 12, 5, (3, 4)),
    ],
)
def test_golden_values_kernels_and_gradients_of_attnets_form(golden, name, dim, k, grid):
    """Images (B, C, H, W) and 1x1 convolutions there, tokens and linear maps here."""

    def as_here(tensor):
        is_image = tensor.ndim == 4 and tuple(tensor.shape[2:]) == grid
        return tensor.flatten(2).transpose(1, 2) if is_image else tensor.flatten(1) if tensor.ndim == 4 else tensor

    tensors, weights = golden(name)
    mixer = ATConv(dim, k, act="gelu")
    mixer.load_state_dict({name: as_here(weight) for name, weight in weights.items()})
    x = as_here(tensors["input"]).requires_grad_()
    output = mixer(x, grid)
    (output * as_here(tensors["cotangent"])).sum().backward()
    assert relative_error(output, as_here(tensors["output"])) < 1e-5
    assert relative_error(mixer.generate_kernels(x, grid), tensors["kernels"]) < 1e-5
    gradients = {name: p.grad for name, p in mixer.named_parameters()} | {"input": x.grad}
    for name, gradient in gradients.items():
        assert relative_error(gradient, as_here(tensors[f"grad.{name}"])) < 1e-5, name


def test_static_kernels_are_a_depthwise_convolution():
    mixer = ATConv(4, kernels="static", inhibition="none")
    assert {name.split(".")[0] for name in mixer.state_dict()} == {"x_proj", "static_kernels", "proj"}
    x, kernels = torch.randn(2, 30, 4), mixer.static_kernels.reshape(4, 1, 3, 3)
    image = mixer.x_proj(x).transpose(1, 2).unflatten(2, (5, 6))
    expected = mixer.proj(F.conv2d(image, kernels, padding=1, groups=4).flatten(2).transpose(1, 2))
    assert relative_error(mixer(x, (5, 6)), expected) < 1e-6


def test_without_inhibition_kernels_are_those_of_an_alpha_of_minus_infinity():
    torch.manual_seed(0)
    mixer, without = ATConv(4), ATConv(4, inhibition="none")
    weights = {name: tensor for name, tensor in mixer.state_dict().items() if name != "difference_control"}
    without.load_state_dict(weights)
    torch.nn.init.constant_(mixer.difference_control, -30.0)
    x = torch.randn(2, 16, 4)
    assert relative_error(without(x), mixer(x)) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 7},
        {"act": "silu"},
        {"act": "gelu"},
        {"pool": "grid"},
        {"inhibition": "none"},
        {"kernels": "static"},
    ],
)
def test_variants_are_other_functions_of_the_same_shape(options):
    x = torch.randn(2, 6 * 10, 8)
    torch.manual_seed(1)
    plain = ATConv(8)
    torch.manual_seed(1)
    variant = ATConv(8, **options)
    assert variant(x, (6, 10)).shape == x.shape
    assert not torch.allclose(variant(x, (6, 10)), plain(x, (6, 10)))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast(autocast):
    torch.manual_seed(0)
    mixer, x = ATConv(16), torch.randn(2, 25, 16)
    with torch.autocast("cpu", autocast):
        y = mixer(x)
    assert y.dtype == autocast and relative_error(y, mixer(x)) < 2e-2
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in mixer.parameters())


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="odd, not 4"):
        ATConv(8, kernel_size=4)
    with pytest.raises(ValueError, match="'relu'"):
        ATConv(8, act="relu")
    with pytest.raises(ValueError, match="'max'"):
        ATConv(8, pool="max")
    with pytest.raises(ValueError, match="inhibition must be 'learned' or 'none', not 'full'"):
        ATConv(8, inhibition="full")
    with pytest.raises(ValueError, match="kernels must be 'dynamic' or 'static', not 'fixed'"):
        ATConv(8, kernels="fixed")
    with pytest.raises(ValueError, match="12 tokens"):
        ATConv(8)(torch.zeros(1, 12, 8))
