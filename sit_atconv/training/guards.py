"""What may end a run before its last step: signals that ask it to, and updates that are not finite.

Neither makes the host wait for the device: flags are copied while it works and looked at once they have arrived.
"""

import signal
import time
from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAME_PRESS = 1.0  # seconds within which another signal is a launcher's copy of the first Ctrl-C


class StopRequest:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C, so that the loop can save a checkpoint before it leaves.

    A second Ctrl-C leaves at once, and so does the first one while `has_work` is False: there is nothing to save yet.

    Args:
        announce: called at the first Ctrl-C.
        leave: called to leave at once; does not return.
    """

    def __init__(self, announce: Callable[[], object], leave: Callable[[], object]):
        self.announce, self.leave = announce, leave
        self.number, self.has_work = 0, False
        self.interrupted: float | None = None  # when
        wanted = [number for number in STOP_SIGNALS if number != signal.SIGINT
                  or signal.getsignal(number) != signal.SIG_IGN]  # Ctrl-C is not meant for a job in the background
        self.before = {number: signal.signal(number, self._note) for number in wanted}

    def _note(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.interrupted is not None and number in (signal.SIGINT, signal.SIGTERM):
            if now - self.interrupted >= SAME_PRESS:  # torchrun passes a second Ctrl-C on as SIGTERM
                self.leave()
            return
        if number == signal.SIGINT:
            if not self.has_work:
                self.leave()
            self.interrupted = now
            self.announce()
        self.number = self.number or number

    def close(self) -> None:
        """Restores what the signals meant before."""
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def leave_signals_to_the_trainer(worker: int) -> None:
    """For a loader's workers, which a scheduler signals together with the process that they load for."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Agreement:
    """Whole numbers whose largest all processes act on at the same step. They travel while the device works."""

    def __init__(self):
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo") if several else None
        self.pending: tuple | None = None

    def largest(self, *numbers: int, now: bool = False) -> list[int]:
        """The largest of each over all processes: as they are `now`, else as they were at the call before.

        (Zeros where that was the first, or was itself answered `now`.) All processes must call it equally often, with
        the same `now`.
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
        """The items of all processes, which must all call it."""
        if self.group is None:
            return items
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, items, group=self.group)
        return {key: value for part in parts for key, value in part.items()}


class FiniteWatch:
    """Which step was the first that was not finite, known some steps later."""

    def __init__(self):
        self.flags: deque[tuple[int, Tensor, torch.Event | None]] = deque()
        self.first_bad = 0

    def note(self, step: int, finite: Tensor) -> None:
        """Whether the step of this number (1-based) was finite: 0-d bool, on the device."""
        arrived = None
        if finite.device.type != "cpu":
            on_host = torch.empty((), dtype=torch.bool, pin_memory=True)
            finite = on_host.copy_(finite, non_blocking=True)
            arrived = torch.Event(torch.accelerator.current_accelerator())
            arrived.record()
        self.flags.append((step, finite, arrived))

    def look(self, wait: bool = False) -> int:
        """The first bad step among those whose flags have arrived (with `wait`: among all), or 0."""
        while self.flags and (wait or self.flags[0][2] is None or self.flags[0][2].query()):
            step, finite, arrived = self.flags.popleft()
            if arrived is not None:
                arrived.synchronize()
            if not finite and not self.first_bad:
                self.first_bad = step
        return self.first_bad


def poisoned(loss: Tensor) -> Tensor:
    """The loss; where it is not finite its gradient is not either, and the averaging of gradients tells every process.

    Elsewhere nothing changes, to the bit: x * 1.
    """
    return loss * (1 + (loss - loss).detach())
