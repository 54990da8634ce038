"""DINOv2 as FD-DINOv2 takes it (Stein et al., arXiv 2306.04675): the CLS token of ViT-L/14 at 224x224.

Images are resized as EDM2 does, by torch. timm's transformer computes from the same weights what Meta's code does, to
rounding; timm alone would resample the position embedding in another way, so we do that.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

SIDE, PATCH, HEAD_DIM = 224, 14, 64
PUBLISHED_WIDTH = 1024                                      # of ViT-L/14, whose distances are published
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # ImageNet's, of pixels in [0, 1]
SUPPORTED = "supported are ViT-S/14, B/14 and L/14 without registers"
FC1 = "blocks.0.mlp.fc1.weight"


class DINOv2(nn.Module):
    """Images uint8 (B, 3, H, W) -> a tuple of one, the normalised CLS token (B, C).

    Args:
        weights: name -> tensor, of Meta's `.pth` or timm's `.safetensors`. Width and depth are read from it.

    Raises:
        ValueError: weights of another network; registers and SwiGLU (the giant) are not supported.
    """

    def __init__(self, weights: dict[str, Tensor]):
        from timm.models.vision_transformer import VisionTransformer  # slow to import

        super().__init__()
        weights = {name: tensor.float() for name, tensor in weights.items() if name != "mask_token"}  # for training
        shape = tuple(weights[FC1].shape) if FC1 in weights else "absent"
        if FC1 not in weights or shape[0] != 4 * shape[-1] or shape[-1] % HEAD_DIM:
            raise ValueError(f"its {FC1} is {shape}, not (4 * C, C) with C a multiple of {HEAD_DIM}: {SUPPORTED}")
        self.width = shape[-1]
        self.transformer = VisionTransformer(
            img_size=SIDE, patch_size=PATCH, num_classes=0, embed_dim=self.width, num_heads=self.width // HEAD_DIM,
            depth=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}), init_values=1.0,
            weight_init="skip",
        )
        if "pos_embed" in weights:
            weights["pos_embed"] = resample_positions(weights["pos_embed"])
        _check_shapes(weights, self.transformer.state_dict())
        self.transformer.load_state_dict(weights)
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        x = F.interpolate(images.float(), size=(SIDE, SIDE), mode="bicubic", antialias=True)    # (B, 3, 224, 224)
        return (self.transformer((x / 255 - self.mean) / self.std),)                            # (B, C)


def resample_positions(embedding: Tensor, side: int = SIDE // PATCH) -> Tensor:
    """The position embedding of a grid M x M, (1, 1 + M * M, C), for one of side x side: (1, 1 + side * side, C).

    As Meta's code does it in every forward pass: bicubic without antialiasing, at coordinates scaled by
    M / (side + 0.1). What is of no square grid comes back as it is.
    """
    m = math.isqrt(embedding.shape[1] - 1)
    if m * m != embedding.shape[1] - 1 or m == side:
        return embedding
    grid = embedding[:, 1:].unflatten(1, (m, m)).permute(0, 3, 1, 2)                            # (1, C, M, M)
    grid = F.interpolate(grid, scale_factor=(side + 0.1) / m, mode="bicubic")                   # (1, C, side, side)
    return torch.cat([embedding[:, :1], grid.flatten(2).mT], dim=1)


def _check_shapes(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    here, there = ({name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (given, expected))
    odd = [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]
    if odd:
        name = min(odd, key=lambda name: name in there)  # one that does not belong says most
        raise ValueError(f"its {name} is {here.get(name, 'absent')}, not {there.get(name, 'absent')}: {SUPPORTED}")
