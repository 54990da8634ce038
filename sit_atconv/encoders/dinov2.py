"""DINOv2 encoder of FD-DINOv2 (Stein et al., arXiv 2306.04675): the CLS token of ViT-L/14 at 224x224.

Images are resized by torch, as in EDM2. timm's transformer equals Meta's code up to rounding, except for resampling the
position embedding, which this module does as Meta's code does.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

SIDE, PATCH, HEAD_DIM = 224, 14, 64
PUBLISHED_WIDTH = 1024  # ViT-L/14, used for published distances
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for pixels in [0, 1]
SUPPORTED = "supported are ViT-S/14, B/14 and L/14 without registers"
FC1 = "blocks.0.mlp.fc1.weight"


class DINOv2(nn.Module):
    """Encoder of uint8 images (B, 3, H, W): returns a tuple of one, the normalised CLS token (B, C).

    Args:
        weights: state dict of Meta's `.pth` or timm's `.safetensors`, which determines width and depth.

    Raises:
        ValueError: weights of another network; registers and SwiGLU (ViT-g) are not supported.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: dict[str, Tensor]):
        from timm.models.vision_transformer import VisionTransformer  # slow to import

        super().__init__()
        weights = {name: tensor.float() for name, tensor in weights.items() if name != "mask_token"}  # used in training
        fc1 = weights.get(FC1)
        if fc1 is None or fc1.shape[0] != 4 * fc1.shape[-1] or fc1.shape[-1] % HEAD_DIM:
            raise ValueError(
                f"its {FC1} is {'absent' if fc1 is None else tuple(fc1.shape)}, not (4 * C, C) with C a "
                f"multiple of {HEAD_DIM}: {SUPPORTED}"
            )
        self.width = fc1.shape[-1]
        self.transformer = VisionTransformer(
            img_size=SIDE,
            patch_size=PATCH,
            num_classes=0,
            embed_dim=self.width,
            num_heads=self.width // HEAD_DIM,
            depth=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
            init_values=1.0,
            weight_init="skip",
        )
        if "pos_embed" in weights:
            weights["pos_embed"] = resample_positions(weights["pos_embed"])
        _check_shapes(weights, self.transformer.state_dict())
        self.transformer.load_state_dict(weights)
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        x = F.interpolate(images.float(), size=(SIDE, SIDE), mode="bicubic", antialias=True)  # (B, 3, 224, 224)
        return (self.transformer((x / 255 - self.mean) / self.std),)  # (B, C)


def resample_positions(embedding: Tensor, side: int = SIDE // PATCH) -> Tensor:
    """Resamples a position embedding (1, 1 + M * M, C) to (1, 1 + side * side, C).

    Equals Meta's code, which does this in every forward pass: bicubic without antialiasing, at coordinates scaled by
    M / (side + 0.1). Returns the embedding of a grid that is not square unchanged.
    """
    m = math.isqrt(embedding.shape[1] - 1)
    if m * m != embedding.shape[1] - 1 or m == side:
        return embedding
    grid = embedding[:, 1:].unflatten(1, (m, m)).permute(0, 3, 1, 2)  # (1, C, M, M)
    grid = F.interpolate(grid, scale_factor=(side + 0.1) / m, mode="bicubic")  # (1, C, side, side)
    return torch.cat([embedding[:, :1], grid.flatten(2).mT], dim=1)


def _check_shapes(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    here, there = ({name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (given, expected))
    odd = [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]
    if odd:
        name = min(odd, key=lambda name: name in there)  # prefer a tensor that does not belong
        raise ValueError(f"its {name} is {here.get(name, 'absent')}, not {there.get(name, 'absent')}: {SUPPORTED}")
