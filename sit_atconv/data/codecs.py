"""Codecs between images and latents: the only place that knows about moments, scale and shift.

The `kind` in a codec's description is a name in CODECS, or the path of a user's own class, `my_module.MyCodec`.
"""

import contextlib
import json
import logging
import math
import os
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from sit_atconv.runtime.dtypes import torch_dtype
from sit_atconv.runtime.files import hub_options, sha256_of_state, weights_variant
from sit_atconv.runtime.names import is_object_path, show_some
from sit_atconv.runtime.settings import differences
from sit_atconv.runtime.tables import Table, import_module_of

if TYPE_CHECKING:  # diffusers is imported where a VAE is loaded
    from diffusers import AutoencoderDC, AutoencoderKL

    VAE: TypeAlias = AutoencoderKL | AutoencoderDC

DECODED_AT_ONCE = 16  # images; a decoder needs much memory for each
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
WHERE_FROM = (
    "Give the path of a downloaded folder of the VAE (config.json and weights), or connect to the network once so "
    "that the hub id is cached"
)


class Codec(Protocol):
    """Frozen map from images to the latents that a model is trained on, and back.

    Your own codec inherits this class and defines at least `channels`, `downsample`, `encode` and `decode`; the last
    two run their networks under `torch.no_grad()`. Pass its path, `my_module.MyCodec`, to `--data.codec` and
    `encode.py --vae`.

    Attributes:
        channels: channels C of the latents.
        downsample: image side divided by latent side.
    """

    channels: int
    downsample: int

    @classmethod
    def open(cls, description: dict, **options) -> "Codec":
        """Returns the codec that `describe()` described; by default, calls this class without arguments.

        Args:
            description: stored with a run, latents or weights; only `kind` if the user names the codec for the first
                time.
            options: `precision`, `slicing`, `tiling` and `remedy` of `VAECodec`.
        """
        return cls()

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Returns the tensor to cache, (B, *stored_shape), for images (B, 3, H, W) in [-1, 1]."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Returns images (B, 3 or 1, H, W) in [-1, 1] for latents (B, C, h, w)."""

    def latents(self, stored: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """Returns the latents (B, C, h, w), float32, for what `encode` returned; by default, the same.

        A codec that samples uses `noise` (B, C, h, w) if it is given, otherwise the generator.
        """
        return stored.float()

    def stored_shape(self, image_size: int) -> tuple[int, int, int]:
        """Returns the shape that `encode` returns for one image; by default, the shape of its latents."""
        side = self.latent_size(image_size)
        return self.channels, side, side

    def describe(self) -> dict:
        """Returns `kind` and all that tells two codecs apart, as JSON; `source`, its place, may change."""
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"kind": kind, "channels": self.channels, "downsample": self.downsample}

    def to(self, device: torch.device | str) -> "Codec":
        """Moves the codec's networks to a device."""
        return self

    def latent_size(self, image_size: int) -> int:
        """Returns the side of the latent grid. ValueError: `downsample` does not divide the image size."""
        if image_size % self.downsample:
            raise ValueError(f"image size {image_size} is not divisible by the codec's downsampling {self.downsample}")
        return image_size // self.downsample

    @property
    def name(self) -> str:
        """The codec's `source`, or its `kind` if it has none."""
        description = self.describe()
        return description.get("source", description["kind"])

    def identity(self) -> dict:
        """Returns the description without `source`."""
        return {key: value for key, value in self.describe().items() if key != "source"}

    def check(self, description: dict, made: str) -> None:
        """Raises ValueError if this codec's identity is not the one described.

        Args:
            description: result of an earlier `describe()`.
            made: what the described codec was used for, for the message: "the weights were trained".
        """
        here = self.identity()
        then = {key: description.get(key, value) for key, value in here.items()}  # old descriptions have fewer keys
        if changes := differences(then, here):
            raise ValueError(f"{made} with another codec than {self.name} ({'; '.join(changes)}): give the original")


class IdentityCodec(Codec):
    """Codec of pixel space: the model sees the images themselves."""

    downsample = 1

    def __init__(self, channels: int):
        self.channels = channels

    @classmethod
    def open(cls, description: dict, **options) -> "IdentityCodec":
        return cls(description["channels"])

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, z: Tensor) -> Tensor:
        return z

    def describe(self) -> dict:
        return super().describe() | {"kind": "identity"}


