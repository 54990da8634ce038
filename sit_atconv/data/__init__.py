"""Images, their codecs to and from latents, and the deterministic order in which training sees them."""

import re
from pathlib import Path

DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"
MAX_MEGAPIXELS = 179.0  # of an image file that is read: Pillow's limit against files that unpack to more than memory
IDX = "idx:"  # prefix of a folder of IDX files, as images or as a reference
IMAGES_AS = "a folder, .zip or .tar of images, wids:PLACE, hf:NAME, idx:FOLDER or the word digits"


def is_named(source: str) -> bool:
    """True if images are not named by a path alone: "digits", or KIND:PLACE such as "idx:FOLDER"."""
    return source == "digits" or (re.match(r"[a-z]\w+:", source) is not None and not Path(source).exists())


def may_exist(source: str) -> bool:
    """True if a path exists, or is inside a file, such as a folder in an archive."""
    return any(path.is_file() for path in Path(source).parents) or Path(source).exists()
