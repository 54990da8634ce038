"""Batches of augmented images: their order, repeated augmentation, and a seed for each draw."""

import itertools
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from sit_atconv.classification.image_sets import ImageSet
from sit_atconv.classification.streams import AUGMENTATION, stream_seed
from sit_atconv.data.loading import leave_ctrl_c_to_the_parent, read_ahead
from sit_atconv.data.order import BatchOrder

Transform = Callable[[Image.Image], Tensor]


class Examples(NamedTuple):
    """Images x (B, C, H, W), normalised, and their labels y (B,)."""

    x: Tensor
    y: Tensor

    def to(self, device: torch.device) -> "Examples":
        return Examples(self.x.to(device, non_blocking=True), self.y.to(device, non_blocking=True))


class RepeatedOrder(BatchOrder):
    """Order of draws with repeated augmentation, as lists of (step, position in the batch, index).

    Each epoch draws every image of a permutation `repeats` times in a row, and ends after as many draws as there are
    images. The draws of a batch are dealt to its groups in turn, so that those of one image are in different groups.

    Args:
        num_images: size of the data set.
        batch_size: images in one step.
        repeats: draws of each image.
        group_size: images in one group, which divides `batch_size`.
        options: other options of `BatchOrder`.
    """

    def __init__(self, num_images: int, batch_size: int, *, repeats: int, group_size: int, **options):
        super().__init__(num_images, batch_size, **options)
        self.repeats, self.group_size = repeats, group_size
        self._epoch, self._draws = -1, np.empty(0)  # the last permutation

    def permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            needed = -(-self.num_images // self.repeats)
            self._draws = np.repeat(super().permutation(epoch)[:needed], self.repeats)[: self.num_images]
            self._epoch = epoch
        return self._draws

    def batch(self, step: int) -> list[int]:
        """Returns the indices of all images of a step, group after group."""
        return np.array(super().batch(step)).reshape(self.group_size, -1).T.flatten().tolist()

    def __iter__(self) -> Iterator[list]:
        for step in itertools.count(self.first_step):
            draws = [(step, position, index) for position, index in enumerate(self.batch(step))]
            for micro_batch in range(self.accumulation):
                yield draws[self.rows(micro_batch)]


class AugmentedReader(Dataset):
    """Reader of micro-batches; every draw has a seed of its own, whoever reads it."""

    def __init__(self, images: ImageSet, transform: Transform, seed: int):
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, draws: Sequence[tuple[int, int, int]]) -> Examples:
        samples = []
        for step, position, index in draws:
            image, label = self.images.read(index)
            seed = stream_seed(AUGMENTATION, self.seed, step, position)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002  # timm draws from it
            torch.default_generator.manual_seed(seed)
            samples.append((self.transform(image), label))
        return _collate(samples)


class PlainReader(Dataset):
    """Reader of batches for evaluation."""

    def __init__(self, images: ImageSet, transform: Transform):
        self.images, self.transform = images, transform

    def __getitem__(self, indices: Sequence[int]) -> Examples:
        read = [self.images.read(index) for index in indices]
        return _collate([(self.transform(image), label) for image, label in read])


def _collate(samples: Sequence[tuple[Tensor, int]]) -> Examples:
    return Examples(torch.stack([x for x, _ in samples]), torch.tensor([label for _, label in samples]))


def evaluation_batches(
    images: ImageSet,
    transform: Transform,
    batch_size: int,
    *,
    num_workers: int,
    device: torch.device,
    rank: int,
    num_processes: int,
) -> Generator[Examples, None, None]:
    """Yields the images of this process once, each image on one process."""
    mine = range(len(images))[rank::num_processes]
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    reader = PlainReader(images, transform)
    return read_ahead(reader, batches, num_workers, device, leave_ctrl_c_to_the_parent, images.name)
