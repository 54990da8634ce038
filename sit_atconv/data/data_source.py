"""The interface of data sources: embedded digits, image folders, cached latents and users' own."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor


class DataSource(Protocol):
    """Data set that a model is trained on, indexed by (image, mirrored) as `BatchOrder` draws them.

    Your own source inherits this class and defines at least `class_names`, `labels`, `image_size`, `__len__` and
    `__getitem__`. Pass its path, `my_module.MySource`, to `--data.images`.

    Attributes:
        class_names: names of labels 0, 1, ...
        labels: labels of all images, int64 (N,).
        image_size: side of the images in pixels.
        channels: channels of the images, 3 or 1.
        is_encoded: True if the source yields the output of `Codec.encode` instead of pixels.
        features: description of the encoder's features that the source holds beside latents, or None.
        has_pixels: True if `read_pixels` works; sources of images have them in any case.
        takes_place: True if it is named NAME:PLACE, as in idx:FOLDER, and not by its name alone.
    """

    class_names: Sequence[str]
    labels: np.ndarray
    image_size: int
    channels: int = 3
    is_encoded: bool = False
    features: dict | None = None
    has_pixels: bool = False
    takes_place: bool = False

    @classmethod
    def open(
        cls,
        name: str,
        *,
        image_size: int | None,
        mirror: bool,
        rules: int | None,
        keep_empty_classes: bool,
        max_megapixels: float,
    ) -> "DataSource":
        """Returns the source for a run; by default, calls this class without arguments.

        Your own source may name the arguments that it needs and take the others as `**options`.

        Args:
            name: the value of `--data.images` or `--data.latents`, such as a folder.
            image_size, mirror, keep_empty_classes, max_megapixels: as in `DataConfig`.
            rules: number of the rules by which an existing run reads its image folder; None for a new run.
        """
        return cls()

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of images."""

    @abstractmethod
    def __getitem__(self, item: tuple[int, bool]) -> tuple[Tensor, int]:
        """Returns an image, flipped horizontally if `mirrored`, and its label.

        Pixels are uint8 (C, H, W), a quarter of the size of floats. ValueError: the image cannot be read; the message
        names it. `--data.skip_unreadable` skips such images.
        """

    def read_pixels(self, item: tuple[int, bool]) -> Tensor:
        """Returns the image, uint8 (3, S, S), of latents, flipped horizontally if `mirrored`."""
        raise ValueError(f"{type(self).__name__} holds no pixels beside its latents")

    def read_features(self, item: tuple[int, bool]) -> Tensor:
        """Returns the encoder's tokens (N, width) of an image, or of the flipped one if `mirrored`."""
        raise ValueError(f"{type(self).__name__} holds no features")

    def describe(self) -> dict:
        """Returns what must be unchanged for a run to resume, except the place: JSON, such as a checksum."""
        return {"kind": f"{type(self).__module__}.{type(self).__qualname__}", "images": len(self)}

    @property
    def class_counts(self) -> list[int]:
        """Number of images of each class."""
        return np.bincount(self.labels, minlength=len(self.class_names)).tolist()

    @property
    def codec(self) -> dict:
        """Description of the codec that is used if the user names none."""
        return {"kind": "identity", "channels": self.channels}

    def name(self, index: int) -> str:
        """Returns the name of an image, which is the same whenever the source is opened."""
        return f"image {index}"

    def find(self, names: Iterable[str]) -> np.ndarray:
        """Returns the indices of the images with these names."""
        wanted = set(names)
        return np.array([i for i in range(len(self)) if self.name(i) in wanted], dtype=np.int64)


class InMemory(DataSource):
    """Data source whose images are all in memory: `images` is uint8 (N, C, H, W)."""

    images: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, bool]) -> tuple[Tensor, int]:
        index, mirrored = item
        image = self.images[index]
        return image.flip(-1) if mirrored else image, int(self.labels[index])
