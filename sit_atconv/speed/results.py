"""Results of the speed comparison, and the definitions of their figures."""

import math
from dataclasses import asdict, dataclass

from sit_atconv.speed.options import SpeedOptions
from sit_atconv.speed.timing import Rounds

DEFINITIONS = {
    "op": "the operator between the projections, with contiguous output: scaled_dot_product_attention on the output of "
    "the qkv projection, the dynamic convolution on x and kernels, a copy of x for the floor; never compiled; runs "
    "rotate among sets of inputs, on CUDA as graph replays over sets that together exceed four times the L2 cache",
    "mixer, block": "one token mixer; one transformer block; weights and arithmetic in the dtype",
    "model": "one forward of the batch without guidance",
    "train": "one training step: forward, flow-matching loss, backward, clipping, fused AdamW and EMA; weights in "
    "fp32, arithmetic autocast to the dtype; inputs are already on the device",
    "sampling": "one batch from noise to image: steps x the measured Euler step + decoding; with guidance (cfg other "
    "than 0 or 1) each step is one forward of both branches, twice the batch",
    "jump": "one batch from noise to image in one jump of a MeanFlow model: one forward without guidance + decoding",
    "train-jump": "one training step, as above, of a model with two times: by flow matching, and by MeanFlow, where "
    "every fourth sample jumps",
    "milliseconds": "time for one batch",
    "multiply_adds": "multiply-adds for one image in linears, convolutions and attention's two products; one forward, "
    "or that gradient alone",
    "speedup": "the baseline's time divided by this form's, round by round; above 1 is faster",
    "over_floor": "this form's time divided by the floor's, round by round; the floor is the same model without kernel "
    "generation and convolution",
    "over_flow": "this step's time divided by the same model's step of flow matching, round by round",
    "over_byte_floor": "this form's time divided by the time to read its inputs and write its outputs once, at the "
    "bandwidth of a large copy in the same round",
    "peak_memory_bytes": "weights, optimizer state and the largest sum of other tensors alive at once: on CUDA from "
    "max_memory_allocated, on a CPU from the allocations that torch's profiler records; null if not measured",
    "agreement": "each form compared with a second computation of the same values; error is ||a - b|| / ||b||, null if "
    "there is no second computation",
    "median, q1, q3, rounds": "median and quartiles over the rounds, and all rounds in their order",
}


@dataclass(frozen=True)
class Measurement:
    """Figures of one form at one level, resolution and dtype; DEFINITIONS explains them."""

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
    over_flow: Rounds | None = None

    @property
    def ms_per_image(self) -> Rounds:
        return Rounds.of([ms / self.batch_size for ms in self.milliseconds.rounds])


@dataclass(frozen=True)
class Comparison:
    """Options, environment, checks and measurements of one run."""

    options: SpeedOptions
    environment: dict
    agreement: list[dict]
    measurements: list[Measurement]

    @property
    def title(self) -> str:
        """Size of the models."""
        depth = self.options.depth
        return f"SiT-{self.options.preset}" + ("" if depth is None else f" ({depth} blocks)")

    @property
    def where(self) -> str:
        """One line about hardware, versions, date and rounds."""
        options, where = self.options, self.environment
        kind = {"cpu": "CPU", "cuda": "GPU"}.get(where["device"], where["device"])
        versions = f"torch {where['torch']}" + (f", CUDA {where['cuda']}" if where["cuda"] else "")
        compiled = ", compiled" if options.compile else ""
        return (
            f"{kind}: {where['hardware']}, CPU threads: {where['cpu_threads']}, {versions}, timm {where['timm']}, "
            f"Python {where['python']}, {where['date'][:10]}; {options.rounds} interleaved rounds{compiled}"
        )

    def to_json(self) -> dict:
        return {**asdict(self), "definitions": DEFINITIONS}


def growth(points: list[Measurement]) -> float | None:
    """Returns p if time per image grows as N^p with N tokens, from the smallest resolution to the largest.

    None if there is one resolution only.
    """
    first, last = min(points, key=lambda m: m.resolution), max(points, key=lambda m: m.resolution)
    if first is last:
        return None
    times = math.log(last.ms_per_image.median / first.ms_per_image.median)
    return times / math.log(math.prod(last.grid_size) / math.prod(first.grid_size))
