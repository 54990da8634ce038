"""Timing tools: interleaved rounds and CUDA graphs."""

import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Key = TypeVar("Key")  # names a run
MAX_SETS = 256
REPLAYS = 20  # graphs launched in a row, so that the first launch costs little of the whole


@dataclass(frozen=True)
class Rounds:
    """Values of one quantity in every round, with median and quartiles."""

    median: float
    q1: float
    q3: float
    rounds: tuple[float, ...]

    @classmethod
    def of(cls, values: list[float]) -> "Rounds":
        q1, median, q3 = statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3
        return cls(median, q1, q3, tuple(values))

    def plus(self, other: "Rounds") -> "Rounds":
        """Returns the sum with another quantity of the same rounds."""
        return Rounds.of([a + b for a, b in zip(self.rounds, other.rounds, strict=True)])

    def over(self, other: "Rounds") -> "Rounds":
        """Returns the ratio to another quantity of the same rounds, taken round by round."""
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
    """Calls all runs in turn, round after round. Returns each run's seconds in the rounds after `warmup`."""
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
    """Rotation among several sets of tensors, so that a timed computation finds none of them in the cache.

    On CUDA, one run replays a graph of the computation on every set REPLAYS times, which leaves out the cost of
    launching kernels. Elsewhere one run computes on the next set.

    Args:
        device: device of the tensors.
        bytes_per_set: bytes that the computation reads. On CUDA, all sets together exceed four times the L2 cache (with
            at most MAX_SETS). On a CPU there are two sets, because the other forms run in between.
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
        """Opens the context for making tensors and autograd graphs: a backward runs on its forward's stream."""
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.stream(self.stream):
            yield
        self.stream.synchronize()

    def run(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        """Returns the run to time, which makes `calls_per_run` calls. Takes one call for each set."""
        if self.device.type != "cuda":
            turns = itertools.cycle(calls)
            return lambda: next(turns)()
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self.stream):
            for call in calls[:3]:  # first calls choose and compile kernels, which must happen before the capture
                call()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            results = [call() for call in calls]  # kept together, so that each call writes to its own memory
        del results

        def replay():
            for _ in range(REPLAYS):
                graph.replay()

        return replay
