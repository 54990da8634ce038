"""Triton's kernels: as custom operators, as machine code for GPUs that are not here, and on a GPU that is."""

import os
import subprocess

import pytest
import torch

from tests.conftest import python, relative_error

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton is interpreted

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA or ROCm device here"),
]


def test_operators_are_registered_as_torch_expects():
    from sit_atconv.ops.token_layout import convolve, correlate

    x = torch.randn(2, 6, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    kernels = torch.randn(2, 3, 3, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    torch.library.opcheck(convolve, (x, kernels, 2, 3, False))
    torch.library.opcheck(correlate, (x.detach(), x.detach(), 2, 3, 3, torch.float32))


def test_the_flipped_operator_has_gradients_too():
    from sit_atconv.ops.token_layout import convolve

    x = torch.randn(1, 6, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    kernels = torch.randn(1, 2, 3, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, kernels: convolve(x, kernels, 2, 3, True), (x, kernels), fast_mode=True)
    assert torch.equal(convolve(x, kernels, 2, 3, True), convolve(x, kernels.flip(2, 3), 2, 3, False))


COMPILE = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sit_atconv.ops import token_layout

def compile_kernel(kernel, pointers, **constants):
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    triton.compile(ASTSource(kernel, signature, values), target=TARGET, options=dict(num_warps=4))

TARGET, k, (dtype, taps_dtype) = GPUTarget(*eval(sys.argv[1])), int(sys.argv[2]), sys.argv[3].split("+")
ACC = tl.float64 if "fp64" in (dtype, taps_dtype) else tl.float32
columns, channels = token_layout._tile(1152, 64, k)
tile = dict(k=k, ACC=ACC, COLUMNS=columns, CHANNELS=channels)
x = "*" + dtype
compile_kernel(token_layout._convolve, dict(x=x, taps="*" + taps_dtype, y=x), FLIP=True, ROWS=token_layout.ROWS, **tile)
compile_kernel(token_layout._correlate, dict(gradient=x, x=x, sums="*" + taps_dtype), SPLIT=token_layout.SPLIT, **tile)
print("compiled")
"""
TARGETS = {"H100": ("cuda", 90, 32), "A100": ("cuda", 80, 32), "MI300": ("hip", "gfx942", 64)}
CASES = [("H100", 3, "bf16+fp32"), ("MI300", 3, "bf16+bf16")]
MORE = [
    ("A100", 3, "fp16+fp16"),
    ("A100", 5, "fp32+fp32"),
    ("H100", 3, "fp64+fp32"),
    ("H100", 3, "bf16+fp64"),
    ("H100", 7, "bf16+bf16"),
    ("MI300", 5, "fp16+fp32"),
    ("MI300", 7, "fp64+fp64"),
]


@pytest.mark.parametrize(
    ("gpu", "k", "dtype"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_kernels_compile_for_gpus_that_are_not_here(gpu, k, dtype, tmp_path):
    """The interpreter accepts more than the compiler does."""
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        python(script, TARGETS[gpu], k, dtype),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.stdout.strip() == "compiled", done.stderr


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("k", [3, 5, 7])
    @pytest.mark.parametrize(
        ("grid", "B", "C"), [((1, 1), 1, 1), ((9, 7), 3, 40), ((17, 33), 2, 1152), ((64, 64), 1, 384)]
    )
    @pytest.mark.parametrize(
        ("dtype", "bound"),
        [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)],
    )
    def test_values_and_gradients(self, k, grid, B, C, dtype, bound):
        from sit_atconv.ops import dynamic_depthwise_conv2d

        x = torch.randn(B, grid[0] * grid[1], C, device="cuda", dtype=torch.float64).to(dtype).requires_grad_()
        kernels = torch.randn(B, C, k, k, device="cuda", dtype=torch.float64).to(dtype).requires_grad_()
        expected = dynamic_depthwise_conv2d(x.double(), kernels.double(), grid, impl="reference")
        y = dynamic_depthwise_conv2d(x, kernels, grid, impl="triton")
        assert relative_error(y, expected) < bound
        cotangent = torch.randn_like(expected)
        found = torch.autograd.grad(y, (x, kernels), cotangent.to(dtype))
        for a, b in zip(found, torch.autograd.grad(expected, (x, kernels), cotangent), strict=True):
            assert relative_error(a, b) < bound

    def test_cuda_graph_replays_with_new_values(self):
        from sit_atconv.ops import dynamic_depthwise_conv2d

        x, kernels = torch.randn(2, 64, 48, device="cuda"), torch.randn(2, 48, 3, 3, device="cuda")
        dynamic_depthwise_conv2d(x, kernels, (8, 8))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = dynamic_depthwise_conv2d(x, kernels, (8, 8))
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert relative_error(y, dynamic_depthwise_conv2d(x, kernels, (8, 8), impl="reference")) < 1e-6

    @pytest.mark.parametrize("autocast", [None, torch.bfloat16])
    def test_model_compiles_into_one_graph(self, autocast):
        from sit_atconv.models import SiT

        model = SiT.from_preset("SiT-ATConv-Tiny/2", num_classes=10).cuda()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        x, t = torch.randn(2, 4, 18, 10, device="cuda"), torch.rand(2, device="cuda")
        y = torch.tensor([1, 10], device="cuda")
        with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
            expected = model(x, t, y)
            found = torch.compile(model, fullgraph=True)(x, t, y)
        assert relative_error(found, expected) < (1e-4 if autocast is None else 3e-2)
        found.square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
