"""Batches on the device, in the order asked for, read ahead by worker processes."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sit_atconv.data.order import BatchOrder


def load_batches(
    data: Dataset,
    order: BatchOrder,
    num_workers: int,
    device: torch.device,
    on_start: Callable[[int], None] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields inputs (B, ...) and labels (B,) of one micro-batch after another, for ever.

    Args:
        data: the data set.
        order: which of its images make up a micro-batch; needs no preparing by accelerate, knowing its process.
        num_workers: processes that read ahead; 0 reads when asked.
        device: where the tensors shall be.
        on_start: called by each worker with its number.

    Raises:
        ValueError: an image cannot be read, a worker died, ...; in one line.
    """
    loader = DataLoader(data, batch_sampler=order, num_workers=num_workers, pin_memory=device.type == "cuda",
                        worker_init_fn=on_start)
    batches = iter(loader)
    try:
        while True:
            try:
                inputs, y = next(batches)
            except (ValueError, OSError, RuntimeError) as error:
                lines = [line for line in str(error).splitlines() if line.strip()]  # a worker's comes as its traceback
                reason = lines[-1].removeprefix(f"{type(error).__name__}: ") if lines else type(error).__name__
                raise ValueError(f"the training data cannot be read: {reason}") from error
            yield inputs.to(device, non_blocking=True), y.to(device, non_blocking=True)
    finally:
        if num_workers:  # left to the garbage collector they may outlive the process, which would wait for them
            batches._shutdown_workers()
