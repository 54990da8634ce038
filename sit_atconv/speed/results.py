"""What the speed comparison found, and what each figure means."""

import math
from dataclasses import asdict, dataclass

from sit_atconv.speed.options import SpeedOptions
from sit_atconv.speed.timing import Rounds

DEFINITIONS = {
    "op": "tokens to contiguous tokens between the projections: scaled_dot_product_attention on what the qkv "
    "projection leaves, the dynamic convolution on x and kernels, the floor is a copy of x; never compiled; inputs "
    "take turns, on CUDA as replays of a graph over sets that together exceed four times the L2 cache",
    "mixer, block": "one token mixer; one transformer block; weights and arithmetic in the dtype",
    "model": "one forward of the batch, no guidance",
    "train": "one training step: forward, flow-matching loss, backward, clipping, fused AdamW and the average of the "
    "weights; weights in fp32, arithmetic autocast to the dtype; inputs are at hand",
    "sampling": "one batch from noise to image: steps x the measured Euler step + decoding; with guidance (cfg other "
    "than 0 or 1) each step is one forward of both branches, twice the batch",
    "milliseconds": "for one batch",
    "multiply_adds": "of one forward of one image (a gradient: of that): linears, convolutions and attention's two "
    "products",
    "speedup": "the baseline's time over this form's, round by round; above 1 is faster",
    "over_floor": "this form's time over the floor's, round by round; the floor is the same model with kernel "
    "generation and convolution left out",
    "over_byte_floor": "this form's time over the time in which its inputs are read and its outputs written once, at "
    "the bandwidth of a large copy in the same round",
    "peak_memory_bytes": "weights, optimizer state and the largest sum of other tensors alive at once: on CUDA from "
    "max_memory_allocated, on a CPU from the allocations that torch's profiler records; null where not measured",
    "agreement": "each form against another computation of the same values; error is ||a - b|| / ||b||, null where "
    "there is no other",
    "median, q1, q3, rounds": "over the rounds, in the order in which they ran",
}


@dataclass(frozen=True)
class Measurement:
    """One form at one level, resolution and dtype; DEFINITIONS says what each figure means."""

    level: str
    quantity: str
    form: str
    resolution: int
    grid_size: tuple[int, int]
    dtype: str
    batch_size: int
    milliseconds: Rounds
    images_per_second: Rounds
    multiply_adds: int | None = None
    parameters: int | None = None
    peak_memory_bytes: int | None = None
    speedup: Rounds | None = None
    over_floor: Rounds | None = None
    over_byte_floor: Rounds | None = None

    @property
    def ms_per_image(self) -> Rounds:
        return Rounds.of([ms / self.batch_size for ms in self.milliseconds.rounds])


@dataclass(frozen=True)
class Comparison:
    """What was asked, where it ran, how well the forms agree and what came out."""

    options: SpeedOptions
    environment: dict
    agreement: list[dict]
    measurements: list[Measurement]

    @property
    def title(self) -> str:
        """The models' size."""
        depth = self.options.depth
        return f"SiT-{self.options.preset}" + ("" if depth is None else f" ({depth} blocks)")

    @property
    def where(self) -> str:
        """One line: where and how it was measured."""
        options, where = self.options, self.environment
        kind = {"cpu": "CPU", "cuda": "GPU"}.get(where["device"], where["device"])
        versions = f"torch {where['torch']}" + (f", CUDA {where['cuda']}" if where["cuda"] else "")
        compiled = ", compiled" if options.compile else ""
        return (f"{kind}: {where['hardware']}, CPU threads: {where['cpu_threads']}, {versions}, timm {where['timm']}, "
                f"Python {where['python']}, {where['date'][:10]}; {options.rounds} interleaved rounds{compiled}")

    def to_json(self) -> dict:
        return {**asdict(self), "definitions": DEFINITIONS}


def growth(points: list[Measurement]) -> float | None:
    """The power of the number of tokens with which time per image grows, from the first resolution to the last."""
    first, last = min(points, key=lambda m: m.resolution), max(points, key=lambda m: m.resolution)
    if first is last:
        return None
    times = math.log(last.ms_per_image.median / first.ms_per_image.median)
    return times / math.log(math.prod(last.grid_size) / math.prod(first.grid_size))
