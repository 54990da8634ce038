"""Seeded noise and labels: sample i depends only on (seed, i), not on batches or processes."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

NOISE, LABEL = 0, 1  # independent streams of one sample


class SampleStream:
    """Noise and labels for the samples `indices` of one seed.

    Each sample has its own CPU generator, seeded by (seed, stream, index) through numpy's SeedSequence. (With
    seed + index, (0, 1) would equal (1, 0). torch's CPU generator keeps only 32 bits of its seed: among 50,000
    samples, two would be equal in one run out of four.)

    Args:
        seed: a non-negative integer.
        indices: sample indices in the order of the batch.

    Raises:
        ValueError: a negative seed.
    """

    def __init__(self, seed: int, indices: Sequence[int]):
        if seed < 0:
            raise ValueError(f"seed must not be negative: {seed}")
        self.seed = seed
        self.indices = [int(i) for i in indices]

    @cached_property
    def _noise(self) -> list[np.random.Generator]:
        return [_generator(self.seed, NOISE, i) for i in self.indices]

    def randn(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Draws the next standard-normal float32 numbers of every sample on the CPU: (len(indices), *shape)."""
        samples = [generator.standard_normal(tuple(shape), dtype=np.float32) for generator in self._noise]
        return torch.from_numpy(np.stack(samples)).to(device)

    def randn_like(self, x: Tensor) -> Tensor:
        """Draws the next standard-normal numbers in the shape, dtype and device of x (B, ...)."""
        return self.randn(x.shape[1:], x.device).to(x.dtype)

    def labels(self, num_classes: int, mode: str = "random", without: Sequence[int] = ()) -> Tensor:
        """Draws a label for each sample: (len(indices),) int64.

        Args:
            num_classes: number of classes.
            mode: "random" is uniform. "balanced" draws a new permutation of the classes for each block of num_classes
                samples, so that the counts of any first n samples differ by at most one.
            without: labels that are never drawn.

        Raises:
            ValueError: an unknown mode.
        """
        drawn = np.setdiff1d(np.arange(num_classes), without)
        num_classes = len(drawn)
        if mode == "random":
            labels = [_generator(self.seed, LABEL, i).integers(num_classes) for i in self.indices]
        elif mode == "balanced":
            blocks = {
                block: _generator(self.seed, LABEL, block).permutation(num_classes)
                for block in sorted({i // num_classes for i in self.indices})
            }
            labels = [blocks[i // num_classes][i % num_classes] for i in self.indices]
        else:
            raise ValueError(f"labels must be 'random' or 'balanced', not {mode!r}")
        return torch.from_numpy(drawn[np.asarray(labels, dtype=np.int64)])


def _generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(key))
