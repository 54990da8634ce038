"""The dynamic depthwise convolution as grouped `conv2d` in channels-last layout: the way on CPUs and MPS."""

import torch
import torch.nn.functional as F
from torch import Tensor

# On a CPU samples of at least this size are convolved one by one, without a copy of x; smaller ones all in one call.
# docs/speed.md, "What makes it fast", times both: large samples are as fast and need no copy, many small ones would
# lose. A graph is compiled faster, and for any batch, from one call.
LARGE_SAMPLE = 2**20  # bytes


def dynamic_depthwise_conv2d_channels_last(x: Tensor, kernels: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Tokens (B, N, C) lie in memory as channels-last images already: no pixel and channel change places.

    The NCHW form of the published code transposes single numbers instead, there and back.
    """
    large = x.shape[1] * x.shape[2] * x.element_size() >= LARGE_SAMPLE
    one_by_one = large and x.device.type == "cpu" and not torch.compiler.is_compiling()
    # Autocast would run the convolution in its own dtype; the contract is the dtype of x.
    with torch.autocast(x.device.type, enabled=False):
        kernels = kernels.to(x.dtype)
        if not one_by_one or x.shape[0] == 1:
            return _fold(x, kernels, grid_size)
        samples = zip(x.split(1), kernels.split(1), strict=True)
        return torch.cat([_fold(sample, kernel, grid_size) for sample, kernel in samples])


def _fold(x: Tensor, kernels: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """B samples of C channels as one image of B*C channels with a kernel each: a copy of whole rows, none if B is 1."""
    (B, N, C), (H, W), k = x.shape, grid_size, kernels.shape[-1]
    image = x.transpose(0, 1).reshape(1, H, W, B * C).permute(0, 3, 1, 2)
    y = F.conv2d(image, kernels.reshape(B * C, 1, k, k), padding=k // 2, groups=B * C)
    return y.permute(0, 2, 3, 1).reshape(N, B, C).transpose(0, 1)