class VAECodec(Codec):
    """Codec of a diffusers `AutoencoderKL`, by hub id or local folder.

    Args:
        source: hub id (`stabilityai/sd-vae-ft-ema`), or a folder that `save_pretrained` wrote; its path is made
            absolute.
        precision: precision of the arithmetic; "tf32" is float32 except for convolutions on a GPU, which use TF32.
        slicing: process one image at a time: the memory of one image for any batch size.
        tiling: split images larger than the VAE's training size into overlapping tiles, blended at the seams: an
            approximation.
        remedy: advice to the user if nothing can be loaded, for the message.

    Raises:
        ValueError: nothing can be loaded, or it is not a complete model of that class; names `source` and the remedy.

    Attributes:
        kind: the codec's name in CODECS.
        model_class: class in diffusers.
        architecture: keys of its config that can change its output with the same tensors.
    """

    kind: ClassVar[str] = "autoencoder_kl"
    model_class: ClassVar[str] = "AutoencoderKL"
    architecture: ClassVar[tuple[str, ...]] = (
        "act_fn",
        "norm_num_groups",
        "down_block_types",
        "layers_per_block",
        "mid_block_add_attention",
        "sample_size",
    )

    def __init__(
        self,
        source: str,
        precision: Precision = "tf32",
        *,
        slicing: bool = False,
        tiling: bool = False,
        remedy: str = WHERE_FROM,
    ):
        source = os.path.abspath(source) if Path(source).exists() else source
        vae = _load_vae(source, remedy, self.model_class)
        self._hold(vae, source, precision, _weights_sha256(vae, self.architecture))
        torch.nn.Module.to(vae.eval().requires_grad_(False), torch_dtype(precision))
        vae.use_slicing, vae.use_tiling = slicing, tiling

    @classmethod
    def open(cls, description: dict, **options) -> "VAECodec":
        return cls(description["source"], **options)

    @staticmethod
    def of(vae: "VAE") -> "VAECodec":
        """Returns the codec around a loaded VAE, whose device and precision stay the caller's."""
        cls = next(cls for cls in (VAECodec, DCCodec) if cls.model_class == type(vae).__name__)
        codec = cls.__new__(cls)
        codec._hold(vae, "its VAE", None, None)
        return codec

    def _hold(self, vae: "VAE", source: str, precision: Precision | None, weights: str | None) -> None:
        self.vae, self.source, self.precision, self.weights = vae, source, precision, weights
        self.scale, self.shift = scale_and_shift(vae.config, source)
        self.channels = vae.config.latent_channels
        blocks = vae.config.get("block_out_channels") or vae.config["encoder_block_out_channels"]
        self.downsample = 2 ** (len(blocks) - 1)

    def stored_shape(self, image_size: int) -> tuple[int, int, int]:
        """Returns the shape of posterior mean and log-variance together, (2C, h, w)."""
        side = self.latent_size(image_size)
        return 2 * self.channels, side, side

    def encode(self, images: Tensor) -> Tensor:
        """Returns posterior mean and log-variance (B, 2C, h, w), unscaled, for images (B, 3, H, W) in [-1, 1]."""
        with torch.no_grad(), self._arithmetic():
            return self.vae.encode(images.to(self.vae.dtype)).latent_dist.parameters.to(images.dtype)

    def latents(self, stored: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """Samples the posterior, (B, 2C, h, w) -> (B, C, h, w): (sample - shift) * scale, float32."""
        mean, log_variance = stored.float().chunk(2, dim=1)
        if noise is None:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        draw = mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise
        return (draw - per_channel(self.shift, draw)) * per_channel(self.scale, draw)

    def decode(self, z: Tensor) -> Tensor:
        """Returns images (B, 3, H, W) in [-1, 1] for latents (B, C, h, w)."""
        draw = z / per_channel(self.scale, z) + per_channel(self.shift, z)
        with torch.no_grad(), self._arithmetic():
            return self.vae.decode(draw.to(self.vae.dtype)).sample.to(z.dtype)

    def describe(self) -> dict:
        return {
            "kind": self.kind,
            "source": self.source,
            "weights": self.weights,
            "channels": self.channels,
            "downsample": self.downsample,
            "scale": self.scale,
            "shift": self.shift,
        }

    def to(self, device: torch.device | str) -> "VAECodec":
        self.vae.to(device)
        return self

    @contextlib.contextmanager
    def _arithmetic(self):
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = before if self.precision is None else self.precision == "tf32"
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = before


class DCCodec(VAECodec):
    """Codec of a diffusers `AutoencoderDC` (arXiv 2410.10733), whose latents have no posterior."""

    kind: ClassVar[str] = "autoencoder_dc"
    model_class: ClassVar[str] = "AutoencoderDC"
    architecture: ClassVar[tuple[str, ...]] = (
        "attention_head_dim",
        "encoder_block_types",
        "decoder_block_types",
        "encoder_qkv_multiscales",
        "decoder_qkv_multiscales",
        "downsample_block_type",
        "upsample_block_type",
        "decoder_norm_types",
        "decoder_act_fns",
        "decoder_conv_act_fn",
        "encoder_out_shortcut",
        "decoder_in_shortcut",
    )

    def stored_shape(self, image_size: int) -> tuple[int, int, int]:
        """Returns the shape of the latents, (C, h, w)."""
        side = self.latent_size(image_size)
        return self.channels, side, side

    def encode(self, images: Tensor) -> Tensor:
        """Returns latents (B, C, h, w), unscaled, for images (B, 3, H, W) in [-1, 1]."""
        with torch.no_grad(), self._arithmetic():
            return self.vae.encode(images.to(self.vae.dtype)).latent.to(images.dtype)

    def latents(self, stored: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """Scales the stored latents (B, C, h, w): (stored - shift) * scale, float32."""
        return (stored.float() - per_channel(self.shift, stored)) * per_channel(self.scale, stored)


CODECS: Table[type[Codec]] = Table(
    "codec", type, {"identity": IdentityCodec, VAECodec.kind: VAECodec, DCCodec.kind: DCCodec}
)


def typed_codec(name: str, channels: int) -> dict:
    """Returns the description of the codec that a user names on the command line or in a config.

    Args:
        name: a name in CODECS, the path of the user's own class, or the hub id or folder of a VAE.
        channels: channels of the images, for "identity".

    Raises:
        ValueError: the user's module cannot be imported.
    """
    if name in CODECS:
        return {"kind": name, "channels": channels, "source": name}
    if is_object_path(name):
        return {"kind": import_module_of(name)}
    return {"kind": DCCodec.kind if _is_dc(name) else VAECodec.kind, "source": name}


def _is_dc(source: str) -> bool:
    """True if the model's config says that it is an AutoencoderDC."""
    from diffusers import AutoencoderDC

    try:
        with _not_loaded(source, ""):
            options = {} if Path(source).is_dir() else hub_options(source)
            return AutoencoderDC.load_config(source, **options).get("_class_name") == DCCodec.model_class
    except ValueError:  # loading it as an AutoencoderKL says what is wrong
        return False


def open_codec(
    description: dict,
    made: str = "the weights were trained",
    precision: Precision = "tf32",
    *,
    remedy: str = "Pass its current folder with --vae",
    **options,
) -> Codec:
    """Returns the codec that `describe()` described.

    Args:
        description: the codec's description, with its current `source`.
        made: as in `Codec.check`.
        precision, remedy, options: as in `VAECodec`.

    Raises:
        ValueError: the kind is unknown, or the codec's weights, scale, shift, ... are not those described.
    """
    kind = str(description.get("kind"))
    entry = CODECS.find(kind)
    if Codec not in entry.__mro__:
        raise ValueError(f"codec {kind} does not inherit sit_atconv.data.codecs.Codec: see docs/extending.md")
    codec = entry.open(description, precision=precision, remedy=remedy, **options)
    codec.check(description, made)
    return codec


def decode_in_parts(codec: Codec, z: Tensor) -> Tensor:
    """Returns `codec.decode(z)`, computed for a few images at a time to save memory."""
    return torch.cat([codec.decode(part) for part in z.split(DECODED_AT_ONCE)])


def scale_and_shift(config: Mapping, source: str) -> tuple[float | list[float], float | list[float]]:
    """Returns the scale and shift in z = (sample - shift) * scale, as numbers or lists of C numbers.

    The config of an `AutoencoderKL` with `latents_mean` and `latents_std` means z = (sample - mean) * factor / std.
    ValueError: the scaling factor is not a finite number other than 0, or mean and standard deviation do not fit.
    """
    factor, shift = config.get("scaling_factor"), config.get("shift_factor") or 0.0
    if not isinstance(factor, int | float) or not math.isfinite(factor) or not factor:
        raise ValueError(
            f"the VAE {source} has scaling_factor {factor} in its config.json: set it to the number by "
            "which the VAE's latents are scaled"
        )
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None and std is None:
        return factor, shift
    if not mean or not std or not len(mean) == len(std) == config["latent_channels"] or shift or 0 in std:
        raise ValueError(
            f"the VAE {source} has latents_mean {mean}, latents_std {std} and shift_factor {shift} in its "
            f"config.json: set latents_mean and latents_std to {config['latent_channels']} values each, "
            "none of the latter 0, and remove shift_factor"
        )
    return [factor / deviation for deviation in std], list(mean)


def per_channel(value: float | list[float], z: Tensor) -> float | Tensor:
    """Returns a number unchanged, and a list of C numbers as (C, 1, 1) with the dtype and device of `z`."""
    return torch.tensor(value, dtype=z.dtype, device=z.device)[:, None, None] if isinstance(value, list) else value


def _load_vae(source: str, remedy: str, model_class: str) -> "VAE":
    """Loads a VAE in float32 after checking in its config.json that it is of that class, for RGB images."""
    import diffusers

    loader = getattr(diffusers, model_class)
    folder = Path(source)
    if folder.is_file():
        raise ValueError(f"{folder} is a file, and a VAE is a folder (config.json and weights): give the folder")
    if (folder / "model_index.json").is_file():
        advice = f"give {folder / 'vae'}" if (folder / "vae").is_dir() else "give another one, it contains no VAE"
        raise ValueError(f"{folder} is a pipeline, not a VAE: {advice}")
    with _not_loaded(source, remedy):
        options = {} if folder.is_dir() else hub_options(source)
        config = loader.load_config(source, **options)
    _check_config(source, config, model_class)
    with _not_loaded(source, remedy):
        vae, report = loader.from_pretrained(
            source,
            torch_dtype=torch.float32,
            variant=weights_variant(folder),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    wrong = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    wrong += [f"{name} is {(*there,)}, not {(*here,)}" for name, there, here in sorted(report["mismatched_keys"])]
    if wrong:
        raise ValueError(
            f"the weights of the VAE {source} do not fit its config.json: {show_some(wrong, 3)}. Download "
            "or save the VAE again"
        )
    return vae


@contextlib.contextmanager
def _not_loaded(source: str, remedy: str):
    """Silences diffusers and turns its errors (a dozen types) into a ValueError with source and remedy."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        if isinstance(error, OSError) and not Path(source).exists() and Path(source).parent.is_dir():
            reason = (
                f"there is no folder {source}, and it is not in the hub's cache. It is not downloaded because a "
                f"folder {Path(source).parent} exists here: to download it, run in another directory"
            )
        raise ValueError(f"no VAE could be loaded from {source!r} ({reason}). {remedy}") from error
    finally:
        logging.disable(disabled)


def _check_config(source: str, config: Mapping, model_class: str) -> None:
    """Raises ValueError unless the model is of that class, for RGB images, with a valid scale and shift."""
    if (kind := config.get("_class_name", model_class)) != model_class:
        raise ValueError(f"{source} is an {kind}: give the folder or hub id of an AutoencoderKL or AutoencoderDC")
    channels = config.get("in_channels", 3), config.get("out_channels", 3)
    if channels != (3, 3):
        raise ValueError(
            f"the VAE {source} takes {channels[0]} channels and gives {channels[1]}: give one that takes and gives 3"
        )
    if "scaling_factor" in config:
        scale_and_shift({"latent_channels": 4, **config}, source)


def _weights_sha256(vae: "VAE", keys: Sequence[str]) -> str:
    """Returns the digest of architecture, tensor names and values, independent of the file format."""
    architecture = json.dumps([vae.config.get(key) for key in keys])
    return sha256_of_state(vae.state_dict(), lambda name, tensor: f"{name}\0", architecture)
