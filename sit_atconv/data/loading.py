"""Batches on the device in a given order, read ahead by worker processes."""

import dataclasses
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from sit_atconv.data.data_source import DataSource
from sit_atconv.data.order import BatchOrder


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    inputs: Tensor  # (B, ...) from the data source; zeros for an image that cannot be read
    y: Tensor  # labels (B,)
    readable: Tensor  # (B,) bool, False for an image that cannot be read
    unreadable: dict[str, str]  # file name -> reason, of the images that cannot be read

    def to(self, device: torch.device) -> "Batch":
        return self._apply(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Returns the batch in pinned memory; DataLoader calls it."""
        return self._apply(Tensor.pin_memory)

    def _apply(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        inputs, y, readable = map(function, (self.inputs, self.y, self.readable))
        return dataclasses.replace(self, inputs=inputs, y=y, readable=readable)


class BatchReader(Dataset):
    """Reader of whole micro-batches for a DataLoader.

    Args:
        data: the data source.
        skip_unreadable: replace an image that cannot be read by zeros instead of raising an error. The batch keeps its
            shape and the other images stay bitwise the same; a loss must give the zeros no weight.
    """

    def __init__(self, data: DataSource, skip_unreadable: bool = False):
        self.data, self.skip_unreadable = data, skip_unreadable

    def __getitem__(self, items: Sequence[tuple[int, bool]]) -> Batch:
        """Reads items (index, mirrored). ValueError, OSError: an image or a shard of latents cannot be read."""
        data, samples, readable, unreadable = self.data, [], [], {}
        for index, mirrored in items:
            try:
                samples.append(data[index, mirrored])
                readable.append(True)
            except ValueError as error:
                if data.is_encoded:  # a damaged shard affects many images
                    raise
                if not self.skip_unreadable:
                    raise ValueError(f"{error}: fix the file, or give --data.skip_unreadable true to leave it out and "
                                     "record it in unreadable.json of the run") from error
                nothing = torch.zeros(data.channels, data.image_size, data.image_size, dtype=torch.uint8)
                samples.append((nothing, int(data.labels[index])))
                readable.append(False)
                name = data.name(index)
                unreadable[name] = str(error).partition(f"{name} ")[2] or str(error)  # without the folder
        inputs, y = default_collate(samples)
        return Batch(inputs, y, torch.tensor(readable), unreadable)


def leave_ctrl_c_to_the_parent(worker: int) -> None:
    """Ignores Ctrl-C in a loader's worker, where it would only print a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def load_batches(
    data: DataSource,
    order: BatchOrder,
    num_workers: int,
    device: torch.device,
    on_start: Callable[[int], None] | None = None,
    *,
    skip_unreadable: bool = False,
) -> Iterator[Batch]:
    """Yields micro-batches without end.

    Args:
        data: the data source.
        order: the images of each micro-batch of this process; accelerate must not prepare it.
        num_workers: processes that read ahead; 0 reads in this process when a batch is needed.
        device: device of the tensors.
        on_start: called by each worker with its number.
        skip_unreadable: as `BatchReader` takes it.

    Raises:
        ValueError: an image cannot be read, a worker died, ...; the message is one line.
    """
    loader = DataLoader(BatchReader(data, skip_unreadable), sampler=order, batch_size=None, num_workers=num_workers,
                        pin_memory=device.type == "cuda", worker_init_fn=on_start)
    batches = iter(loader)
    try:
        while True:
            try:
                batch = next(batches)
            except (ValueError, OSError, RuntimeError) as error:
                lines = [line for line in str(error).splitlines() if line.strip()]  # a worker's traceback
                reason = lines[-1].removeprefix(f"{type(error).__name__}: ") if lines else type(error).__name__
                raise ValueError(f"the training data cannot be read: {reason}") from error
            yield batch.to(device)
    finally:
        if num_workers:  # without this the process may wait for its workers at exit; nothing public ends them at once
            batches._shutdown_workers()  # type: ignore[attr-defined]
