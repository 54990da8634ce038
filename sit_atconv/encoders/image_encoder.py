"""Contract of the frozen image encoders that alignment aims at (REPA, arXiv 2410.06940)."""

import abc

import torch.nn as nn
from torch import Tensor

from sit_atconv.runtime.files import sha256_of_state


class ImageEncoder(nn.Module, abc.ABC):
    """Frozen network that maps images to one token for each cell of a grid.

    Your own encoder is a subclass whose constructor takes `weights` (path of a file, or None) and `grid_size` (H, W).
    Pass its path, `my_module.MyEncoder`, to `--auxiliary.encoder` or `encode.py --features`.

    Attributes:
        width: channels of a token.
        grid_size: rows and columns of the tokens.
    """

    width: int
    grid_size: tuple[int, int]

    @abc.abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Returns tokens (B, H * W, width), row by row, for images (B, 1 or 3, h, w) in [-1, 1]."""

    def sha256(self) -> str:
        """Returns the digest of the weights."""
        return sha256_of_state(self.state_dict(), lambda name, x: f"{name} {x.dtype} {tuple(x.shape)}")
