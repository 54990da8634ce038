"""Image encoders by name: shipped ones, vision transformers of timm, and users' own."""

import difflib
from collections.abc import Callable
from pathlib import Path

import torch

from sit_atconv.encoders.image_encoder import ImageEncoder
from sit_atconv.runtime.names import is_object_path
from sit_atconv.runtime.tables import Table, import_module_of

Opener = Callable[[Path | None, tuple[int, int]], ImageEncoder]


def _digits(weights: Path | None, grid_size: tuple[int, int]) -> ImageEncoder:
    from sit_atconv.encoders.digit_features import DigitFeatures
    from sit_atconv.encoders.shipped_features import ShippedEncoder

    return ShippedEncoder(DigitFeatures, weights, grid_size, layers=6, stride=2)


def _fashion(weights: Path | None, grid_size: tuple[int, int]) -> ImageEncoder:
    from sit_atconv.encoders.fashion_features import FashionFeatures
    from sit_atconv.encoders.shipped_features import ShippedEncoder

    return ShippedEncoder(FashionFeatures, weights, grid_size, layers=6, stride=4)


def _timm(name: str) -> Opener:
    def open_model(weights: Path | None, grid_size: tuple[int, int]) -> ImageEncoder:
        from sit_atconv.encoders.vision_transformer import VisionTransformerEncoder  # slow to import

        return VisionTransformerEncoder(name, weights, grid_size)

    return open_model


# The shipped ones, then REPA's names of timm's models; every name of a vision transformer in timm is known, too.
ENCODERS: Table[Opener] = Table(
    "encoder",
    Callable,  # type: ignore[arg-type]  # not a plain class
    {
        "digits": _digits,
        "fashion": _fashion,
        **{
            f"dinov2{reg}-vit-{size[0]}": _timm(f"vit_{size}_patch14{reg4}_dinov2.lvd142m")
            for reg, reg4 in (("", ""), ("reg", "_reg4"))
            for size in ("small", "base", "large", "giant")
        },
        **{
            f"dinov3-vit-{size[0]}": _timm(f"vit_{size}_patch16_dinov3.lvd1689m") for size in ("small", "base", "large")
        },
        "mae-vit-b": _timm("vit_base_patch16_224.mae"),
        "mae-vit-l": _timm("vit_large_patch16_224.mae"),
        "mae-vit-h": _timm("vit_huge_patch14_224.mae"),
        "clip-vit-l": _timm("vit_large_patch14_clip_quickgelu_224.openai"),
        "jepa-vit-h": _timm("vit_huge_patch14_gap_224.in1k_ijepa"),
    },
)


def open_encoder(name: str, weights: str | Path | None, grid_size: tuple[int, int]) -> ImageEncoder:
    """Opens a frozen encoder.

    Args:
        name: a name in ENCODERS, a vision transformer of timm (with or without a tag), or your own `ImageEncoder` as
            module.NAME.
        weights: file of its weights; None takes the shipped ones, or those of timm's hub, which may be cached.
        grid_size: rows and columns of the tokens wanted; images are resized so that the encoder gives these.

    Raises:
        ValueError: the name is unknown, the weights are missing or do not fit, or the encoder has no such grid.
    """
    path = Path(weights) if weights is not None else None
    if path is not None and not path.is_file():
        raise ValueError(f"there is no file {path}: give the path of the weights of the encoder {name}")
    with torch.random.fork_rng(devices=[]):  # initial values of projectors do not depend on how targets are made
        encoder = _opener(name)(path, grid_size)
    if not isinstance(encoder, ImageEncoder):
        raise ValueError(
            f"{name} does not inherit sit_atconv.encoders.image_encoder.ImageEncoder: see docs/extending.md"
        )
    return encoder.eval().requires_grad_(False)


def _opener(name: str) -> Opener:
    if name in ENCODERS:
        return ENCODERS[name]
    import timm  # slow to import

    if timm.is_model(name.partition(".")[0]):
        return _timm(name)
    if is_object_path(name):
        return ENCODERS.find(import_module_of(name))
    close = difflib.get_close_matches(name, [*ENCODERS, *timm.list_models("vit_*")], 4) or [*ENCODERS]
    raise ValueError(f"there is no encoder {name}: known are {', '.join(close)}, ... and timm's vision transformers")
