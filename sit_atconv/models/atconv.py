"""ATConv, Attentive Convolution (arXiv 2510.20092), the token mixer of this package."""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from sit_atconv.models.constants import kept
from sit_atconv.ops import dynamic_depthwise_conv2d

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": functools.partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
}


class ATConv(nn.Module):
    """Token mixer: a depthwise convolution whose kernels are generated from the content of each sample.

    The published code projects all N tokens for the kernel and pools afterwards. Average pooling and a per-token
    linear map commute exactly, so pooling first computes the same function with N / k^2 times fewer multiplications.

    Args:
        dim: channels C.
        kernel_size: side k of the kernel, odd.
        act: activation in the kernel generator, "gelu_tanh" (published for SiT), "gelu" (AttNet) or "silu" (REPA port).
        pool: "raster" averages k^2 runs of consecutive tokens (published); "grid" averages k x k tiles of the grid,
            aligned with the taps of the kernel.
        inhibition: "learned" lets the taps of a kernel compete, as published; "none" leaves that out, for studies.
        kernels: "dynamic" generates kernels from the content, as published; "static" learns one for each channel, for
            studies, and has no use for `act` and `pool`.

    Raises:
        ValueError: `kernel_size` is even, or another option is unknown.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        act: str = "gelu_tanh",
        pool: str = "raster",
        inhibition: str = "learned",
        kernels: str = "dynamic",
    ):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {kernel_size}")
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {sorted(ACTIVATIONS)}, not {act!r}")
        if pool not in ("raster", "grid"):
            raise ValueError(f"pool must be 'raster' or 'grid', not {pool!r}")
        if inhibition not in ("learned", "none"):
            raise ValueError(f"inhibition must be 'learned' or 'none', not {inhibition!r}")
        if kernels not in ("dynamic", "static"):
            raise ValueError(f"kernels must be 'dynamic' or 'static', not {kernels!r}")
        self.kernel_size = kernel_size
        self.pool = pool
        self.inhibition = inhibition
        self.kernels = kernels
        taps = kernel_size**2
        if kernels == "dynamic":
            self.kernel_proj = nn.Linear(dim, dim)
            self.kernel_act = ACTIVATIONS[act]()
            self.kernel_gen = nn.Linear(taps, taps)
        else:
            self.static_kernels = nn.Parameter(torch.empty(dim, taps))
            nn.init.uniform_(self.static_kernels, -1 / kernel_size, 1 / kernel_size)
        if inhibition == "learned":
            self.difference_control = nn.Parameter(torch.zeros(dim))  # alpha, strength of the lateral inhibition
        self.x_proj = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """Mixes tokens: (B, N, C) -> (B, N, C).

        Args:
            x: tokens, in row-major order of the grid.
            grid_size: (H, W) with H * W = N; None means a square grid.

        Raises:
            ValueError: H * W is not N, or `grid_size` is None and N is not a square.
        """
        grid_size = grid_size or square_grid(x.shape[1])
        kernels = self.generate_kernels(x, grid_size)  # (B, C, k, k)
        y = dynamic_depthwise_conv2d(self.x_proj(x), kernels, grid_size)  # (B, N, C)
        return self.proj(y)  # (B, N, C)

    def generate_kernels(self, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Generates one kernel for each sample and channel: tokens (B, N, C) -> (B, C, k, k)."""
        k = self.kernel_size
        if self.kernels == "dynamic":
            p = pool_tokens(x, grid_size, k, self.pool)  # (B, k*k, C)
            K = self.kernel_act(self.kernel_proj(p))  # (B, k*k, C)
            K = self.kernel_gen(K.transpose(1, 2))  # (B, C, k*k), shared by all channels
        else:
            K = self.static_kernels.expand(len(x), -1, -1)  # (B, C, k*k)
        if self.inhibition == "learned":
            inhibition = torch.sigmoid(self.difference_control)[:, None]  # (C, 1)
            K = torch.addcmul(K, -inhibition, K.mean(2, keepdim=True))  # lateral inhibition
        return K.unflatten(2, (k, k))  # (B, C, k, k)


def pool_tokens(x: Tensor, grid_size: tuple[int, int], k: int, pool: str) -> Tensor:
    """Averages tokens (B, N, C) into k*k bins (B, k*k, C).

    "raster" treats the tokens as one sequence: bin i averages tokens floor(i*N/k^2) ... ceil((i+1)*N/k^2) - 1.
    "grid" does the same along each side of the grid. Both equal `adaptive_avg_pool2d`, but as a matrix product: the
    backward of `adaptive_avg_pool2d` uses one core per sample (docs/speed.md, "What makes it fast", times both).
    """
    members, counts = bin_members(grid_size, k, pool, x.device, x.dtype)
    return members @ x / counts


@kept
def bin_members(
    grid_size: tuple[int, int], k: int, pool: str, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns which tokens are in which bin, zeros and ones (k*k, N), and the size of each bin (k*k, 1)."""

    def along(n: int, bins: int) -> Tensor:
        bin_, position = torch.arange(bins, device=device)[:, None], torch.arange(n, device=device)
        return (position >= bin_ * n // bins) & (position < ((bin_ + 1) * n + bins - 1) // bins)  # (bins, n)

    H, W = grid_size
    if pool == "grid":
        members = (along(H, k)[:, None, :, None] & along(W, k)[None, :, None, :]).reshape(k * k, H * W)
    else:
        members = along(H * W, k * k)
    return members.to(dtype), members.sum(1, keepdim=True)


def square_grid(num_tokens: int) -> tuple[int, int]:
    """Returns (side, side) with side^2 tokens; raises ValueError if `num_tokens` is not a square."""
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(f"{num_tokens} tokens do not form a square grid: pass grid_size=(H, W)")
    return side, side
