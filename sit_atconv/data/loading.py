"""Batches of training data on the device, read ahead by worker processes."""

import dataclasses
import itertools
import signal
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from sit_atconv.data.data_source import DataSource
from sit_atconv.data.order import BatchOrder

Extra = Literal["pixels", "features"]


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Args:
        inputs: images or latents from the data source, (B, ...); zeros for unreadable images.
        y: labels (B,).
        readable: bool (B,), False for unreadable images.
        unreadable: maps the name of each unreadable image to the reason; stays on the CPU.
        extras: "pixels", uint8 (B, 3, S, S), or "features", (B, N, width), of latents if they were asked for.
    """

    inputs: Tensor
    y: Tensor
    readable: Tensor
    unreadable: dict[str, str]
    extras: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def to(self, device: torch.device) -> "Batch":
        return self._apply(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Copies the tensors to pinned memory; called by DataLoader."""
        return self._apply(Tensor.pin_memory)

    def _apply(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        inputs, y, readable = map(function, (self.inputs, self.y, self.readable))
        extras = {name: function(tensor) for name, tensor in self.extras.items()}
        return dataclasses.replace(self, inputs=inputs, y=y, readable=readable, extras=extras)


class BatchReader(Dataset):
    """Reader of whole micro-batches.

    An unreadable image becomes zeros, so that the batch keeps its shape and the other images keep their bits. The
    caller must give it weight 0 in the loss.

    Args:
        data: the data source.
        skip_unreadable: accept unreadable images instead of raising an error.
    """

    def __init__(self, data: DataSource, skip_unreadable: bool = False):
        self.data, self.skip_unreadable = data, skip_unreadable

    def __getitem__(self, items: Sequence[tuple[int, bool]]) -> Batch:
        """Reads a batch of (index, mirrored). ValueError, OSError: images or latents cannot be read."""
        data, samples, readable, unreadable = self.data, [], [], {}
        for index, mirrored in items:
            try:
                samples.append(data[index, mirrored])
                readable.append(True)
            except ValueError as error:
                if data.is_encoded:  # a damaged shard affects more than one image
                    raise
                if not self.skip_unreadable:
                    raise ValueError(
                        f"{error}: fix the file, or give --data.skip_unreadable true, which skips the "
                        "file and records it in the run's unreadable.json"
                    ) from error
                nothing = torch.zeros(data.channels, data.image_size, data.image_size, dtype=torch.uint8)
                samples.append((nothing, int(data.labels[index])))
                readable.append(False)
                name = data.name(index)
                unreadable[name] = str(error).partition(f"{name} ")[2] or str(error)  # without the folder
        inputs, y = default_collate(samples)
        return Batch(inputs, y, torch.tensor(readable), unreadable)


class ExtraReader(Dataset):
    """Reader of micro-batches of latents with their pixels or features.

    Args:
        reader: reader of the latents.
        extra: "pixels" or "features".
    """

    def __init__(self, reader: BatchReader, extra: Extra):
        self.reader, self.extra = reader, extra

    def __getitem__(self, wanted: tuple[Sequence[tuple[int, bool]], bool]) -> Batch:
        """Reads a batch of (index, mirrored), with the extra if the second value is True."""
        items, is_needed = wanted
        batch, data = self.reader[items], self.reader.data
        if not is_needed:
            return batch
        read = data.read_pixels if self.extra == "pixels" else data.read_features
        return dataclasses.replace(batch, extras={self.extra: torch.stack([read(item) for item in items])})


def leave_ctrl_c_to_the_parent(worker: int) -> None:
    """Ignores Ctrl-C in a loader's worker, which would otherwise print a traceback of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def load_batches(
    data: DataSource,
    order: BatchOrder,
    num_workers: int,
    device: torch.device,
    on_start: Callable[[int], None] | None = None,
    *,
    skip_unreadable: bool = False,
    extra: Extra | None = None,
    is_needed: Callable[[int], bool] = lambda step: True,
) -> Generator[Batch, None, None]:
    """Returns micro-batches, endlessly.

    Args:
        data: the data source.
        order: images of each micro-batch of this process (must not be prepared by accelerate).
        num_workers: number of processes that read ahead; 0 reads on demand.
        device: device of the yielded tensors.
        on_start: called in each worker with its number.
        skip_unreadable: as in `BatchReader`.
        extra: pixels or features of latents to read with them; None reads latents alone.
        is_needed: tells whether a step (0-based) needs the extra.

    Raises:
        ValueError: an image cannot be read, a worker died, ...; one line.
    """
    reader = BatchReader(data, skip_unreadable)
    if extra is None:
        return read_ahead(reader, order, num_workers, device, on_start, "the training data")
    steps = (order.first_step + i // order.accumulation for i in itertools.count())
    wanted = ((items, is_needed(step)) for items, step in zip(order, steps, strict=False))
    return read_ahead(ExtraReader(reader, extra), wanted, num_workers, device, on_start, "the training data")


def read_ahead(
    reader: Dataset,
    order: Iterable,
    num_workers: int,
    device: torch.device,
    on_start: Callable[[int], None] | None = None,
    what: str = "the images",
) -> Generator[Any, None, None]:
    """Yields `reader[item].to(device)` for each item of `order`.

    Args:
        reader: reader of whole batches, in this process or in workers.
        order: items that `reader` takes.
        num_workers, device, on_start: as in `load_batches`.
        what: name of the data in errors.

    Raises:
        ValueError: an item cannot be read, a worker died, ...; one line.
    """
    batches = iter(
        DataLoader(
            reader,
            sampler=order,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=on_start,
        )
    )
    try:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (ValueError, OSError, RuntimeError) as error:
                lines = [line for line in str(error).splitlines() if line.strip()]  # a worker sends its traceback
                reason = lines[-1].removeprefix(f"{type(error).__name__}: ") if lines else type(error).__name__
                raise ValueError(f"{what} cannot be read: {reason}") from error
            yield batch.to(device)
    finally:
        if num_workers:  # at exit, the process might otherwise wait for workers that the garbage collector left alive
            batches._shutdown_workers()  # type: ignore[attr-defined]  # no public function ends workers at once
