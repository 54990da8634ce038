"""Order of training data: a function of (seed, step), so that resuming is exact and needs no state."""

import copy
import itertools
from collections.abc import Iterator, Sequence

import numpy as np


class BatchOrder:
    """Deterministic, endless order of micro-batches for one process, as lists of (index, mirrored).

    Each epoch is a new permutation, a function of (seed, epoch), cut into whole batches; the remainder is skipped. A
    step's batch is cut into `accumulation` x `num_processes` micro-batches, so that neither number changes which images
    a step uses. Serves as `batch_sampler` of a DataLoader and must not be prepared by accelerate.

    Args:
        num_images: size of the data set.
        batch_size: images in one optimizer step, over all processes and micro-batches.
        seed: seed of the permutations and the horizontal flips.
        accumulation: number of micro-batches in one step.
        rank: number of this process.
        num_processes: number of processes.
        mirror: flip images horizontally with probability 0.5, a function of (seed, epoch, position).
        held_out: indices of images that are never used, from `hold_out`.

    Raises:
        ValueError: `batch_size` is not divisible by the number of micro-batches, or exceeds the training images.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        seed: int,
        accumulation: int = 1,
        rank: int = 0,
        num_processes: int = 1,
        mirror: bool = False,
        held_out: Sequence[int] = (),
    ):
        if batch_size < 1 or accumulation < 1:
            raise ValueError(f"batch_size and accumulation must be at least 1, not {batch_size} and {accumulation}")
        if batch_size % (accumulation * num_processes):
            raise ValueError(
                f"batch_size {batch_size} is not divisible by accumulation {accumulation} x {num_processes} processes"
            )
        self.images = np.setdiff1d(np.arange(num_images), held_out)
        self.num_images = len(self.images)
        if batch_size > self.num_images:
            less = f", {len(held_out)} of them held out" if len(held_out) else ""
            raise ValueError(f"batch_size {batch_size} exceeds the {num_images} images of the data set{less}")
        self.batch_size = batch_size
        self.seed = seed
        self.accumulation = accumulation
        self.rank = rank
        self.num_processes = num_processes
        self.mirror = mirror
        self.first_step = 0

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.batch_size

    @property
    def micro_batch(self) -> int:
        """Number of images in one micro-batch."""
        return self.batch_size // (self.accumulation * self.num_processes)

    def starting_at(self, step: int) -> "BatchOrder":
        """Returns the same order, starting at a step; nothing is skipped one by one."""
        order = copy.copy(self)
        order.first_step = step
        return order

    def rows(self, micro_batch: int) -> slice:
        """Returns the positions of this process's micro-batch in a step's batch."""
        first = (micro_batch * self.num_processes + self.rank) * self.micro_batch
        return slice(first, first + self.micro_batch)

    def batch(self, step: int) -> list[int]:
        """Returns the indices of all images of a step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self.permutation(epoch)[position * self.batch_size :][: self.batch_size].tolist()

    def __iter__(self) -> Iterator[list]:
        first_epoch, first = divmod(self.first_step, self.steps_per_epoch)
        for epoch in itertools.count(first_epoch):
            permutation, mirrored = self.permutation(epoch), self.mirrored(epoch)
            for position in range(first, self.steps_per_epoch):
                batch = slice(position * self.batch_size, (position + 1) * self.batch_size)
                items = list(zip(permutation[batch].tolist(), mirrored[batch].tolist(), strict=True))
                for micro_batch in range(self.accumulation):
                    yield items[self.rows(micro_batch)]
            first = 0

    def permutation(self, epoch: int) -> np.ndarray:
        """Returns the order of all training images in one epoch, (num_images,)."""
        return np.random.default_rng(np.random.SeedSequence((self.seed, epoch))).permutation(self.images)

    def mirrored(self, epoch: int) -> np.ndarray:
        """Returns a mask of the positions of one epoch that are flipped horizontally, (num_images,)."""
        if not self.mirror:
            return np.zeros(self.num_images, bool)
        seed = np.random.SeedSequence((self.seed, epoch), spawn_key=(1,))  # independent of the permutation's seed
        return np.random.default_rng(seed).random(self.num_images) < 0.5


def hold_out(num_images: int, count: int) -> np.ndarray:
    """Returns the indices of `count` images that are never trained on, the same for every seed and model."""
    if count >= num_images:
        raise ValueError(f"data.held_out {count} leaves no training images out of {num_images}: lower it")
    return np.random.default_rng(0).permutation(num_images)[:count]


def step_seed(seed: int, step: int) -> int:
    """Returns the seed of all random numbers of a step: posterior and path noise, times, label dropout."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])
