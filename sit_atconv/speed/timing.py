"""How things are timed: interleaved rounds and CUDA graphs."""

import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Key = TypeVar("Key")  # names a run
MAX_SETS = 256
REPLAYS = 20  # so many graphs are launched at once, or the launch of the first would show


@dataclass(frozen=True)
class Rounds:
    """One quantity in every round, and its median and quartiles."""

    median: float
    q1: float
    q3: float
    rounds: tuple[float, ...]

    @classmethod
    def of(cls, values: list[float]) -> "Rounds":
        q1, median, q3 = statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3
        return cls(median, q1, q3, tuple(values))

    def plus(self, other: "Rounds") -> "Rounds":
        """The sum with another quantity of the same rounds."""
        return Rounds.of([a + b for a, b in zip(self.rounds, other.rounds, strict=True)])

    def over(self, other: "Rounds") -> "Rounds":
        """The ratio to another quantity of the same rounds, taken round by round."""
        return Rounds.of([a / b for a, b in zip(self.rounds, other.rounds, strict=True)])


def time_interleaved(
    runs: Mapping[Key, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    synchronize: Callable[[], object],
    clock: Callable[[], float],
    after_round: Callable[[], object] = lambda: None,
) -> dict[Key, list[float]]:
    """Runs all of `runs` in turn, round after round. The seconds that each took, but for the `warmup` first rounds."""
    seconds: dict[Key, list[float]] = {name: [] for name in runs}
    for number in range(-warmup, rounds):
        for name, run in runs.items():
            synchronize()
            start = clock()
            run()
            synchronize()
            elapsed = clock() - start
            if number >= 0:
                seconds[name].append(elapsed)
        after_round()
    return seconds


class Rotation:
    """Runs one computation on several sets of tensors in turn, so that none is found in the cache.

    On CUDA one run is some replays of one graph, of the computation on every set, so that what launching costs is left
    out; elsewhere one run is the computation on the next set.

    Args:
        device: where the tensors lie.
        bytes_per_set: what the computation reads; the sets together exceed four times the L2 cache (up to MAX_SETS).
            On a CPU, where every other form runs in between, they are two.
    """

    def __init__(self, device: torch.device, bytes_per_set: int):
        self.device = device
        self.num_sets, self.calls_per_run = 2, 1
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.num_sets = min(MAX_SETS, 4 * cache // bytes_per_set + 1)
            self.calls_per_run = REPLAYS * self.num_sets
            self.stream = torch.cuda.Stream(device)

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Tensors and autograd graphs are made in here: a backward runs on the stream of its forward."""
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.stream(self.stream):
            yield
        self.stream.synchronize()

    def run(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        """What is to be timed, of one call for each set; it makes `calls_per_run` of them."""
        if self.device.type != "cuda":
            turns = itertools.cycle(calls)
            return lambda: next(turns)()
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self.stream):
            for call in calls[:3]:  # whatever is chosen or compiled at the first call is so before the capture
                call()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            results = [call() for call in calls]  # held together, so that each call writes to memory of its own
        del results

        def replay():
            for _ in range(REPLAYS):
                graph.replay()

        return replay
