"""Images, their codecs to and from latents, and the deterministic order in which training sees them."""

DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"
MAX_MEGAPIXELS = 179.0  # of an image file that is read: Pillow's limit against files that unpack to more than memory
IDX = "idx:"  # prefix of a folder of IDX files, as images or as a reference


IMAGES_AS = "a folder, .zip or .tar of images, wids:PLACE, hf:NAME, idx:FOLDER or the word digits"


def is_named(source: str) -> bool:
    """True if images are not named by a path alone: "digits", "idx:FOLDER", "wids:PLACE" or "hf:NAME"."""
    return source == "digits" or source.startswith((IDX, "wids:", "hf:"))
