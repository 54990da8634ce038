"""Pixels of image files: reading, ADM's crop, and the rule for conversion to uint8."""

import contextlib
import io
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sit_atconv.data import MAX_MEGAPIXELS

UINT8_RULE = "clamp(127.5 * x + 128, 0, 255), truncated"
CROP_RULE = "upright by EXIF, RGB, halved by box filter while twice as large, bicubic, centre (ADM)"
JPEG_QUALITY = 95  # of crops beside latents, with colours at full resolution
Colour = tuple[int, int, int]  # red, green, blue, 0 ... 255
LONG = 16  # pictures with a larger aspect ratio are cropped before they are enlarged
WEIGHT_BITS = 22  # precision of the fixed-point weights in Pillow's resize
_readers, _num_readers, _pillows_limit = threading.Lock(), 0, None


def to_uint8(images: Tensor) -> Tensor:
    """Converts [-1, 1] to uint8 by clamp(127.5 x + 128, 0, 255), truncated: the rule of DiT and SiT."""
    return (127.5 * images.float() + 128.0).clamp(0, 255).to(torch.uint8)


def to_float(pixels: Tensor) -> Tensor:
    """Converts uint8 to float32 in [-1, 1]; `to_uint8` inverts it."""
    return pixels.float() / 127.5 - 1


def to_pil(image: Tensor) -> Image.Image:
    """Converts uint8 (1 or 3, H, W) to an RGB picture; greyscale is repeated."""
    return Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def encode_jpegs(images: Tensor) -> dict[str, Tensor]:
    """Returns images, uint8 (n, 3, H, W), as JPEG files in a row, and the end (n,) of each."""
    files = list[bytes]()
    for image in images:
        content = io.BytesIO()
        to_pil(image).save(content, "jpeg", quality=JPEG_QUALITY, subsampling=0)
        files.append(content.getvalue())
    ends = torch.tensor([len(file) for file in files], dtype=torch.int64).cumsum(0)
    return {"jpegs": torch.from_numpy(np.frombuffer(b"".join(files), np.uint8).copy()), "jpeg_ends": ends}


def decode_jpeg(content: Tensor) -> Tensor:
    """Returns the picture, uint8 (3, H, W), of the bytes of a JPEG file."""
    with Image.open(io.BytesIO(content.numpy().tobytes())) as picture:
        return torch.from_numpy(np.array(picture).transpose(2, 0, 1).copy())


def center_crop(picture: Image.Image, size: int) -> Image.Image:
    """Applies ADM's centre crop (arXiv 2105.05233): halving by box filter, then bicubic, then cut.

    A long and narrow picture is cut before it is enlarged, which bounds memory and gives the same pixels.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    if scale > 1 and max(width, height) > LONG * size:
        columns = _bicubic_taps(picture.width, width, left, size)
        rows = _bicubic_taps(picture.height, height, top, size)
        return _enlarged_part(picture, columns, rows)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return picture.crop((left, top, left + size, top + size))


def _enlarged_part(
    picture: Image.Image, columns: tuple[np.ndarray, np.ndarray], rows: tuple[np.ndarray, np.ndarray]
) -> Image.Image:
    """Returns the part of an enlarged RGB picture whose columns and rows have these taps and weights.

    Equals Pillow's bicubic `resize` followed by `crop` bit for bit, without computing the rest of the enlarged picture:
    horizontal, then vertical interpolation, each rounded to 8 bits.
    """
    (x, across), (y, down) = columns, rows
    pixels = np.asarray(picture.crop((x.min(), y.min(), x.max() + 1, y.max() + 1)))  # (H, W, 3)
    pixels = _weighted(pixels.swapaxes(0, 1), x - x.min(), across).swapaxes(0, 1)
    return Image.fromarray(_weighted(pixels, y - y.min(), down))


def _bicubic_taps(length: int, enlarged: int, start: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the five source pixels of each of `size` enlarged pixels, and their weights, both (size, 5).

    A side of `length` pixels is enlarged to `enlarged` pixels; `start` is the first enlarged pixel that is wanted.
    """
    center = ((np.arange(start, start + size) + 0.5) * (length / enlarged))[:, None]
    first, end = np.maximum(np.trunc(center - 2 + 0.5), 0), np.minimum(np.trunc(center + 2 + 0.5), length)
    taps = first + np.arange(5)  # (size, 5)
    x = np.abs(taps - center + 0.5)
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5  # Keys' kernel, a = -0.5
    weights = np.where(x < 1, near, np.where(x < 2, far, 0)) * (taps < end)
    weights /= weights.sum(1, keepdims=True)
    weights = np.trunc(weights * 2**WEIGHT_BITS + np.copysign(0.5, weights))
    return np.minimum(taps, length - 1).astype(np.int64), weights.astype(np.int32)


