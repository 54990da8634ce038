"""Image encoders by name: shipped ones, vision transformers of timm, and users' own."""

import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sit_atconv.encoders.image_encoder import ImageEncoder
from sit_atconv.runtime.files import sha256_of
from sit_atconv.runtime.names import is_object_path
from sit_atconv.runtime.tables import Table, import_module_of

SIZES = {"s": "small", "b": "base", "l": "large"}
REPA_NAMES = {  # and the same for DINOv3 -> timm's
    **{f"dinov2-vit-{s}": f"vit_{size}_patch14_dinov2.lvd142m" for s, size in (*SIZES.items(), ("g", "giant"))},
    **{f"dinov2reg-vit-{s}": f"vit_{size}_patch14_reg4_dinov2.lvd142m" for s, size in (*SIZES.items(), ("g", "giant"))},
    **{f"dinov3-vit-{s}": f"vit_{size}_patch16_dinov3.lvd1689m" for s, size in SIZES.items()},
    "mae-vit-b": "vit_base_patch16_224.mae",
    "mae-vit-l": "vit_large_patch16_224.mae",
    "mae-vit-h": "vit_huge_patch14_224.mae",
    "clip-vit-l": "vit_large_patch14_clip_quickgelu_224.openai",
    "jepa-vit-h": "vit_huge_patch14_gap_224.in1k_ijepa",
}
Opener = Callable[[Path | None, tuple[int, int]], ImageEncoder]


def _digits(weights: Path | None, grid_size: tuple[int, int]) -> ImageEncoder:
    from sit_atconv.encoders.digit_features import DigitFeatures
    from sit_atconv.encoders.shipped_features import ShippedEncoder

    return ShippedEncoder(DigitFeatures, weights, grid_size, layers=6, stride=2)


def _fashion(weights: Path | None, grid_size: tuple[int, int]) -> ImageEncoder:
    from sit_atconv.encoders.fashion_features import FashionFeatures
    from sit_atconv.encoders.shipped_features import ShippedEncoder

    return ShippedEncoder(FashionFeatures, weights, grid_size, layers=6, stride=4)


def _timm(weights: Path | None, grid_size: tuple[int, int], *, name: str) -> ImageEncoder:
    from sit_atconv.encoders.vision_transformer import VisionTransformerEncoder  # slow to import

    return VisionTransformerEncoder(name, weights, grid_size)


ENCODERS: Table[Opener] = Table(
    "encoder",
    Callable,  # type: ignore[arg-type]  # not a plain class
    {"digits": _digits, "fashion": _fashion},
)


def canonical(name: str) -> str:
    """Returns timm's name for one of REPA's, and other names as they are."""
    return REPA_NAMES.get(name, name)


def identity_of(weights: str | Path | None) -> str:
    """Returns the sha256 of a file of weights, or "default" for those that belong to the name.

    Raises:
        ValueError: there is no such file.
    """
    if weights is None:
        return "default"
    if not Path(weights).is_file():
        raise ValueError(f"there is no file {weights}: give the path of the encoder's weights")
    return sha256_of(Path(weights))


def open_encoder(
    name: str,
    weights: str | Path | None,
    grid_size: tuple[int, int],
    image_shape: tuple[int, int, int] = (3, 32, 32),
) -> ImageEncoder:
    """Opens a frozen encoder, and checks it on one image.

    Args:
        name: a name in ENCODERS or REPA_NAMES, a vision transformer of timm (with or without a tag), or your own
            `ImageEncoder` as module.NAME.
        weights: file of its weights; None takes the shipped ones, or those of timm, which may be cached.
        grid_size: rows and columns of the tokens wanted; images are resized so that the encoder gives these.
        image_shape: (C, H, W) of the images to come.

    Raises:
        ValueError: the name is unknown, the weights are missing or do not fit, or the tokens are not as wanted.
    """
    identity_of(weights)  # raises an error if there is no such file
    opener = _opener(name)
    with torch.random.fork_rng(devices=[]):  # initial values of projectors do not depend on how targets are made
        try:
            encoder = opener(None if weights is None else Path(weights), grid_size)
            if not isinstance(encoder, ImageEncoder):
                raise ValueError(f"{name} does not inherit ImageEncoder: see docs/extending.md")
            encoder.eval().requires_grad_(False)
            with torch.no_grad():
                tokens = encoder(torch.zeros(1, *image_shape))
        except ValueError:
            raise
        except Exception as error:  # of any type: files, networks and users' own code
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            source = f" with {weights}" if weights is not None else ""
            raise ValueError(
                f"the encoder {name} cannot be opened{source} ({reason[:200]}): give the weights of that encoder"
            ) from error
    wanted, found = (1, grid_size[0] * grid_size[1], encoder.width), getattr(tokens, "shape", ())
    if not isinstance(tokens, Tensor) or found != wanted:
        raise ValueError(
            f"the encoder {name} returns {tuple(found)} for one image of {'x'.join(map(str, image_shape))}, and must "
            f"return {wanted}: one token for each cell of the {grid_size[0]}x{grid_size[1]} grid"
        )
    return encoder


def _opener(name: str) -> Opener:
    if name in ENCODERS:
        return ENCODERS[name]
    import timm  # slow to import

    if timm.is_model(canonical(name).partition(".")[0]):
        return partial(_timm, name=canonical(name))
    if is_object_path(name):
        return ENCODERS.find(import_module_of(name))
    known = [*ENCODERS, *REPA_NAMES]
    close = difflib.get_close_matches(name, [*known, *timm.list_models("vit_*")], 4) or known
    raise ValueError(f"there is no encoder {name}: known are {', '.join(close)}, ... and timm's vision transformers")
