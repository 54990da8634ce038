"""The contract of data sources: digits, folders of images, cached latents, and those of users."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor


class DataSource(Protocol):
    """A data set that a model is trained on, indexed by (image, mirrored) as `order.py` draws them.

    A source of your own inherits this class and defines at least `class_names`, `labels`, `image_size`, `__len__` and
    `__getitem__`. Give its path, `my_module.MySource`, to `--data.images`.

    Attributes:
        class_names: names of labels 0, 1, ...
        labels: labels of all images, int64 (N,).
        image_size: side of the images in pixels.
        channels: of the images: 3 or 1.
        is_encoded: True if it yields results of `Codec.encode` instead of pixels.
    """

    class_names: Sequence[str]
    labels: np.ndarray
    image_size: int
    channels: int = 3
    is_encoded: bool = False

    @classmethod
    def open(cls, name: str, **options) -> "DataSource":
        """Returns the source that a run asks for; by default this class without arguments.

        Args:
            name: value of `--data.images` or `--data.latents`, such as a folder.
            options: `image_size`, `mirror`, `keep_empty_classes` and `max_megapixels` of `DataConfig`, and `rules`, the
                number of the rules by which an existing run reads a folder.
        """
        return cls()

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of images."""

    @abstractmethod
    def __getitem__(self, item: tuple[int, bool]) -> tuple[Tensor, int]:
        """Returns the image of item (index, mirrored), flipped if `mirrored`, uint8 (C, H, W), and its label.

        Raises:
            ValueError: the image cannot be read; the message names it. `--data.skip_unreadable` leaves it out.
        """

    def describe(self) -> dict:
        """Returns JSON values that identify the data, such as a checksum; a run resumes only with equal ones."""
        return {"kind": f"{type(self).__module__}.{type(self).__qualname__}", "images": len(self)}

    @property
    def class_counts(self) -> list[int]:
        """Number of images of each class."""
        return np.bincount(self.labels, minlength=len(self.class_names)).tolist()

    @property
    def codec(self) -> dict:
        """Description of the codec to use if the user names none."""
        return {"kind": "identity", "channels": self.channels}

    def name(self, index: int) -> str:
        """Returns the name of an image, the same each time the source is opened."""
        return f"image {index}"

    def find(self, names: Iterable[str]) -> np.ndarray:
        """Returns the indices of the images of these names."""
        wanted = set(names)
        return np.array([i for i in range(len(self)) if self.name(i) in wanted], dtype=np.int64)
