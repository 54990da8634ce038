from importlib.util import find_spec

import pytest
import torch
from torch.autograd import forward_ad

from sit_atconv.ops import IMPLEMENTATIONS, channels_last, dynamic_depthwise_conv2d, fastest_implementation
from tests.conftest import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton is interpreted
NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(name == "triton" and find_spec("triton") is None, reason="no Triton"))
    for name in IMPLEMENTATIONS
]
FAST = NAMES[1:]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """What `torch.empty` returns is filled with NaN, so that whatever an implementation forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[*FAST, "channels_last, sample by sample"])
def fast(request, monkeypatch):
    """Each fast implementation, channels_last also as it treats large samples."""
    if "," in request.param:
        monkeypatch.setattr(channels_last, "LARGE_SAMPLE", 0)
    return request.param.partition(",")[0]


def inputs(grid, C=5, k=3, B=2, dtype=torch.float64, kernel_dtype=None):
    generator = torch.Generator().manual_seed(0)
    H, W = grid
    x = torch.randn(B, H * W, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    kernels = torch.randn(B, C, k, k, generator=generator, dtype=torch.float64)
    kernels = kernels.to(kernel_dtype or dtype).requires_grad_()
    cotangent = torch.randn(B, H * W, C, generator=generator, dtype=torch.float64)
    return [tensor.detach().to(DEVICE).requires_grad_(tensor.requires_grad) for tensor in (x, kernels, cotangent)]


@pytest.mark.parametrize(("memory_format", "dim"), [(torch.contiguous_format, 3), (torch.channels_last, 1)])
def test_images_of_either_format_stay_contiguous_in_one_dimension(fast, memory_format, dim):
    x, kernels, cotangent = inputs((5, 6))
    expected = dynamic_depthwise_conv2d(x, kernels, (5, 6), impl="reference")
    gradients = torch.autograd.grad(expected, (x, kernels), cotangent)
    images, up = (
        tokens.detach().transpose(1, 2).reshape(2, 5, 5, 6).contiguous(memory_format=memory_format)
        for tokens in (x, cotangent)
    )
    y = dynamic_depthwise_conv2d(images.requires_grad_(), kernels, impl=fast)
    assert y.stride(dim) == 1
    assert relative_error(y.flatten(2).transpose(1, 2), expected) < 1e-14
    found, of_kernels = torch.autograd.grad(y, (images, kernels), up)
    assert relative_error(found.flatten(2).transpose(1, 2), gradients[0]) < 1e-14
    assert relative_error(of_kernels, gradients[1]) < 1e-14


@pytest.mark.parametrize(("memory_format", "B"), [(torch.contiguous_format, 3), (torch.channels_last, 1)])
def test_images_are_not_copied(memory_format, B):
    images, kernels = torch.randn(B, 4, 6, 5).contiguous(memory_format=memory_format), torch.randn(B, 4, 3, 3)
    with torch.profiler.profile() as profile:
        dynamic_depthwise_conv2d(images, kernels, impl="channels_last")
    called = {event.key for event in profile.key_averages()}
    assert "aten::conv2d" in called and not called & {"aten::copy_", "aten::clone", "aten::contiguous"}


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


@pytest.mark.parametrize("k", [3, 5, 7])
@pytest.mark.parametrize(("grid", "B", "C"), [((1, 1), 3, 5), ((2, 9), 1, 17), ((7, 5), 2, 3), ((8, 8), 1, 1)])
def test_values_and_gradients_are_the_references(fast, k, grid, B, C):
    x, kernels, cotangent = inputs(grid, C=C, k=k, B=B)
    expected = dynamic_depthwise_conv2d(x, kernels, grid, impl="reference")
    y = dynamic_depthwise_conv2d(x, kernels, grid, impl=fast)
    assert y.shape == x.shape and relative_error(y, expected) < 1e-13
    for gradient, reference in zip(
        torch.autograd.grad(y, (x, kernels), cotangent),
        torch.autograd.grad(expected, (x, kernels), cotangent),
        strict=True,
    ):
        assert relative_error(gradient, reference) < 1e-13


@pytest.mark.parametrize("grid", [(1, 1), (3, 5)])
@pytest.mark.parametrize("impl", NAMES)
def test_gradcheck(impl, grid):
    x, kernels, _ = inputs(grid, C=2)
    op = lambda x, kernels: dynamic_depthwise_conv2d(x, kernels, grid, impl=impl)  # noqa: E731
    assert torch.autograd.gradcheck(op, (x, kernels), fast_mode=impl == "triton")  # whose interpreter is slow


BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("impl", NAMES)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kernel_dtype", BOUNDS)
def test_result_has_the_dtype_of_x_and_each_gradient_its_inputs(impl, dtype, kernel_dtype):
    x, kernels, cotangent = inputs((3, 5), C=3, dtype=dtype, kernel_dtype=kernel_dtype)
    exact = dynamic_depthwise_conv2d(x.double(), kernels.double(), (3, 5), impl="reference")
    y = dynamic_depthwise_conv2d(x, kernels, (3, 5), impl=impl)
    gradients = torch.autograd.grad(y, (x, kernels), cotangent.to(dtype))
    references = torch.autograd.grad(exact, (x, kernels), cotangent)
    bound = max(BOUNDS[dtype], BOUNDS[kernel_dtype])
    assert y.dtype == dtype and relative_error(y, exact) < bound
    assert [g.dtype for g in gradients] == [dtype, kernel_dtype]
    assert all(relative_error(g, r) < bound for g, r in zip(gradients, references, strict=True))


@pytest.mark.parametrize("impl", NAMES)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_dtype_of_x_alone(impl, autocast):
    x, kernels, _ = inputs((4, 4), dtype=torch.float32)
    expected = dynamic_depthwise_conv2d(x, kernels, (4, 4), impl=impl)
    with torch.autocast(DEVICE, autocast):
        y = dynamic_depthwise_conv2d(x, kernels, (4, 4), impl=impl)
    assert y.dtype == torch.float32 and torch.equal(y, expected)


@pytest.mark.parametrize(
    ("device", "fastest"), [("cpu", "channels_last"), ("mps", "channels_last"), ("cuda", "triton")]
)
def test_auto_is_a_fast_path(device, fastest):
    assert fastest_implementation(torch.device(device)) == fastest


def test_auto_is_what_it_says():
    x, kernels, _ = inputs((4, 4), dtype=torch.float32)
    fast = dynamic_depthwise_conv2d(x, kernels, (4, 4), impl=fastest_implementation(x.device))
    assert torch.equal(dynamic_depthwise_conv2d(x, kernels, (4, 4)), fast)


@pytest.mark.parametrize("impl", FAST)
def test_compiles_into_one_graph_with_its_gradients(impl):
    x, kernels, cotangent = inputs((3, 5), dtype=torch.float32)
    compiled = torch.compile(dynamic_depthwise_conv2d, fullgraph=True, backend="aot_eager")
    y, expected = (f(x, kernels, (3, 5), impl=impl) for f in (compiled, dynamic_depthwise_conv2d))
    assert relative_error(y, expected) < 1e-6
    cotangent = cotangent.float()
    for a, b in zip(
        torch.autograd.grad(y, (x, kernels), cotangent),
        torch.autograd.grad(expected, (x, kernels), cotangent),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("impl", FAST)
def test_activation_checkpointing_changes_nothing(impl):
    x, kernels, cotangent = inputs((3, 5))

    def loss(x, kernels):
        return (dynamic_depthwise_conv2d(x.sin(), kernels, (3, 5), impl=impl) * cotangent).sum()

    again = torch.utils.checkpoint.checkpoint(loss, x, kernels, use_reentrant=False)
    for a, b in zip(
        torch.autograd.grad(again, (x, kernels)), torch.autograd.grad(loss(x, kernels), (x, kernels)), strict=True
    ):
        assert torch.equal(a, b)


def test_inputs_that_lie_otherwise_in_memory(fast):
    x, kernels, cotangent = inputs((3, 4), B=3)
    other = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    expected = dynamic_depthwise_conv2d(x, kernels, (3, 4), impl="reference")
    y = dynamic_depthwise_conv2d(other, kernels.mT.contiguous().mT, (3, 4), impl=fast)
    assert relative_error(y, expected) < 1e-13
    spread = cotangent[:1].expand_as(y)
    assert relative_error(torch.autograd.grad(y, other, spread)[0], torch.autograd.grad(expected, x, spread)[0]) < 1e-13


def test_triton_on_a_cpu_without_the_interpreter_names_the_remedy(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, kernels = torch.zeros(1, 4, 2), torch.zeros(1, 2, 3, 3)
    with pytest.raises(ValueError, match="runs on CUDA and ROCm, not on cpu: give 'auto'"):
        dynamic_depthwise_conv2d(x, kernels, (2, 2), impl="triton")


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


# --------------------------------------------------------------------------------------------------- forward mode


def tangents(x, kernels):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(DEVICE) for tensor in (x, kernels)]


@pytest.mark.parametrize("impl", NAMES)
def test_tangents_are_those_of_a_bilinear_function(impl):
    x, kernels = (tensor.detach() for tensor in inputs((3, 4))[:2])
    dx, dkernels = tangents(x, kernels)
    of_x, of_kernels = (
        dynamic_depthwise_conv2d(*pair, (3, 4), impl="reference") for pair in ((dx, kernels), (x, dkernels))
    )

    def run(x, kernels):
        return dynamic_depthwise_conv2d(x, kernels, (3, 4), impl=impl)

    for of_both in (torch.func.jvp, torch.no_grad()(torch.func.jvp)):
        assert relative_error(of_both(run, (x, kernels), (dx, dkernels))[1], of_x + of_kernels) < 1e-14
    assert relative_error(torch.func.jvp(lambda x: run(x, kernels), (x,), (dx,))[1], of_x) < 1e-14
    assert relative_error(torch.func.jvp(lambda k: run(x, k), (kernels,), (dkernels,))[1], of_kernels) < 1e-14


def test_gradients_and_tangents_agree_with_differences(fast):
    x, kernels, _ = inputs((2, 3), C=2, B=1)
    assert torch.autograd.gradcheck(
        lambda *tensors: dynamic_depthwise_conv2d(*tensors, (2, 3), impl=fast),
        (x, kernels),
        check_forward_ad=True,
        fast_mode=True,
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("impl", NAMES)
def test_compiled_tangents(impl, backend):
    """A rule of an autograd.Function would be dropped here without a word."""
    x, kernels = (tensor.detach() for tensor in inputs((3, 4))[:2])
    dx, dkernels = tangents(x, kernels)

    def tangent(*tensors):
        run = lambda *pair: dynamic_depthwise_conv2d(*pair, (3, 4), impl=impl)  # noqa: E731
        return torch.func.jvp(run, tensors[:2], tensors[2:])[1]

    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(tangent, fullgraph=True, backend=backend)(x, kernels, dx, dkernels)
    assert relative_error(found, tangent(x, kernels, dx, dkernels)) < 1e-12


def test_a_missing_tangent_is_an_error(monkeypatch):
    @torch.library.custom_op("sit_atconv_test::without_rule", mutates_args=())
    def without_rule(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    monkeypatch.setitem(IMPLEMENTATIONS, "mine", lambda x, kernels, grid_size: without_rule(x))
    x, kernels = (tensor.detach() for tensor in inputs((3, 4))[:2])
    with forward_ad.dual_level():
        for pair in ((forward_ad.make_dual(x, x), kernels), (x, forward_ad.make_dual(kernels, kernels))):
            with pytest.raises(NotImplementedError, match="'mine' has no forward-mode derivative: give impl 'channels"):
                dynamic_depthwise_conv2d(*pair, (3, 4), impl="mine")
