"""The dynamic depthwise convolution as one grouped `conv2d` in channels-last layout."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dynamic_depthwise_conv2d_channels_last(x: Tensor, kernels: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Folds the batch into the channels: B samples of C channels are one image of B*C channels with a kernel each.

    Tokens (B, N, C) lie in memory as a channels-last image already, so one sample needs no copy at all and a batch
    needs one that moves whole rows of C. The NCHW form transposes single numbers instead, there and back.
    """
    (B, N, C), (H, W), k = x.shape, grid_size, kernels.shape[-1]
    # Autocast would run the convolution in its own dtype; the contract is the dtype of x.
    with torch.autocast(x.device.type, enabled=False):
        image = x.transpose(0, 1).reshape(1, H, W, B * C).permute(0, 3, 1, 2)
        weight = kernels.to(x.dtype).reshape(B * C, 1, k, k)
        y = F.conv2d(image, weight, padding=k // 2, groups=B * C)
        return y.permute(0, 2, 3, 1).reshape(N, B, C).transpose(0, 1)
