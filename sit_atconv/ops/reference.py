"""Definition of the dynamic depthwise convolution: slow and obvious."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dynamic_depthwise_conv2d_reference(x: Tensor, kernels: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Adds one shifted product for each tap, in float32, or in float64 if an input is float64."""
    (B, N, C), (H, W), k = x.shape, grid_size, kernels.shape[-1]
    dtype = torch.promote_types(torch.promote_types(x.dtype, kernels.dtype), torch.float32)
    image = x.to(dtype).transpose(1, 2).reshape(B, C, H, W)
    padded = F.pad(image, [k // 2] * 4)
    kernels = kernels.to(dtype)

    y = torch.zeros_like(image)
    for i in range(k):
        for j in range(k):
            y = y + kernels[:, :, i, j, None, None] * padded[:, :, i : i + H, j : j + W]
    return y.reshape(B, C, N).transpose(1, 2).to(x.dtype)
