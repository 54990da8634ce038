"""Codecs between pixels and what the model sees; every scale constant lives here.

A codec has `channels` and `downsample` and four verbs:

    encode(images) -> stored                what is worth caching (VAE: posterior moments; identity: the pixels)
    latents(stored, generator) -> z         what the model is trained on
    decode(z) -> images                     back to pixels in [-1, 1]
    describe() -> dict                      for recipes and mismatch errors; `open_codec` reads it back
"""

import contextlib
import hashlib
import json
import logging
from typing import Literal

import torch
from torch import Tensor

DECODED_AT_ONCE = 16
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Codec:
    """What all codecs share."""

    def latent_size(self, image_size: int) -> int:
        """Side of the latent grid for images of this side. ValueError: not divisible by the downsampling."""
        if image_size % self.downsample:
            raise ValueError(f"image size {image_size} is not divisible by the codec's downsampling {self.downsample}")
        return image_size // self.downsample

    def identity(self) -> dict:
        """`describe()` but for where the codec lies."""
        return {key: value for key, value in self.describe().items() if key != "source"}

    def check(self, description: dict, made: str) -> None:
        """Raises ValueError where this is not the codec described, by its weights, scale, shift, ...

        Args:
            description: what `describe()` once returned; where that codec lay does not matter.
            made: what was made with that one, for the message: "the weights were trained".
        """
        for key, value in self.identity().items():
            if key in description and description[key] != value:
                here, there = (str(x)[:12] for x in (value, description[key]))  # enough of a checksum
                name = getattr(self, "source", "identity")
                raise ValueError(f"the codec {name} has {key} {here}, but {made} with {there}")


class IdentityCodec(_Codec):
    """Pixel space: the model sees the images themselves."""

    downsample = 1

    def __init__(self, channels: int):
        self.channels = channels

    def encode(self, images: Tensor) -> Tensor:
        return images

    def latents(
        self, stored: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        return stored

    def decode(self, z: Tensor) -> Tensor:
        return z

    def describe(self) -> dict:
        return {"kind": "identity", "channels": self.channels, "downsample": 1}

    def to(self, device: torch.device | str) -> "IdentityCodec":
        return self


class VAECodec(_Codec):
    """Any diffusers `AutoencoderKL`, by hub id or local folder.

    Args:
        source: hub id (`stabilityai/sd-vae-ft-ema`) or a folder that `save_pretrained` wrote.
        precision: of its arithmetic; "tf32" is float32 but for a GPU's convolutions, which PyTorch does in TF32 too.
        slicing: one image after another: the memory of one, whatever the batch.
        tiling: images larger than the VAE was made for in overlapping tiles, blended at the seams: approximate.

    Raises:
        ValueError: nothing there can be loaded; the message names `source` and the remedy.
    """

    def __init__(self, source: str, precision: Precision = "tf32", *, slicing: bool = False, tiling: bool = False):
        from diffusers import AutoencoderKL

        self.source = source
        try:
            with _quiet("diffusers"):
                self.vae = AutoencoderKL.from_pretrained(source, torch_dtype=torch.float32)
            self.weights = _weights_sha256(self.vae)
            torch.nn.Module.to(self.vae.eval().requires_grad_(False), DTYPES[precision])
        except Exception as error:  # diffusers raises a dozen types; the user needs the place and the remedy
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"no VAE could be loaded from {source!r} ({reason}). Give the path of a downloaded AutoencoderKL "
                "folder (config.json and weights), or connect to the network once so that the hub id is cached."
            ) from error
        self.precision, self.dtype, self.device = precision, DTYPES[precision], torch.device("cpu")
        self.vae.use_slicing, self.vae.use_tiling = slicing, tiling
        config = self.vae.config
        if (config.in_channels, config.out_channels) != (3, 3):
            raise ValueError(f"the VAE {source} takes {config.in_channels} channels and gives {config.out_channels}: "
                             "images have 3")
        self.channels = config.latent_channels
        self.downsample = 2 ** (len(config.block_out_channels) - 1)
        self.scale = config.scaling_factor
        self.shift = config.get("shift_factor") or 0.0

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> posterior mean and log-variance (B, 2C, h, w), unscaled."""
        with torch.no_grad(), self._arithmetic():
            return self.vae.encode(images.to(self.dtype)).latent_dist.parameters.to(images.dtype)

    def latents(
        self, stored: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Moments (B, 2C, h, w) -> a posterior draw, minus shift, times scale (B, C, h, w), float32.

        The draw is made with `noise` (B, C, h, w) where it is given, else with the generator's.
        """
        mean, log_variance = stored.float().chunk(2, dim=1)
        if noise is None:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        draw = mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise
        return (draw - self.shift) * self.scale

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) in [-1, 1]."""
        with torch.no_grad(), self._arithmetic():
            return self.vae.decode((z / self.scale + self.shift).to(self.dtype)).sample.to(z.dtype)

    def describe(self) -> dict:
        return {
            "kind": "autoencoder_kl",
            "source": self.source,
            "weights": self.weights,
            "channels": self.channels,
            "downsample": self.downsample,
            "scale": self.scale,
            "shift": self.shift,
        }

    def to(self, device: torch.device | str) -> "VAECodec":
        self.vae, self.device = self.vae.to(device), torch.device(device)
        return self

    @contextlib.contextmanager
    def _arithmetic(self):
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = self.precision == "tf32"
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = before


Codec = IdentityCodec | VAECodec


def decode_in_parts(codec: Codec, z: Tensor) -> Tensor:
    """`codec.decode` of a few at a time: a decoder needs much memory for each image of a batch."""
    return torch.cat([codec.decode(part) for part in z.split(DECODED_AT_ONCE)])


def open_codec(description: dict, made: str = "the weights were trained", precision: Precision = "tf32") -> Codec:
    """What `describe()` returned -> the codec.

    Args:
        description: of the codec; `source` is where it lies now.
        made: what was made with it, for the message of an error.
        precision: of a VAE's arithmetic.

    Raises:
        ValueError: an unknown kind, or a VAE whose weights, scale, shift, ... are not those described.
    """
    kind = description.get("kind")
    if kind == "identity":
        return IdentityCodec(description["channels"])
    if kind != "autoencoder_kl":
        raise ValueError(f"codec kind must be 'identity' or 'autoencoder_kl', not {kind!r}")
    codec = VAECodec(description["source"], precision)
    codec.check(description, made)
    return codec


def _weights_sha256(vae) -> str:
    """Of architecture, names and values: the same for the same VAE, whatever file it came from."""
    architecture = ("act_fn", "norm_num_groups", "down_block_types", "layers_per_block", "mid_block_add_attention",
                    "sample_size")
    digest = hashlib.sha256(json.dumps([vae.config.get(key) for key in architecture]).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode() + b"\0")
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet(name: str):
    """Keeps a library's own log lines off the terminal while we turn its failure into our message."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
