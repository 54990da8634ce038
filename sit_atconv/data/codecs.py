"""Codecs between pixels and what the model sees; every scale constant lives here.

A codec has `channels` and `downsample` and four verbs:

    encode(images) -> stored                what is worth caching (VAE: posterior moments; identity: the pixels)
    latents(stored, generator) -> z         what the model is trained on
    decode(z) -> images                     back to pixels in [-1, 1]
    describe() -> dict                      for recipes and mismatch errors; `open_codec` reads it back
"""

import contextlib
import logging

import torch
from torch import Tensor


class _Codec:
    """What all codecs share."""

    def latent_size(self, image_size: int) -> int:
        """Side of the latent grid for images of this side. ValueError: not divisible by the downsampling."""
        if image_size % self.downsample:
            raise ValueError(f"image size {image_size} is not divisible by the codec's downsampling {self.downsample}")
        return image_size // self.downsample


class IdentityCodec(_Codec):
    """Pixel space: the model sees the images themselves."""

    downsample = 1

    def __init__(self, channels: int):
        self.channels = channels

    def encode(self, images: Tensor) -> Tensor:
        return images

    def latents(self, stored: Tensor, generator: torch.Generator | None = None) -> Tensor:
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

    Raises:
        ValueError: nothing there can be loaded; the message names `source` and the remedy.
    """

    def __init__(self, source: str):
        from diffusers import AutoencoderKL

        self.source = source
        try:
            with _quiet("diffusers"):
                self.vae = AutoencoderKL.from_pretrained(source).eval().requires_grad_(False)
        except Exception as error:  # diffusers raises a dozen types; the user needs the place and the remedy
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"no VAE could be loaded from {source!r} ({reason}). Give the path of a downloaded AutoencoderKL "
                "folder (config.json and weights), or connect to the network once so that the hub id is cached."
            ) from error
        config = self.vae.config
        self.channels = config.latent_channels
        self.downsample = 2 ** (len(config.block_out_channels) - 1)
        self.scale = config.scaling_factor
        self.shift = config.get("shift_factor") or 0.0

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> posterior mean and log-variance (B, 2C, h, w), unscaled."""
        with torch.no_grad():
            return self.vae.encode(images.to(self.vae.dtype)).latent_dist.parameters.to(images.dtype)

    def latents(self, stored: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Moments (B, 2C, h, w) -> a posterior draw, minus shift, times scale (B, C, h, w)."""
        mean, log_variance = stored.chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        draw = mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise
        return (draw - self.shift) * self.scale

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) in [-1, 1]."""
        with torch.no_grad():
            return self.vae.decode((z / self.scale + self.shift).to(self.vae.dtype)).sample.to(z.dtype)

    def describe(self) -> dict:
        return {
            "kind": "autoencoder_kl",
            "source": self.source,
            "channels": self.channels,
            "downsample": self.downsample,
            "scale": self.scale,
            "shift": self.shift,
        }

    def to(self, device: torch.device | str) -> "VAECodec":
        self.vae = self.vae.to(device)
        return self


Codec = IdentityCodec | VAECodec


def open_codec(description: dict) -> Codec:
    """What `describe()` returned -> the codec.

    Raises:
        ValueError: an unknown kind, or a VAE whose scale, shift, channels or downsampling are not those described.
    """
    kind = description.get("kind")
    if kind == "identity":
        return IdentityCodec(description["channels"])
    if kind != "autoencoder_kl":
        raise ValueError(f"codec kind must be 'identity' or 'autoencoder_kl', not {kind!r}")
    codec = VAECodec(description["source"])
    for key, value in codec.describe().items():
        if key in description and description[key] != value:
            recorded = description[key]
            raise ValueError(f"the VAE {codec.source} has {key} {value}, but the weights were trained with {recorded}")
    return codec


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
