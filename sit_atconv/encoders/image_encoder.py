"""Contract of frozen image encoders, the targets of alignment (REPA, arXiv 2410.06940)."""

import abc

import torch.nn as nn
from torch import Tensor


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
