"""Operator of ATConv: a depthwise convolution with a different kernel for each sample.

`reference.py` is the definition; the other files are faster implementations of it, with gradients and forward-mode
derivatives. Needs only torch; Triton is imported at the first call with a CUDA or ROCm tensor.
"""

import os
import warnings

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sit_atconv.ops.channels_last import dynamic_depthwise_conv2d_channels_last
from sit_atconv.ops.reference import dynamic_depthwise_conv2d_reference


def _dynamic_depthwise_conv2d_triton(x: Tensor, kernels: Tensor, grid_size: tuple[int, int]) -> Tensor:
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl 'triton' runs on CUDA and ROCm, not on {x.device.type}: give 'auto', or set "
            "TRITON_INTERPRET=1 to run it slowly on a CPU"
        )
    from sit_atconv.ops.token_layout import dynamic_depthwise_conv2d_triton

    return dynamic_depthwise_conv2d_triton(x, kernels, grid_size)


IMPLEMENTATIONS = {
    "reference": dynamic_depthwise_conv2d_reference,
    "channels_last": dynamic_depthwise_conv2d_channels_last,
    "triton": _dynamic_depthwise_conv2d_triton,
}


def dynamic_depthwise_conv2d(
    x: Tensor, kernels: Tensor, grid_size: tuple[int, int] | None = None, impl: str = "auto"
) -> Tensor:
    """Cross-correlates each sample and channel of a token grid with its own kernel (arXiv 2510.20092).

    The grid is padded with zeros:

        y[b, h, w, c] = sum_ij kernels[b, c, i, j] * x[b, h + i - k // 2, w + j - k // 2, c]

    Args:
        x: tokens (B, N, C), row-major on the grid, N = H * W; or images (B, C, H, W), in either memory format.
        kernels: kernels (B, C, k, k) with odd k, in any floating dtype.
        grid_size: (H, W) of tokens; None for images.
        impl: a name in IMPLEMENTATIONS, or "auto" for `fastest_implementation` on the device of `x`.

    Returns:
        The shape and dtype of `x`, contiguous along the same dimension. Gradients have the dtypes of their inputs.

    Raises:
        ValueError: shapes do not match, the kernel is even or not square, or `impl` is unknown or not available on
            this device.
        NotImplementedError: a forward-mode derivative was asked for, which `impl` does not have.
    """
    if x.ndim == 4 and grid_size is None:
        tokens = dynamic_depthwise_conv2d(x.flatten(2).transpose(1, 2), kernels, (x.shape[2], x.shape[3]), impl)
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])
    if grid_size is None:
        raise ValueError(f"tokens need grid_size=(H, W), which only images (B, C, H, W) do without: {tuple(x.shape)}")
    height, width = grid_size
    if x.ndim != 3 or x.shape[1] != height * width:
        raise ValueError(f"x must be (B, H*W, C) on a {height}x{width} grid, not {tuple(x.shape)}")
    if kernels.ndim != 4 or kernels.shape[:2] != (x.shape[0], x.shape[2]):
        B, _, C = x.shape
        raise ValueError(f"kernels must be (B, C, k, k) = ({B}, {C}, k, k), not {tuple(kernels.shape)}")
    if kernels.shape[2] != kernels.shape[3] or kernels.shape[2] % 2 == 0:
        raise ValueError(f"kernels must be square with an odd side, not {kernels.shape[2]}x{kernels.shape[3]}")
    if impl == "auto":
        impl = fastest_implementation(x.device)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {['auto', *IMPLEMENTATIONS]}, not {impl!r}")
    y = IMPLEMENTATIONS[impl](x, kernels, (height, width))
    if (_has_tangent(x) or _has_tangent(kernels)) and not _has_tangent(y):  # it would count as zero
        raise NotImplementedError(f"impl {impl!r} has no forward-mode derivative: give impl 'channels_last'")
    return y


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def fastest_implementation(device: torch.device) -> str:
    """Returns the choice of "auto": "triton" on CUDA and ROCm with Triton >= 3.3, else "channels_last"."""
    return "triton" if device.type == "cuda" and _has_triton() else "channels_last"


def _has_triton() -> bool:
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "0.0"
    if tuple(map(int, version.split(".")[:2])) >= (3, 3):
        return True
    warnings.warn(
        f"ATConv's convolution runs in PyTorch; it would be faster with Triton 3.3 or later (installed: {version})",
        stacklevel=3,
    )
    return False
