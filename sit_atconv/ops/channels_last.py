"""Dynamic depthwise convolution by grouped `conv2d` in the layout of its input, for CPUs and MPS."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

# On a CPU, samples of at least this size are convolved one by one without a copy of x, smaller ones in one call:
# many small calls would be slower (docs/speed.md, "What makes it fast", times both). A compiled graph has one call,
# which compiles faster and serves any batch size.
LARGE_SAMPLE = 2**20  # bytes


def dynamic_depthwise_conv2d_channels_last(x: Tensor, kernels: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Convolves tokens (B, N, C), which are channels-last images in memory, without transposing.

    The published code transposes to NCHW and back. Tokens that are a view of NCHW images stay one, without a copy.
    """
    if x.shape[1] == 1:  # a single token meets only the middle of its kernel
        middle = kernels.shape[-1] // 2
        return x * kernels[:, None, :, middle, middle].to(x.dtype)
    if x.shape[2] > 1 and x.transpose(1, 2).is_contiguous():
        with _no_autocast(x.device.type):
            return _convolve_planes(x, kernels.to(x.dtype), grid_size)
    large = x.shape[1] * x.shape[2] * x.element_size() >= LARGE_SAMPLE
    one_by_one = large and x.device.type == "cpu" and not torch.compiler.is_compiling()
    with _no_autocast(x.device.type):
        kernels = kernels.to(x.dtype)
        if not one_by_one or x.shape[0] == 1:
            return _fold(x, kernels, grid_size)
        samples = zip(x.split(1), kernels.split(1), strict=True)
        return torch.cat([_fold(sample, kernel, grid_size) for sample, kernel in samples])


def _no_autocast(device: str) -> AbstractContextManager:
    """Keeps autocast, which the device "meta" does not have, from changing the dtype of x."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _convolve_planes(x: Tensor, kernels: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Convolves tokens whose channels are whole planes in memory, as in NCHW images."""
    (B, N, C), (H, W), k = x.shape, grid_size, kernels.shape[-1]
    image = x.transpose(1, 2).reshape(1, B * C, H, W)
    y = F.conv2d(image, kernels.reshape(B * C, 1, k, k), padding=k // 2, groups=B * C)
    return y.reshape(B, C, N).transpose(1, 2)


def _fold(x: Tensor, kernels: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Convolves B samples as one image of B*C channels, which copies whole rows, or nothing if B is 1."""
    (B, N, C), (H, W), k = x.shape, grid_size, kernels.shape[-1]
    image = x.transpose(0, 1).reshape(1, H, W, B * C).permute(0, 3, 1, 2)
    y = F.conv2d(image, kernels.reshape(B * C, 1, k, k), padding=k // 2, groups=B * C)
    return y.permute(0, 2, 3, 1).reshape(N, B, C).transpose(0, 1)
