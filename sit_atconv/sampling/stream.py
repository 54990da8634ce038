"""The seeded stream of samples: sample i depends on (seed, i) alone, whatever the batch or the number of processes."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

NOISE, LABEL = 0, 1  # streams of one sample that never meet


class SampleStream:
    """Noise and labels for the samples `indices` of one seed.

    Each sample owns a CPU generator seeded by the triple (seed, stream, index), hashed by numpy's SeedSequence. (Not
    by seed + index, where (0, 1) would equal (1, 0). And numpy's generators, since torch's CPU generator keeps only
    32 bits of its seed: among 50,000 samples two would be alike in one run out of four.)

    Args:
        seed: a non-negative integer.
        indices: which samples, in the order of the batch.

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
        """The next standard-normal float32 numbers of every sample: (len(indices), *shape). Drawn on the CPU."""
        samples = [generator.standard_normal(tuple(shape), dtype=np.float32) for generator in self._noise]
        return torch.from_numpy(np.stack(samples)).to(device)

    def randn_like(self, x: Tensor) -> Tensor:
        """The next standard-normal numbers in the shape, dtype and device of x (B, ...), for SDE solvers."""
        return self.randn(x.shape[1:], x.device).to(x.dtype)

    def labels(self, num_classes: int, mode: str = "random", without: Sequence[int] = ()) -> Tensor:
        """Draws a label for each sample, (len(indices),) int64.

        Args:
            num_classes: number of classes.
            mode: "random" is uniform; "balanced" a fresh permutation of the classes for each block of as many samples,
                so that the counts of every prefix differ by at most one.
            without: labels that are never drawn.

        Raises:
            ValueError: another mode.
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
