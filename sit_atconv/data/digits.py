"""Data source of scikit-learn's handwritten digits."""

import numpy as np
import torch

from sit_atconv.data.data_source import InMemory
from sit_atconv.data.pixels import to_uint8


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns scikit-learn's bundled handwritten digits: uint8 images (1797, 8, 8) and labels (1797,)."""
    from sklearn.datasets import load_digits as load

    pixels, labels = load(return_X_y=True)  # grey levels 0 ... 16
    images = to_uint8(torch.from_numpy(pixels / 8 - 1)).numpy()
    return images.reshape(-1, 8, 8), labels.astype(np.int64)


class Digits(InMemory):
    """Embedded data set: 1,797 real 8x8 greyscale images of ten classes, no download."""

    class_names = tuple("0123456789")
    channels = 1
    image_size = 8

    def __init__(self):
        images, self.labels = load_digits()
        self.images = torch.from_numpy(images)[:, None]

    def describe(self) -> dict:
        return {"kind": "digits", "images": len(self)}
