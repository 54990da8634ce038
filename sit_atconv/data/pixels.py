"""From image files to pixels and back: reading, ADM's crop, and the one rule by which pixels become uint8."""

import functools
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

UINT8_RULE = "clamp(127.5 * x + 128, 0, 255), truncated"
CROP_RULE = "upright by EXIF, RGB, halved by box filter while twice as large, bicubic, centre (ADM)"
MAX_MEGAPIXELS = 178.0  # Pillow's limit against files that unpack to more than memory holds
NO_IMAGES = {  # formats that Pillow knows but that are not images here
    "BUFR", "GRIB", "HDF5", "MPEG",  # recognised, never decoded
    "EPS", "PDF", "WMF",  # drawings: need another program, or have no pixels of their own
    "FITS", "IPTC",  # measurements and metadata
    "FLI",  # films
}


@functools.cache
def pillow_suffixes() -> frozenset[str]:
    """Returns the suffixes, in small letters, of the image files that the installed Pillow decodes."""
    Image.init()
    decoded = (set(Image.OPEN) | {"MPO"}) - NO_IMAGES  # Pillow opens MPO by way of JPEG
    # .pfm holds floating point numbers (depth, flow), which `to_rgb` refuses
    return frozenset(name for name, kind in Image.registered_extensions().items() if kind in decoded) - {".pfm"}


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 by clamp(127.5 x + 128, 0, 255), truncated: the rule of DiT and SiT."""
    return (127.5 * images.float() + 128.0).clamp(0, 255).to(torch.uint8)


def to_float(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]; `to_uint8` undoes it."""
    return pixels.float() / 127.5 - 1


def to_pil(image: Tensor) -> Image.Image:
    """uint8 (C, H, W), one or three channels -> RGB picture (greyscale repeated)."""
    return Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def center_crop(picture: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop (arXiv 2105.05233): halved by box filter while possible, then bicubic, then cut."""
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def read_image(path: Path, size: int | None, max_megapixels: float = MAX_MEGAPIXELS) -> Tensor:
    """Returns an image file as uint8 (3, H, W). Arguments and errors are those of `read_picture`."""
    return read_picture(path, size, max_megapixels)[0]


def read_picture(
    path: Path, size: int | None, max_megapixels: float = MAX_MEGAPIXELS
) -> tuple[Tensor, tuple[int, int]]:
    """Reads an image file, upright, as RGB.

    Greyscale is repeated, 16 bits become 8, transparency is dropped.

    Args:
        path: the file.
        size: side in pixels of the square that it is cropped to; None takes it whole.
        max_megapixels: size in millions of pixels above which it is refused.

    Returns:
        uint8 (3, H, W), and the (height, width) that the upright picture had before the crop.

    Raises:
        OSError: the file itself cannot be read: there is none, the disk fails, the memory is full; names the file.
        ValueError: what is in it is no image, or half of one, or too large; the message leaves the file's name to the
            caller.
    """
    if not path.is_file() and path.exists():
        raise ValueError("cannot be read as an image: it is no regular file")
    try:
        with Image.open(path) as file:
            picture = to_rgb(ImageOps.exif_transpose(file))
            height, width = picture.height, picture.width
            picture = center_crop(picture, size) if size else picture
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise whatever a damaged file makes them raise
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(f"{path} cannot be read: {error.strerror}") from error
        reason = (str(error) or type(error).__name__).splitlines()[0].replace(f" {str(path)!r}", "")
        raise ValueError(f"cannot be read as an image: {reason}") from error
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous(), (height, width)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any picture of 8 or 16 bits as RGB. ValueError: values that are neither, as in float or 32-bit TIFFs.

    (Pillow's own `convert` cuts 16-bit greyscale off at 255: nearly all of it would be white.)
    """
    if picture.mode.startswith("I"):
        levels = np.array(picture)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"its values reach from {levels.min()} to {levels.max()}, not 0 to 65535")
        picture = Image.fromarray(((levels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("its values are floating point, not 8 or 16 bits")
    return picture.convert("RGB")
