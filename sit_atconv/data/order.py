"""The order of training data, a function of (seed, step), so that resuming needs no state."""

import copy
import itertools
from collections.abc import Iterator, Sequence

import numpy as np


class BatchOrder:
    """Endless, deterministic order of the micro-batches of one process, as lists of (index, mirrored).

    Each epoch is a permutation that depends on (seed, epoch), cut into whole batches; the rest of the epoch is skipped.
    The batch of a step is split into `accumulation` x `num_processes` micro-batches, so neither number changes the
    images of a step. It is a `batch_sampler` for a DataLoader that accelerate must not prepare.

    Args:
        num_images: size of the data set.
        batch_size: images in one optimizer step, over all processes and micro-batches.
        seed: seed of the permutations and flips.
        accumulation: micro-batches in one step.
        rank, num_processes: number of this process, and of all processes.
        mirror: flip images horizontally with probability 0.5, a function of (seed, epoch, position).
        held_out: images that are never used, as `hold_out` returns them.

    Raises:
        ValueError: `batch_size` is not divisible, is below 1, or is larger than the number of images to train on.
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
            raise ValueError(f"batch_size {batch_size} is not divisible by accumulation {accumulation} x "
                             f"{num_processes} processes")
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
        """Number of images in a micro-batch of one process."""
        return self.batch_size // (self.accumulation * self.num_processes)

    def starting_at(self, step: int) -> "BatchOrder":
        """Returns the same order starting at a step, at no cost."""
        order = copy.copy(self)
        order.first_step = step
        return order

    def rows(self, micro_batch: int) -> slice:
        """Returns the rows of a step's batch that this process takes in one micro-batch."""
        first = (micro_batch * self.num_processes + self.rank) * self.micro_batch
        return slice(first, first + self.micro_batch)

    def batch(self, step: int) -> list[int]:
        """Returns the images of a whole step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self.permutation(epoch)[position * self.batch_size :][: self.batch_size].tolist()

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
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
        """Returns the order of all images in one epoch, (num_images,)."""
        return np.random.default_rng(np.random.SeedSequence((self.seed, epoch))).permutation(self.images)

    def mirrored(self, epoch: int) -> np.ndarray:
        """Returns True for each position of an epoch whose image is flipped, (num_images,)."""
        if not self.mirror:
            return np.zeros(self.num_images, bool)
        seed = np.random.SeedSequence((self.seed, epoch), spawn_key=(1,))  # independent of the permutation
        return np.random.default_rng(seed).random(self.num_images) < 0.5


def hold_out(num_images: int, count: int) -> np.ndarray:
    """Returns `count` indices of images to keep from training, unordered and the same for every seed."""
    if count >= num_images:
        raise ValueError(f"data.held_out {count} leaves none of the {num_images} images to train on: lower it, "
                         "or set it to 0")
    return np.random.default_rng(0).permutation(num_images)[:count]


def step_seed(seed: int, step: int) -> int:
    """Returns the seed of all random draws in one step: posterior and path noise, times, label dropout."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])
