"""Mixup and CutMix whose draws and pairs do not depend on processes and micro-batches."""

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor

from sit_atconv.classification.streams import MIXING, stream_seed


class Mixing:
    """Mixup, CutMix and label smoothing: images and labels -> mixed images and soft targets.

    Each group of `group_size` images has draws of its own, and pairs the first with the last, and so on, as each GPU
    does in the published code.

    Args:
        num_classes: number of classes.
        mixup, cutmix: alphas of the two; 0 switches one off.
        prob: probability that a group is mixed.
        switch_prob: probability of CutMix, if both are on.
        smoothing: label smoothing.
        group_size: images in one group, even if they are mixed.
        seed: the run's seed.

    Raises:
        ValueError: groups that are mixed have an odd number of images.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        mixup: float,
        cutmix: float,
        prob: float,
        switch_prob: float,
        smoothing: float,
        group_size: int,
        seed: int,
    ):
        self.is_on = (mixup > 0 or cutmix > 0) and prob > 0
        if self.is_on and group_size % 2:
            raise ValueError(f"Mixup and CutMix mix pairs, and train.norm_batch {group_size} is odd: make it even")
        self.mixup = Mixup(
            mixup, cutmix, prob=prob, switch_prob=switch_prob, label_smoothing=smoothing, num_classes=num_classes
        )
        self.num_classes, self.smoothing, self.group_size, self.seed = num_classes, smoothing, group_size, seed

    def __call__(self, x: Tensor, y: Tensor, step: int, first: int) -> tuple[Tensor, Tensor]:
        """Mixes a micro-batch in place.

        Args:
            x: images (B, C, H, W).
            y: labels (B,).
            step: the step (0-based).
            first: position in the whole batch of the first image.

        Returns:
            The images, and soft targets (B, num_classes).
        """
        if not self.is_on:
            return x, mixup_target(y, self.num_classes, 1.0, self.smoothing)
        targets = []
        for start in range(0, len(x), self.group_size):
            group = slice(start, start + self.group_size)
            number = (first + start) // self.group_size
            np.random.seed(stream_seed(MIXING, self.seed, step, number))  # noqa: NPY002  # timm draws from it
            targets.append(self.mixup(x[group], y[group])[1])
        return x, torch.cat(targets)
