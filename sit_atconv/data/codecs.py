"""Codecs between pixels and the latents of the model: the only place for moments, scale and shift.

The `kind` in a codec's description is a name in CODECS, or the path of a user's own class, `my_module.MyCodec`.
"""

import contextlib
import json
import logging
import math
import os
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from sit_atconv.runtime.dtypes import torch_dtype
from sit_atconv.runtime.files import hub_options, sha256_of_state, weights_variant
from sit_atconv.runtime.names import is_object_path
from sit_atconv.runtime.settings import differences
from sit_atconv.runtime.tables import Table, import_module_of

if TYPE_CHECKING:  # diffusers is slow to import
    from diffusers import AutoencoderKL

DECODED_AT_ONCE = 16
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
LISTED = 3  # names of missing tensors in an error message
WHERE_FROM = "Give the path of a downloaded AutoencoderKL folder (config.json and weights), or connect to the " \
    "network once so that the hub id is cached"


class Codec(Protocol):
    """A frozen map from images to the latents that a model is trained on, and back.

    A codec of your own inherits this class and defines at least `channels`, `downsample`, `encode` and `decode`, which
    run their networks under `torch.no_grad()`. Give its path, `my_module.MyCodec`, to `--data.codec` and
    `encode.py --vae`.

    Attributes:
        channels: C of the latents.
        downsample: image side divided by latent side.
    """

    channels: int
    downsample: int

    @classmethod
    def open(cls, description: dict, **options) -> "Codec":
        """Returns the codec that `describe()` described; by default this class without arguments.

        Args:
            description: from a run, latents or weights; for a codec that is named for the first time, only its `kind`.
            options: `precision`, `slicing`, `tiling` and `remedy`, as `VAECodec` takes them.
        """
        return cls()

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Returns the values to cache, (B, *stored_shape), for images (B, 3, H, W) in [-1, 1]."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Returns images (B, 3 or 1, H, W) in [-1, 1] for latents (B, C, h, w)."""

    def latents(
        self, stored: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Returns latents (B, C, h, w), float32, from the result of `encode`; by default unchanged.

        A codec that draws at random uses `noise` (B, C, h, w) if it is given, else noise from the generator.
        """
        return stored.float()

    def stored_shape(self, image_size: int) -> tuple[int, int, int]:
        """Returns the shape of an image's cached values; by default that of its latents."""
        side = self.latent_size(image_size)
        return self.channels, side, side

    def describe(self) -> dict:
        """Returns `kind` and all else that identifies the codec, as JSON values, and its place as `source`."""
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"kind": kind, "channels": self.channels, "downsample": self.downsample}

    def to(self, device: torch.device | str) -> "Codec":
        """Moves the codec to a device and returns it."""
        return self

    def latent_size(self, image_size: int) -> int:
        """Returns the side of the latent grid. ValueError: `downsample` does not divide the image size."""
        if image_size % self.downsample:
            raise ValueError(f"image size {image_size} is not divisible by the codec's downsampling {self.downsample}")
        return image_size // self.downsample

    @property
    def name(self) -> str:
        """The codec's place, or its kind if it has none."""
        description = self.describe()
        return description.get("source", description["kind"])

    def identity(self) -> dict:
        """Returns the description without the codec's place."""
        return {key: value for key, value in self.describe().items() if key != "source"}

    def check(self, description: dict, made: str) -> None:
        """Raises ValueError if this is not the codec described: other weights, scale, shift, ...

        Args:
            description: earlier result of `describe()`; its `source` does not matter.
            made: what was made with that codec, for the message: "the weights were trained".
        """
        here = self.identity()
        then = {key: description.get(key, value) for key, value in here.items()}  # older descriptions have fewer fields
        if changes := differences(then, here):
            raise ValueError(f"{made} with another codec than {self.name} ({'; '.join(changes)}): give that codec")


