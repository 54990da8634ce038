"""Computations of the compared forms, each with the weights of one of our token mixers."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from timm.models import vision_transformer
from torch import Tensor

from sit_atconv.models.atconv import ATConv, square_grid
from sit_atconv.models.attention import Attention


class PublishedATConv(nn.Module):
    """ATConv as published, with the weights and the values of an `ATConv`.

    It projects all N tokens before it pools them (the activation follows, because it does not commute with pooling),
    and it convolves in NCHW, which takes two transpositions of the tokens.
    """

    def __init__(self, mixer: ATConv):
        super().__init__()
        if mixer.pool != "raster":
            raise ValueError(f"the published ATConv pools in raster order, not {mixer.pool!r}")
        if (mixer.kernels, mixer.inhibition) != ("dynamic", "learned"):
            raise ValueError(
                f"the published ATConv has dynamic kernels and learned inhibition, not {mixer.kernels} kernels and "
                f"inhibition {mixer.inhibition!r}"
            )
        self.kernel_size = mixer.kernel_size
        self.kernel_proj, self.kernel_act, self.kernel_gen = mixer.kernel_proj, mixer.kernel_act, mixer.kernel_gen
        self.difference_control = mixer.difference_control
        self.x_proj, self.proj = mixer.x_proj, mixer.proj

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """Maps tokens (B, N, C) to (B, N, C)."""
        kernels = self.generate_kernels(x)  # (B, C, k, k)
        y = published_conv2d(self.x_proj(x), kernels, grid_size or square_grid(x.shape[1]))  # (B, N, C)
        return self.proj(y)  # (B, N, C)

    def generate_kernels(self, x: Tensor) -> Tensor:
        """Returns one kernel per sample and channel: tokens (B, N, C) -> (B, C, k, k)."""
        k = self.kernel_size
        p = F.adaptive_avg_pool1d(self.kernel_proj(x).transpose(1, 2), k * k)  # (B, C, k*k)
        K = self.kernel_gen(self.kernel_act(p))  # (B, C, k*k)
        K = K - torch.sigmoid(self.difference_control)[:, None] * K.mean(-1, keepdim=True)  # (B, C, k*k)
        return K.unflatten(-1, (k, k))


def published_conv2d(x: Tensor, kernels: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Computes `dynamic_depthwise_conv2d` as published: one grouped NCHW convolution of B*C channels."""
    (B, N, C), (H, W), k = x.shape, grid_size, kernels.shape[-1]
    image = x.transpose(1, 2).reshape(1, B * C, H, W)
    y = F.conv2d(image, kernels.reshape(B * C, 1, k, k), padding=k // 2, groups=B * C)
    return y.reshape(B, C, N).transpose(1, 2)


class FloorMixer(nn.Module):
    """The two projections of an `ATConv`, without kernel generation and convolution."""

    def __init__(self, mixer: ATConv):
        super().__init__()
        self.x_proj, self.proj = mixer.x_proj, mixer.proj

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        return self.proj(self.x_proj(x))


class TimmAttention(vision_transformer.Attention):
    """The `Attention` of timm with our weights and our call, `(x, grid_size) -> x`."""

    def __init__(self, mixer: Attention):
        super().__init__(mixer.proj.in_features, mixer.num_heads, qkv_bias=True)
        self.qkv, self.q_norm, self.k_norm, self.proj = mixer.qkv, mixer.q_norm, mixer.k_norm, mixer.proj

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        return super().forward(x)


def attend(qkv: Tensor, num_heads: int) -> Tensor:
    """Computes what `Attention` does between its projections: (B, N, 3C) -> (B, N, C)."""
    q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=num_heads)
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


def unchanged(mixer: nn.Module) -> nn.Module:
    return mixer


def second_computation(mixer: nn.Module) -> nn.Module:
    """Returns the published ATConv or timm's attention with the mixer's weights."""
    return {ATConv: PublishedATConv, Attention: TimmAttention}[type(mixer)](mixer)


def identity_kernels(mixer: ATConv) -> ATConv:
    """Returns an ATConv with the same projections and identity kernels: it gives the floor's values."""
    twin = ATConv(mixer.proj.in_features, mixer.kernel_size).to(mixer.proj.weight)
    twin.x_proj, twin.proj = mixer.x_proj, mixer.proj
    with torch.no_grad():
        twin.kernel_gen.weight.zero_()
        twin.kernel_gen.bias.zero_()[mixer.kernel_size**2 // 2] = 1
        twin.difference_control.fill_(-100)  # no inhibition
    return twin