def _weighted(pixels: np.ndarray, taps: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the weighted sums of pixels (N, M, 3) along the first axis, uint8 (size, M, 3)."""
    sums = sum(pixels[index] * weight[:, None, None] for index, weight in zip(taps.T, weights.T, strict=True))
    return ((sums + 2 ** (WEIGHT_BITS - 1)) >> WEIGHT_BITS).clip(0, 255).astype(np.uint8)


def read_image(
    file: Path | BinaryIO,
    size: int | None,
    max_megapixels: float = MAX_MEGAPIXELS,
    background: Colour | None = None,
) -> Tensor:
    """Reads an image file as uint8 (3, H, W). Arguments and errors are those of `read_picture`."""
    return read_picture(file, size, max_megapixels, background)[0]


def read_picture(
    file: Path | BinaryIO,
    size: int | None,
    max_megapixels: float = MAX_MEGAPIXELS,
    background: Colour | None = None,
) -> tuple[Tensor, tuple[int, int]]:
    """Reads an image file as RGB, turned upright by its EXIF data.

    Greyscale is repeated, 16 bits become 8, transparent pixels get the colour that they hold, or the background.

    Args:
        file: its path, or the open file.
        size: side in pixels of the centre crop; None for the whole picture.
        max_megapixels: largest picture that is read, in millions of pixels.
        background: colour that transparent pixels are composited on, or None.

    Returns:
        uint8 (3, H, W), and the (height, width) of the upright picture before the crop.

    Raises:
        OSError: the file is missing, the disk fails or the memory is full; names the file.
        ValueError: the file's content is not an image, truncated, or too large; the caller adds the file's name.
    """
    if isinstance(file, Path) and not file.is_file() and file.exists():
        raise ValueError("cannot be read as an image: it is not a regular file")
    try:
        with _without_pillows_limit(), Image.open(file) as opened:
            if (megapixels := opened.width * opened.height / 1e6) > max_megapixels:
                raise ValueError(
                    f"it has {math.ceil(10 * megapixels) / 10:g} megapixels, more than --max-megapixels "
                    f"{max_megapixels:g} allows (training: --data.max_megapixels)"
                )
            picture = ImageOps.exif_transpose(opened)
            alpha = _alpha(picture) if background is not None else None
            picture = to_rgb(picture)
            if alpha is not None and background is not None:
                picture = Image.composite(picture, Image.new("RGB", picture.size, background), alpha)
            size_before = picture.height, picture.width
            pixels = np.array(center_crop(picture, size) if size else picture)
            return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), size_before
    except MemoryError as error:  # an OSError, since the file may be readable the next time
        raise OSError(f"{file} cannot be read: out of memory (use fewer workers, or remove the file)") from error
    except Exception as error:  # Pillow's readers raise many types for damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(f"{file} cannot be read: {error.strerror}") from error
        shown = str(file) if isinstance(file, Path) else file  # as Pillow shows it
        reason = (str(error) or type(error).__name__).splitlines()[0].replace(f" {shown!r}", "")
        raise ValueError(f"cannot be read as an image: {reason}") from error


def _alpha(picture: Image.Image) -> Image.Image | None:
    """Returns the opacity of each pixel, or None if all are opaque."""
    if not picture.has_transparency_data:
        return None
    if picture.mode.startswith("I"):  # 16 bits of grey, one of which is transparent
        return Image.fromarray(np.where(np.array(picture) == picture.info["transparency"], 0, 255).astype(np.uint8))
    return picture.convert("RGBA").getchannel("A")


def has_transparency(file: Path | BinaryIO) -> bool:
    """True if any pixel of an image file is not opaque; False also if it cannot be read."""
    try:
        with _without_pillows_limit(), Image.open(file) as opened:
            alpha = _alpha(opened)
            return alpha is not None and int(np.array(alpha).min()) < 255
    except Exception:  # Pillow's readers raise many types
        return False


@contextlib.contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """Removes Pillow's limit on pixels while any thread reads, since `max_megapixels` replaces it.

    The limit is global, and other code may rely on it, so it is restored afterwards.
    """
    global _num_readers, _pillows_limit
    with _readers:
        if _num_readers == 0:
            _pillows_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _num_readers += 1
    try:
        yield
    finally:
        with _readers:
            _num_readers -= 1
            if _num_readers == 0:
                Image.MAX_IMAGE_PIXELS = _pillows_limit


def to_rgb(picture: Image.Image) -> Image.Image:
    """Converts any 8- or 16-bit picture to RGB. ValueError: other values, as in float or 32-bit TIFFs.

    (Pillow's `convert` clips 16-bit greyscale at 255, so that nearly all of it would be white.)
    """
    if picture.mode.startswith("I"):
        levels = np.array(picture)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"its values range from {levels.min()} to {levels.max()}, not from 0 to 65535")
        picture = Image.fromarray(((levels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("its values are floating point, not 8 or 16 bits")
    return picture.convert("RGB")
