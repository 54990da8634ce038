"""Vision transformers of timm as image encoders, with REPA's preparation of images (arXiv 2410.06940)."""

from pathlib import Path

import timm
import timm.models
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from sit_atconv.encoders.image_encoder import ImageEncoder

WITHOUT_FINAL_NORM = ("clip", "mae")  # encoders whose tokens REPA takes before the last LayerNorm


class VisionTransformerEncoder(ImageEncoder):
    """Patch tokens of a vision transformer of timm.

    Images are normalised as the encoder was trained, and resized (bicubic, without antialiasing, as REPA does) to one
    patch for each cell of the grid. timm resamples the position embedding to that size once (bicubic, antialiased).
    CLS and register tokens are dropped. The feature extractor of FD-DINOv2 prepares images in another way.

    Args:
        name: name in timm, with or without a tag of pretrained weights.
        weights: file of weights, of timm or a state dict as their authors published it; None takes timm's, by its tag.
        grid_size: rows and columns of the tokens.

    Raises:
        ValueError: it is no vision transformer, or the weights cannot be downloaded or are of another network.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, weights: Path | None, grid_size: tuple[int, int]):
        super().__init__()
        patch = _patch_size(name)
        self.grid_size = grid_size
        self.input_size = tuple(cells * side for cells, side in zip(grid_size, patch, strict=True))
        self.has_final_norm = not any(part in name for part in WITHOUT_FINAL_NORM)
        options: dict = {"num_classes": 0, "img_size": self.input_size}
        if weights is not None:
            tensors = _read(name, weights, patch)
            options["pretrained_cfg_overlay"] = {"state_dict": tensors, "num_classes": 0, "custom_load": False}
        try:
            self.transformer = timm.create_model(name, pretrained=True, **options)
        except Exception as error:  # from many libraries: no network, no such weights, other shapes
            raise ValueError(_why_not(name, weights, error)) from error
        config = self.transformer.pretrained_cfg
        self.width = self.transformer.embed_dim
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(config[key]).view(3, 1, 1), persistent=False)

    def prepare(self, images: Tensor) -> Tensor:
        """Returns the network's inputs (B, 3, H', W') for images (B, 1 or 3, h, w) in [-1, 1]."""
        x = ((images.float() + 1) / 2 - self.mean) / self.std
        return x if x.shape[-2:] == self.input_size else F.interpolate(x, size=self.input_size, mode="bicubic")

    def forward(self, images: Tensor) -> Tensor:
        return _patch_tokens(self.transformer, self.prepare(images), self.has_final_norm)


def _patch_tokens(model: nn.Module, x: Tensor, norm: bool) -> Tensor:
    """Returns the patch tokens (B, N, D) after the last block, and after the last norm if asked for."""
    read = getattr(model, "forward_intermediates")  # noqa: B009  # of timm, unknown to the type checker
    return read(x, indices=1, norm=norm, output_fmt="NLC", intermediates_only=True)[0]


def _patch_size(name: str) -> tuple[int, int]:
    """Returns the size of a model's patches. ValueError: it is no vision transformer."""
    try:
        with torch.device("meta"):  # no memory, no arithmetic
            model = timm.create_model(name, num_classes=0)
            patch = model.patch_embed.patch_size
            _patch_tokens(model, torch.zeros(1, 3, *model.patch_embed.img_size), norm=False)
    except Exception as error:  # of many types, by the kind of model
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name} is no encoder: give a vision transformer of timm ({reason[:100]})") from error
    return patch


def _read(name: str, path: Path, patch: tuple[int, int]) -> dict[str, Tensor]:
    """Reads weights without their classifier. ValueError: unreadable, or for patches of another size."""
    try:
        tensors = timm.models.load_state_dict(str(path), use_ema=False, weights_only=True)
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("head.")}
    except Exception as error:  # a damaged file raises errors of many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} cannot be read as weights of the encoder {name} ({reason[:100]}): give timm's file, or a state "
            "dict (a TorchScript archive, such as OpenAI's of CLIP, is none)"
        ) from error
    size = tuple(getattr(tensors.get("patch_embed.proj.weight"), "shape", ()))
    if len(size) == 4 and size[-2:] != tuple(patch):  # timm would resample them
        raise ValueError(
            f"{path} has patches of {'x'.join(map(str, size[-2:]))} pixels, and the encoder {name} "
            f"{patch[0]}x{patch[1]}: give the weights of that encoder"
        )
    return tensors


def _why_not(name: str, weights: Path | None, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if weights is not None:
        reason = lines[1] if len(lines) > 1 else lines[0]  # torch lists the tensors that differ after a heading
        return f"{weights} does not fit the encoder {name} ({reason[:200]}): give the weights of that encoder"
    return (
        f"the weights of the encoder {name} could not be loaded ({lines[0][:200]}): run this once where there is a "
        "network, or give the path of a downloaded file (--auxiliary.encoder_weights, encode.py --features-weights)"
    )
