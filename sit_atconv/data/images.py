"""Data sets of images: the embedded digits, and folders with one subfolder for each class.

Every data set yields (image, label): float32 (C, H, W) in [-1, 1] and an int, and has `class_names`, `channels` and
`image_size`. Pixels become uint8 and back in one place, here.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 by clamp(127.5 x + 128, 0, 255), truncated: the rule of DiT and SiT."""
    return (127.5 * images.float() + 128.0).clamp(0, 255).to(torch.uint8)


UINT8_RULE = "clamp(127.5 * x + 128, 0, 255), truncated"


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


def find_images(folder: str | Path) -> list[Path]:
    """All image files below a folder, sorted by path. ValueError: there is no such folder, or no image in it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not paths:
        raise ValueError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return paths


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's bundled handwritten digits: uint8 images (1797, 8, 8) and labels (1797,)."""
    from sklearn.datasets import load_digits as load

    pixels, labels = load(return_X_y=True)  # grey levels 0 ... 16
    images = to_uint8(torch.from_numpy(pixels / 8 - 1)).numpy()
    return images.reshape(-1, 8, 8), labels.astype(np.int64)


class Digits(Dataset):
    """The embedded data set: 1,797 real 8x8 greyscale images of ten classes, no download."""

    class_names = tuple("0123456789")
    channels = 1
    image_size = 8

    def __init__(self):
        images, self.labels = load_digits()
        self.images = (torch.from_numpy(images).float() - 127.5) / 127.5

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index][None], int(self.labels[index])


class ImageFolder(Dataset):
    """Images in one subfolder for each class, or all in one class when there are no subfolders.

    Args:
        folder: where the images lie.
        image_size: side in pixels after ADM's centre crop.

    Raises:
        ValueError: no such folder, no images, or images both beside and inside subfolders.
    """

    channels = 3

    def __init__(self, folder: str | Path, image_size: int):
        self.paths = find_images(folder)
        self.image_size = image_size
        top = [path.relative_to(folder).parts[:-1][:1] for path in self.paths]
        if len({bool(parts) for parts in top}) == 2:
            stray = next(path for path, parts in zip(self.paths, top, strict=True) if not parts)
            raise ValueError(f"{stray} lies beside class folders: move it into one of them")
        self.class_names = tuple(sorted({parts[0] for parts in top if parts})) or ("images",)
        index = {name: label for label, name in enumerate(self.class_names)}
        self.labels = [index[parts[0]] if parts else 0 for parts in top]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            with Image.open(self.paths[index]) as file:
                picture = center_crop(ImageOps.exif_transpose(file).convert("RGB"), self.image_size)
        except OSError as error:
            raise ValueError(f"{self.paths[index]} cannot be read as an image: {error}") from error
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return pixels.float() / 127.5 - 1, self.labels[index]


@dataclass(frozen=True)
class DataConfig:
    """What the model is trained on.

    Args:
        images: "digits" (embedded, 8x8) or a folder with one subfolder of images for each class.
        image_size: side in pixels of the images of a folder, after a centre crop.
        codec: "identity" (pixel space), or the hub id or folder of a diffusers AutoencoderKL.
        mirror: flip every other image at random, left to right.
        num_workers: processes that load images, for each training process.
    """

    images: str = "digits"
    image_size: int = 256
    codec: str = "identity"
    mirror: bool = False
    num_workers: int = 0

    def open_images(self) -> Digits | ImageFolder:
        """Raises ValueError for a folder without images."""
        return Digits() if self.images == "digits" else ImageFolder(self.images, self.image_size)
