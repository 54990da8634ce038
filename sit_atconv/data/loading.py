"""Batches on the device, in the order asked for, read ahead by worker processes."""

import dataclasses
import signal
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from sit_atconv.data.data_source import DataSource
from sit_atconv.data.order import BatchOrder


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Args:
        inputs: what the data set yields, (B, ...); zeros where an image cannot be read.
        y: labels (B,).
        readable: False where an image cannot be read, (B,) bool.
        unreadable: file name -> reason, of the images that cannot be read; stays on the CPU.
    """

    inputs: Tensor
    y: Tensor
    readable: Tensor
    unreadable: dict[str, str]

    def to(self, device: torch.device) -> "Batch":
        return self._apply(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by DataLoader."""
        return self._apply(Tensor.pin_memory)

    def _apply(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        inputs, y, readable = map(function, (self.inputs, self.y, self.readable))
        return dataclasses.replace(self, inputs=inputs, y=y, readable=readable)


class BatchReader(Dataset):
    """Reads the images of a whole micro-batch.

    An image that cannot be read leaves zeros, so that the batch keeps its shape and the others' bits stay what they
    are. Whoever skips it must give it no weight in a loss.

    Args:
        data: the data set.
        skip_unreadable: whether images that cannot be read are left out; else they are errors.
    """

    def __init__(self, data: DataSource, skip_unreadable: bool = False):
        self.data, self.skip_unreadable = data, skip_unreadable

    def __getitem__(self, items: Sequence[tuple[int, bool]]) -> Batch:
        """Reads (index, mirrored), ... ValueError, OSError: an image or the cached latents cannot be read."""
        data, samples, readable, unreadable = self.data, [], [], {}
        for index, mirrored in items:
            try:
                samples.append(data[index, mirrored])
                readable.append(True)
            except ValueError as error:
                if data.is_encoded:  # a damaged shard is no single image
                    raise
                if not self.skip_unreadable:
                    raise ValueError(f"{error}: mend the file, or give --data.skip_unreadable true, which leaves it "
                                     "out and records it in unreadable.json of the run") from error
                nothing = torch.zeros(data.channels, data.image_size, data.image_size, dtype=torch.uint8)
                samples.append((nothing, int(data.labels[index])))
                readable.append(False)
                name = data.name(index)
                unreadable[name] = str(error).partition(f"{name} ")[2] or str(error)  # without the folder
        inputs, y = default_collate(samples)
        return Batch(inputs, y, torch.tensor(readable), unreadable)


def leave_ctrl_c_to_the_parent(worker: int) -> None:
    """Runs in a loader's worker: a terminal sends Ctrl-C to workers too, which would print a traceback each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def load_batches(
    data: DataSource,
    order: BatchOrder,
    num_workers: int,
    device: torch.device,
    on_start: Callable[[int], None] | None = None,
    *,
    skip_unreadable: bool = False,
) -> Generator[Batch, None, None]:
    """Yields one micro-batch after another, for ever.

    Args:
        data: the data set.
        order: which of its images make up a micro-batch; needs no preparing by accelerate, knowing its process.
        num_workers: processes that read ahead; 0 reads when asked.
        device: where the tensors shall be.
        on_start: called by each worker with its number.
        skip_unreadable: whether images that cannot be read are left out; else they are errors.

    Raises:
        ValueError: an image cannot be read, a worker died, ...; in one line.
    """
    loader = DataLoader(BatchReader(data, skip_unreadable), sampler=order, batch_size=None, num_workers=num_workers,
                        pin_memory=device.type == "cuda", worker_init_fn=on_start)
    batches = iter(loader)
    try:
        while True:
            try:
                batch = next(batches)
            except (ValueError, OSError, RuntimeError) as error:
                lines = [line for line in str(error).splitlines() if line.strip()]  # a worker's comes as its traceback
                reason = lines[-1].removeprefix(f"{type(error).__name__}: ") if lines else type(error).__name__
                raise ValueError(f"the training data cannot be read: {reason}") from error
            yield batch.to(device)
    finally:
        if num_workers:  # left to the garbage collector they may outlive the process, which would wait for them
            batches._shutdown_workers()  # nothing public ends them at once
