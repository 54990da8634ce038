import pytest
import torch

from sit_atconv.ops import IMPLEMENTATIONS, dynamic_depthwise_conv2d
from tests.conftest import relative_error

FAST = sorted(set(IMPLEMENTATIONS) - {"reference"})


def inputs(grid, C=5, k=3, B=2, dtype=torch.float64, kernel_dtype=None):
    generator = torch.Generator().manual_seed(0)
    H, W = grid
    x = torch.randn(B, H * W, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    kernels = torch.randn(B, C, k, k, generator=generator, dtype=torch.float64)
    kernels = kernels.to(kernel_dtype or dtype).requires_grad_()
    cotangent = torch.randn(B, H * W, C, generator=generator, dtype=torch.float64)
    return x, kernels, cotangent


def test_reference_is_the_definition():
    x, kernels, _ = inputs((3, 4))
    image = x.reshape(2, 3, 4, 5)
    expected = torch.zeros_like(image)
    for h in range(3):
        for w in range(4):
            for i in range(3):
                for j in range(3):
                    if 0 <= h + i - 1 < 3 and 0 <= w + j - 1 < 4:
                        expected[:, h, w] += kernels[:, :, i, j] * image[:, h + i - 1, w + j - 1]
    y = dynamic_depthwise_conv2d(x, kernels, (3, 4), impl="reference")
    assert relative_error(y, expected.reshape(2, 12, 5)) < 1e-14


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("k", [3, 5, 7])
@pytest.mark.parametrize("grid", [(1, 1), (2, 9), (7, 5), (8, 8)])
@pytest.mark.parametrize("B", [1, 3])
def test_values_and_gradients_are_the_references(impl, k, grid, B):
    x, kernels, cotangent = inputs(grid, k=k, B=B)
    expected = dynamic_depthwise_conv2d(x, kernels, grid, impl="reference")
    y = dynamic_depthwise_conv2d(x, kernels, grid, impl=impl)
    assert y.shape == x.shape and relative_error(y, expected) < 1e-13
    for gradient, reference in zip(
        torch.autograd.grad(y, (x, kernels), cotangent), torch.autograd.grad(expected, (x, kernels), cotangent),
        strict=True,
    ):
        assert relative_error(gradient, reference) < 1e-13


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradcheck(impl):
    x, kernels, _ = inputs((3, 4), C=2)
    assert torch.autograd.gradcheck(lambda x, k: dynamic_depthwise_conv2d(x, k, (3, 4), impl=impl), (x, kernels))


BOUNDS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kernel_dtype", BOUNDS)
def test_result_has_the_dtype_of_x_and_each_gradient_its_inputs(impl, dtype, kernel_dtype):
    x, kernels, cotangent = inputs((6, 5), dtype=dtype, kernel_dtype=kernel_dtype)
    exact = dynamic_depthwise_conv2d(x.double(), kernels.double(), (6, 5), impl="reference")
    y = dynamic_depthwise_conv2d(x, kernels, (6, 5), impl=impl)
    gradients = torch.autograd.grad(y, (x, kernels), cotangent.to(dtype))
    references = torch.autograd.grad(exact, (x, kernels), cotangent)
    bound = max(BOUNDS[dtype], BOUNDS[kernel_dtype])
    assert y.dtype == dtype and relative_error(y, exact) < bound
    assert [g.dtype for g in gradients] == [dtype, kernel_dtype]
    assert all(relative_error(g, r) < bound for g, r in zip(gradients, references, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_dtype_of_x_alone(impl, autocast):
    x, kernels, _ = inputs((4, 4), dtype=torch.float32)
    expected = dynamic_depthwise_conv2d(x, kernels, (4, 4), impl=impl)
    with torch.autocast("cpu", autocast):
        y = dynamic_depthwise_conv2d(x, kernels, (4, 4), impl=impl)
    assert y.dtype == torch.float32 and torch.equal(y, expected)


def test_auto_is_a_fast_path():
    x, kernels, _ = inputs((4, 4), dtype=torch.float32)
    fast = dynamic_depthwise_conv2d(x, kernels, (4, 4), impl="channels_last")
    assert torch.equal(dynamic_depthwise_conv2d(x, kernels, (4, 4)), fast)


@pytest.mark.parametrize(
    ("x", "kernels", "grid", "impl", "message"),
    [
        ((2, 15, 4), (2, 4, 3, 3), (4, 4), "auto", r"4x4 grid, not \(2, 15, 4\)"),
        ((2, 16, 4), (2, 5, 3, 3), (4, 4), "auto", r"\(2, 4, k, k\), not \(2, 5, 3, 3\)"),
        ((2, 16, 4), (1, 4, 3, 3), (4, 4), "auto", r"not \(1, 4, 3, 3\)"),
        ((2, 16, 4), (2, 4, 4, 4), (4, 4), "auto", "odd side, not 4x4"),
        ((2, 16, 4), (2, 4, 3, 5), (4, 4), "auto", "not 3x5"),
        ((2, 16, 4), (2, 4, 3, 3), (4, 4), "cuda", "not 'cuda'"),
    ],
)
def test_what_does_not_fit_is_named(x, kernels, grid, impl, message):
    with pytest.raises(ValueError, match=message):
        dynamic_depthwise_conv2d(torch.zeros(x), torch.zeros(kernels), grid, impl=impl)
