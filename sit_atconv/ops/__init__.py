"""The operator behind ATConv: a depthwise convolution whose kernels differ from sample to sample.

`reference.py` is the definition; every other file here is a faster way to the same numbers, gradients included.
Needs torch alone.
"""

from torch import Tensor

from sit_atconv.ops.channels_last import dynamic_depthwise_conv2d_channels_last
from sit_atconv.ops.reference import dynamic_depthwise_conv2d_reference

IMPLEMENTATIONS = {
    "reference": dynamic_depthwise_conv2d_reference,
    "channels_last": dynamic_depthwise_conv2d_channels_last,
}


def dynamic_depthwise_conv2d(x: Tensor, kernels: Tensor, grid_size: tuple[int, int], impl: str = "auto") -> Tensor:
    """Cross-correlates every sample and channel of a token grid with its own kernel, zero-padded (ATConv, step 5).

        y[b, h, w, c] = sum_ij kernels[b, c, i, j] * x[b, h + i - k // 2, w + j - k // 2, c]

    Args:
        x: tokens (B, N, C), row-major on the grid, N = H * W.
        kernels: one kernel for each sample and channel (B, C, k, k), k odd; may differ from `x` in dtype.
        grid_size: (H, W).
        impl: "auto" (the fastest here), or one of IMPLEMENTATIONS by name.

    Returns:
        (B, N, C) in the dtype of `x`. Gradients come in the dtype of their inputs.

    Raises:
        ValueError: shapes that do not fit each other, an even or non-square kernel, or an unknown `impl`.
    """
    height, width = grid_size
    if x.ndim != 3 or x.shape[1] != height * width:
        raise ValueError(f"x must be (B, H*W, C) on a {height}x{width} grid, not {tuple(x.shape)}")
    if kernels.ndim != 4 or kernels.shape[:2] != (x.shape[0], x.shape[2]):
        B, _, C = x.shape
        raise ValueError(f"kernels must be (B, C, k, k) = ({B}, {C}, k, k), not {tuple(kernels.shape)}")
    if kernels.shape[2] != kernels.shape[3] or kernels.shape[2] % 2 == 0:
        raise ValueError(f"kernels must be square with an odd side, not {kernels.shape[2]}x{kernels.shape[3]}")
    if impl == "auto":
        impl = "channels_last"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {['auto', *IMPLEMENTATIONS]}, not {impl!r}")
    return IMPLEMENTATIONS[impl](x, kernels, (height, width))
