"""Multi-head self-attention as a token mixer."""

import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


class Attention(nn.Module):
    """Multi-head self-attention as a token mixer: (B, N, C) -> (B, N, C); the grid is ignored."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"hidden_size {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)  # (B, heads, N, head_dim)
        return self.proj(rearrange(y, "b h n d -> b n (h d)"))
