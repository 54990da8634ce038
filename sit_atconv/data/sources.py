"""What a model is trained on: the embedded digits, a folder of images, or cached latents."""

from dataclasses import dataclass

from sit_atconv.data import DEFAULT_VAE
from sit_atconv.data.codecs import Codec, IdentityCodec, Precision, VAECodec, open_codec
from sit_atconv.data.images import Digits, ImageFolder
from sit_atconv.data.latents import CachedLatents


@dataclass(frozen=True)
class DataConfig:
    """What the model is trained on.

    Args:
        images: "digits" (embedded, 8x8), or a folder of images: labels from its dataset.json or its subfolders.
        latents: a folder that encode.py wrote, instead of images; its index knows size, classes and VAE.
        image_size: side in pixels after a centre crop. Not given, it is what the latents have, or 256.
        codec: the hub id or folder of a diffusers AutoencoderKL, or "identity" for pixel space. Not given, it is
            the VAE that made the latents, stabilityai/sd-vae-ft-ema for a folder of images, "identity" for digits.
        codec_precision: of the VAE's arithmetic.
        mirror: take the mirror image every other time, at random.
        num_workers: processes that load images, for each training process.
        held_out: images that are never trained on; their loss, at fixed noise and times, compares models.
    """

    images: str = "digits"
    latents: str | None = None
    image_size: int | None = None
    codec: str | None = None
    codec_precision: Precision = "tf32"
    mirror: bool = False
    num_workers: int = 0
    held_out: int = 0

    def __post_init__(self):
        for name in ("num_workers", "held_out"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name} must not be negative: {getattr(self, name)}")

    def open(self) -> tuple[Digits | ImageFolder | CachedLatents, Codec]:
        """The data set, and the codec whose latents the model sees.

        Raises:
            ValueError: no images or latents there, no codec, or another one, or another size, than the latents have.
        """
        if self.latents is not None:
            if self.images != "digits":
                raise ValueError(f"data.images {self.images} and data.latents {self.latents}: give one of them")
            if self.codec == "identity":
                raise ValueError(f"data.codec identity is pixel space, and {self.latents} holds a VAE's latents")
            latents = CachedLatents(self.latents, self.mirror)
            if self.image_size not in (None, latents.image_size):
                raise ValueError(f"data.image_size is {self.image_size}, but {self.latents} was encoded at "
                                 f"{latents.image_size}: encode the images at {self.image_size}, or leave it out")
            description = latents.codec | {"source": self.codec or latents.codec["source"]}
            return latents, open_codec(description, f"{self.latents} was encoded", self.codec_precision,
                                       remedy=f"--data.codec says where the VAE of {self.latents} is now")
        if self.images == "digits":
            images, default = Digits(), "identity"
        else:
            images, default = ImageFolder(self.images, self.image_size or 256), DEFAULT_VAE
        if (codec := self.codec or default) == "identity":
            return images, IdentityCodec(images.channels)
        return images, VAECodec(codec, self.codec_precision)


def describe_data(data: Digits | ImageFolder | CachedLatents, codec: Codec) -> dict:
    """What a run must find again to resume exactly, wherever it lies by then."""
    return data.describe() | {"classes": len(data.class_names), "codec": codec.identity()}
