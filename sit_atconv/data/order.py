"""The order of training data: a function of (seed, step), so that resuming needs no state and repeats no image."""

import copy
from collections.abc import Iterator

import numpy as np


class BatchOrder:
    """The images of every micro-batch, for one of several processes; endless. Yields lists of (index, mirrored).

    Each epoch is a fresh permutation, a function of (seed, epoch), cut into whole batches; what is left over at its
    end is skipped. A step's batch is cut into `accumulation` x `num_processes` micro-batches. A `batch_sampler` for
    a DataLoader that needs no preparing by accelerate.

    Args:
        num_images: size of the data set.
        batch_size: images in one optimizer step, over all processes and micro-batches.
        seed: of the permutations and of mirroring.
        accumulation: micro-batches in one step.
        rank, num_processes: which process this is, of how many.
        mirror: take the mirror image every other time, a function of (seed, epoch, position).

    Raises:
        ValueError: batch arithmetic that does not come out even, or a batch larger than the data set.
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
    ):
        if batch_size < 1 or accumulation < 1:
            raise ValueError(f"batch_size and accumulation must be at least 1, not {batch_size} and {accumulation}")
        if batch_size % (accumulation * num_processes):
            raise ValueError(
                f"batch_size {batch_size} is not divisible by accumulation {accumulation} x {num_processes} processes"
            )
        if batch_size > num_images:
            raise ValueError(f"batch_size {batch_size} exceeds the {num_images} images of the data set")
        self.num_images = num_images
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

    def starting_at(self, step: int) -> "BatchOrder":
        """The same order from a step on, at no cost."""
        order = copy.copy(self)
        order.first_step = step
        return order

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        step = self.first_step
        while True:
            epoch, first = divmod(step, self.steps_per_epoch)
            permutation, mirrored = self.permutation(epoch), self.mirrored(epoch)
            for position in range(first, self.steps_per_epoch):
                batch = np.arange(position * self.batch_size, (position + 1) * self.batch_size)
                for micro_batch in np.split(batch, self.accumulation):
                    mine = np.split(micro_batch, self.num_processes)[self.rank]
                    yield list(zip(permutation[mine].tolist(), mirrored[mine].tolist(), strict=True))
                step += 1

    def permutation(self, epoch: int) -> np.ndarray:
        """The order of all images in one epoch, (num_images,)."""
        return np.random.default_rng(np.random.SeedSequence((self.seed, epoch))).permutation(self.num_images)

    def mirrored(self, epoch: int) -> np.ndarray:
        """Which positions of one epoch take the mirror image, (num_images,)."""
        if not self.mirror:
            return np.zeros(self.num_images, bool)
        seed = np.random.SeedSequence((self.seed, epoch), spawn_key=(1,))  # apart from the permutation's
        return np.random.default_rng(seed).random(self.num_images) < 0.5


def step_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """The seed of all that is drawn for one micro-batch of one process: noise, times, label dropout."""
    return int(np.random.SeedSequence((seed, step, micro_batch, rank)).generate_state(1, np.uint64)[0])
