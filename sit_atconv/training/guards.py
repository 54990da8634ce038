"""Reasons to end a run before its last step: signals, and updates that are not finite.

Neither makes the host wait for the device: flags are copied while the device works and read once they have arrived.
"""

import signal
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from sit_atconv.checkpoints.run_folder import newest_checkpoint
from sit_atconv.runtime.commands import leave_at_once, say_at_once

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAME_PRESS = 1.0  # seconds; a signal that follows Ctrl-C sooner is a launcher's copy of it


class StopRequest:
    """Record of SIGTERM, SIGUSR1 and Ctrl-C, so that the loop can save a checkpoint before exiting.

    A second Ctrl-C exits at once, and so does the first one while `has_work` is False: there is nothing to save yet.

    Args:
        announce: called at the first Ctrl-C.
        leave: called to exit at once; does not return.
    """

    def __init__(self, announce: Callable[[], object], leave: Callable[[], object]):
        self.announce, self.leave = announce, leave
        self.number, self.has_work = 0, False
        self.interrupted: float | None = None  # time of the first Ctrl-C, in seconds
        wanted = [
            number for number in STOP_SIGNALS if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN
        ]  # ignored: a background job of a shell
        self.before = {number: signal.signal(number, self._note) for number in wanted}

    def _note(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.interrupted is not None and number in (signal.SIGINT, signal.SIGTERM):
            if now - self.interrupted >= SAME_PRESS:  # torchrun forwards a second Ctrl-C as SIGTERM
                self.leave()
            return
        if number == signal.SIGINT:
            if not self.has_work:
                self.leave()
            self.interrupted = now
            self.announce()
        self.number = self.number or number

    def close(self) -> None:
        """Restores the previous signal handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def stop_request(run: Path) -> StopRequest:
    """Returns the stop request of a run; its messages name the run's last checkpoint."""
    return StopRequest(
        announce=lambda: say_at_once("Ctrl-C: finishing and saving this step; press Ctrl-C again to exit at once"),
        leave=lambda: leave_at_once(f"interrupted; last checkpoint: {newest_checkpoint(run) or 'none yet'}"),
    )


def leave_signals_to_the_trainer(worker: int) -> None:
    """Ignores the signals in a loader's worker, which also gets them: the training process handles them."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Agreement:
    """Agreement of all processes on the largest of some integers, exchanged while the device works."""

    def __init__(self) -> None:
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.group = cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if several else None
        self.pending: tuple[dist.Work | None, torch.Tensor] | None = None

    def largest(self, *numbers: int, now: bool = False) -> list[int]:
        """Returns the maximum of each number over all processes; all must call it, with the same `now`.

        With `now`, it waits for the maxima of this call. Else it returns those of the previous call without waiting:
        zeros if there was none, or if that had `now`.
        """
        if self.group is None:
            return list(numbers)
        mine = torch.tensor(numbers)
        sent = dist.all_reduce(mine, dist.ReduceOp.MAX, group=self.group, async_op=True), mine
        work, agreed = sent if now else self.pending or (None, torch.zeros_like(mine))
        if work is not None:
            work.wait()
        self.pending = None if now else sent
        return agreed.tolist()

    def gather(self, items: dict) -> dict:
        """Returns the items of all processes; all must call it."""
        if self.group is None:
            return items
        parts: list[dict] = [{}] * dist.get_world_size()
        dist.all_gather_object(parts, items, group=self.group)
        return {key: value for part in parts for key, value in part.items()}


class FiniteWatch:
    """Record of the first step that was not finite; it is known some steps later."""

    def __init__(self) -> None:
        self.flags: deque[tuple[int, Tensor, torch.Event | None]] = deque()
        self.first_bad = 0

    def note(self, step: int, finite: Tensor) -> None:
        """Notes whether a step (1-based) was finite: a 0-d bool on the device."""
        arrived = None
        if finite.device.type != "cpu":
            on_host = torch.empty((), dtype=torch.bool, pin_memory=True)
            finite = on_host.copy_(finite, non_blocking=True)
            arrived = torch.Event(torch.accelerator.current_accelerator())
            arrived.record()
        self.flags.append((step, finite, arrived))

    def look(self, wait: bool = False) -> int:
        """Returns the first step that was not finite, or 0, by the flags that have arrived; `wait` awaits all."""
        while self.flags and (wait or self.flags[0][2] is None or self.flags[0][2].query()):
            step, finite, arrived = self.flags.popleft()
            if arrived is not None:
                arrived.synchronize()
            if not finite and not self.first_bad:
                self.first_bad = step
        return self.first_bad


def poisoned(loss: Tensor) -> Tensor:
    """Returns the loss, with a gradient that is not finite if the loss is not.

    Every process then withholds the update, since gradients are averaged over processes. A finite loss and its gradient
    keep their bits: they are multiplied by 1.
    """
    return loss * (1 + (loss - loss).detach())