class IdentityCodec(Codec):
    """The codec of pixel space: the model sees the images themselves."""

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
    """Any diffusers `AutoencoderKL`, by hub id or local folder.

    Args:
        source: hub id (`stabilityai/sd-vae-ft-ema`) or a folder that `save_pretrained` wrote, stored as absolute path.
        precision: of its arithmetic; "tf32" is float32 with TF32 convolutions on a GPU.
        slicing: process one image after another, so that a batch needs the memory of one image.
        tiling: process images larger than the VAE was made for in overlapping tiles and blend the seams: approximate.
        remedy: advice for the error message if the VAE is not found.

    Raises:
        ValueError: `source` cannot be loaded or is not a complete AutoencoderKL; the message names it and the remedy.
    """

    def __init__(
        self, source: str, precision: Precision = "tf32", *, slicing: bool = False, tiling: bool = False,
        remedy: str = WHERE_FROM,
    ):
        source = os.path.abspath(source) if Path(source).exists() else source
        vae = _load_vae(source, remedy)
        self._hold(vae, source, precision, _weights_sha256(vae))
        torch.nn.Module.to(vae.eval().requires_grad_(False), torch_dtype(precision))
        vae.use_slicing, vae.use_tiling = slicing, tiling

    @classmethod
    def open(cls, description: dict, **options) -> "VAECodec":
        return cls(description["source"], **options)

    @classmethod
    def of(cls, vae: "AutoencoderKL") -> "VAECodec":
        """Returns the codec of a VAE that the caller loaded and owns; its dtype is whatever it has when used."""
        codec = cls.__new__(cls)
        codec._hold(vae, "its VAE", None, None)
        return codec

    def _hold(self, vae: "AutoencoderKL", source: str, precision: Precision | None, weights: str | None) -> None:
        self.vae, self.source, self.precision, self.weights = vae, source, precision, weights
        self.scale, self.shift = scale_and_shift(vae.config, source)
        self.channels = vae.config.latent_channels
        self.downsample = 2 ** (len(vae.config.block_out_channels) - 1)

    def stored_shape(self, image_size: int) -> tuple[int, int, int]:
        """Returns the shape of posterior mean and log-variance together, (2C, h, w)."""
        channels, height, width = super().stored_shape(image_size)
        return 2 * channels, height, width

    def encode(self, images: Tensor) -> Tensor:
        """Returns posterior mean and log-variance (B, 2C, h, w), unscaled, of images (B, 3, H, W) in [-1, 1]."""
        with torch.no_grad(), self._arithmetic():
            return self.vae.encode(images.to(self.vae.dtype)).latent_dist.parameters.to(images.dtype)

    def latents(
        self, stored: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Returns (posterior draw - shift) * scale, (B, C, h, w), float32, from moments (B, 2C, h, w).

        The draw uses `noise` (B, C, h, w) if it is given, else noise from the generator.
        """
        mean, log_variance = stored.float().chunk(2, dim=1)
        if noise is None:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        draw = mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise
        return (draw - per_channel(self.shift, draw)) * per_channel(self.scale, draw)

    def decode(self, z: Tensor) -> Tensor:
        draw = z / per_channel(self.scale, z) + per_channel(self.shift, z)
        with torch.no_grad(), self._arithmetic():
            return self.vae.decode(draw.to(self.vae.dtype)).sample.to(z.dtype)

    def describe(self) -> dict:
        return {"kind": "autoencoder_kl", "source": self.source, "weights": self.weights, "channels": self.channels,
                "downsample": self.downsample, "scale": self.scale, "shift": self.shift}

    def to(self, device: torch.device | str) -> "VAECodec":
        self.vae.to(device)
        return self

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = before if self.precision is None else self.precision == "tf32"
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = before


CODECS: Table[type[Codec]] = Table("codec", type, {"identity": IdentityCodec, "autoencoder_kl": VAECodec})


def typed_codec(name: str, channels: int) -> dict:
    """Returns the description of the codec that a user names. ValueError: its module cannot be imported.

    Args:
        name: "identity" or another name in CODECS, the path of the user's own class, or the hub id or folder of a VAE.
        channels: of the images, for "identity".
    """
    if name in CODECS:
        return {"kind": name, "channels": channels, "source": name}
    if is_object_path(name):
        return {"kind": import_module_of(name)}
    return {"kind": "autoencoder_kl", "source": name}


def open_codec(
    description: dict, made: str = "the weights were trained", precision: Precision = "tf32", *,
    remedy: str = "Give the folder that it is in now by --vae", **options,
) -> Codec:
    """Returns the codec that `describe()` described.

    Args:
        description: of the codec; `source` is its present place.
        made: what was made with it, for error messages.
        precision, remedy, options: as `VAECodec` takes them.

    Raises:
        ValueError: an unknown kind, or a codec whose weights, scale, shift, ... differ from the description.
    """
    kind = str(description.get("kind"))
    entry = CODECS.find(kind)
    if Codec not in entry.__mro__:
        raise ValueError(f"codec {kind} does not inherit sit_atconv.data.codecs.Codec: see docs/extending.md")
    codec = entry.open(description, precision=precision, remedy=remedy, **options)
    codec.check(description, made)
    return codec


def decode_in_parts(codec: Codec, z: Tensor) -> Tensor:
    """Decodes a few latents at a time, because a decoder needs much memory for each image."""
    return torch.cat([codec.decode(part) for part in z.split(DECODED_AT_ONCE)])


def scale_and_shift(config: Mapping, source: str) -> tuple[float | list[float], float | list[float]]:
    """Returns scale and shift of latents = (draw - shift) * scale, each a number or a list of C numbers.

    Args:
        config: of a diffusers `AutoencoderKL`. With `latents_mean` and `latents_std`, z = (draw - mean) * factor / std.
        source: hub id or folder of the VAE, for the message.

    Raises:
        ValueError: the scaling factor is not a finite number other than 0, or mean or deviation are incomplete.
    """
    factor, shift = config.get("scaling_factor"), config.get("shift_factor") or 0.0
    if not isinstance(factor, int | float) or not math.isfinite(factor) or not factor:
        raise ValueError(f"the VAE {source} has scaling_factor {factor} in its config.json: write the number that "
                         "the VAE was trained with there")
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None and std is None:
        return factor, shift
    if not mean or not std or not len(mean) == len(std) == config["latent_channels"] or shift or 0 in std:
        raise ValueError(f"the VAE {source} has latents_mean {mean}, latents_std {std} and shift_factor {shift} in its "
                         f"config.json: it needs both latents_mean and latents_std with {config['latent_channels']} "
                         "values each, and no shift_factor")
    return [factor / deviation for deviation in std], list(mean)


def per_channel(value: float | list[float], z: Tensor) -> float | Tensor:
    """Returns a number unchanged, and a list as a tensor (C, 1, 1) with the dtype and device of `z`."""
    return torch.tensor(value, dtype=z.dtype, device=z.device)[:, None, None] if isinstance(value, list) else value


def _load_vae(source: str, remedy: str) -> "AutoencoderKL":
    """Loads a VAE in float32, after checking by its config.json that it is an AutoencoderKL of images."""
    from diffusers import AutoencoderKL

    _check_folder(Path(source))
    with _not_loaded(source, remedy):
        options = {} if Path(source).is_dir() else hub_options(source)
        config = AutoencoderKL.load_config(source, **options)
    _check_config(source, config)
    with _not_loaded(source, remedy):
        vae, report = AutoencoderKL.from_pretrained(
            source, torch_dtype=torch.float32, variant=weights_variant(Path(source)), output_loading_info=True,
            ignore_mismatched_sizes=True, **options)
    wrong = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    wrong += [f"{name} has shape {(*there,)}, and its config.json needs {(*here,)}"
              for name, there, here in sorted(report["mismatched_keys"])]
    if wrong:
        more = f", and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise ValueError(f"the weights of the VAE {source} are incomplete: {'; '.join(wrong[:LISTED])}{more}. "
                         "Download or save it again")
    return vae


@contextlib.contextmanager
def _not_loaded(source: str, remedy: str) -> Iterator[None]:
    """Turns the logs, warnings and errors of diffusers into one ValueError with place and remedy."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        if isinstance(error, OSError) and not Path(source).exists() and Path(source).parent.is_dir():
            reason = f"there is no folder {source}, and the hub's cache does not have it; because there is a folder " \
                f"{Path(source).parent} here, nothing is downloaded: to download it, run in another directory"
        raise ValueError(f"no VAE could be loaded from {source!r} ({reason}). {remedy}") from error
    finally:
        logging.disable(disabled)


def _check_folder(folder: Path) -> None:
    """Raises ValueError for a file or a pipeline instead of a VAE's folder."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give the folder of the VAE (config.json and weights)")
    if (folder / "model_index.json").is_file():
        remedy = f"give {folder / 'vae'}" if (folder / "vae").is_dir() else "it has no VAE"
        raise ValueError(f"{folder} is a pipeline, not a VAE: {remedy}")


def _check_config(source: str, config: Mapping) -> None:
    """Raises ValueError if the model is not an AutoencoderKL of RGB images, before its weights are read."""
    if (kind := config.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise ValueError(f"{source} is an {kind}: give the folder or hub id of an AutoencoderKL")
    channels = config.get("in_channels", 3), config.get("out_channels", 3)
    if channels != (3, 3):
        raise ValueError(f"the VAE {source} takes {channels[0]} channels and gives {channels[1]}: images have 3")
    if "scaling_factor" in config:
        scale_and_shift({"latent_channels": 4, **config}, source)


def _weights_sha256(vae: "AutoencoderKL") -> str:
    """Returns a checksum of architecture, names and values, which does not depend on the file format."""
    architecture = ("act_fn", "norm_num_groups", "down_block_types", "layers_per_block", "mid_block_add_attention",
                    "sample_size")
    begin = json.dumps([vae.config.get(key) for key in architecture])
    return sha256_of_state(vae.state_dict(), lambda name, tensor: f"{name}\0", begin)
