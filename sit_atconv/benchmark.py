"""The speed comparison: one preset with attention and with ATConv, timed side by side in one run.

Every round times each model once (ABAB...), so that whatever else the machine does meets both alike, and ratios are
taken round by round. Weights are random: a freshly initialised SiT outputs zeros, and zeros can be faster.
"""

import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from sit_atconv.models.sit import PRESETS, SiT, preset_config
from sit_atconv.sampling import guided, sample_ode

MIXERS = {"attention": "SiT-{}", "atconv": "SiT-ATConv-{}"}  # the first is what the others are compared with
BASELINE = "attention"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOOP_STEPS = 2  # Euler steps that are timed and then scaled to the number asked for
MIB = 2**20

DEFINITIONS = {
    "parameters": "all of them, the frozen position table included, which grows with the resolution",
    "multiply_adds": "of one forward of one image: linears, convolutions and attention's two products "
    "(torch's FlopCounterMode, halved)",
    "forward_ms": "milliseconds for one forward of the batch, no guidance",
    "images_per_second": f"batch / (steps x seconds per step), from a measured loop of {LOOP_STEPS} Euler steps; with "
    "guidance (cfg other than 0 or 1) each step is one forward of both branches, twice the batch; without the "
    "latent decoder",
    "weight_bytes": "of the parameters in their dtype",
    "peak_memory_bytes": "weight_bytes and the largest sum of tensors alive at once while sampling: on CUDA from "
    "max_memory_allocated, on a CPU from the allocations that torch's profiler records; null elsewhere",
    "speedups": "speed over attention's (above 1 is faster), round by round",
    "median, q1, q3, rounds": "over the rounds, in the order in which they ran",
}


@dataclass(frozen=True)
class SpeedOptions:
    """What to time.

    Args:
        preset: size and patch, e.g. "XL/2", which stands for SiT-XL/2 and SiT-ATConv-XL/2.
        depth: number of blocks, if not the preset's.
        resolutions: sides of the square images in pixels.
        downsample: pixels of an image for one of the model's input; 8 for SD-VAE latents, 1 in pixel space.
        channels: of the model's input; 4 for SD-VAE latents.
        dtypes: of weights and arithmetic, "fp32", "bf16" or "fp16"; the sampled state stays in fp32.
        batch_size: images at a time.
        steps: Euler steps in which an image is sampled.
        cfg: guidance scale.
        rounds: how often each model is timed.
        warmup: rounds before those, which are thrown away.
        device: a torch device, or "auto" for the accelerator if there is one.

    Raises:
        ValueError: a value out of range, an unknown name, or a resolution that the patches do not tile.
    """

    preset: str = "S/2"
    depth: int | None = None
    resolutions: tuple[int, ...] = (256, 512)
    downsample: int = 8
    channels: int = 4
    dtypes: tuple[str, ...] = ("fp32",)
    batch_size: int = 1
    steps: int = 50
    cfg: float = 4.0
    rounds: int = 5
    warmup: int = 1
    device: str = "auto"

    def __post_init__(self):
        for name in ("depth", "downsample", "channels", "batch_size", "steps", "rounds"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.warmup < 0:
            raise ValueError(f"warmup must not be negative: {self.warmup}")
        if not math.isfinite(self.cfg):
            raise ValueError(f"cfg must be a finite number, not {self.cfg}")
        for name in ("resolutions", "dtypes"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be one or more different values, not {list(values)}")
        if unknown := set(self.dtypes) - set(DTYPES):
            raise ValueError(f"dtypes must be among {', '.join(DTYPES)}, not {', '.join(sorted(unknown))}")
        if MIXERS[BASELINE].format(self.preset) not in PRESETS:
            known = [name.removeprefix("SiT-") for name, config in PRESETS.items() if config["mixer"] == BASELINE]
            raise ValueError(f"there is no preset {self.preset!r}; give size and patch, one of {', '.join(known)}")
        tile = self.downsample * preset_config(MIXERS[BASELINE].format(self.preset))["patch_size"]
        for resolution in self.resolutions:
            if resolution < tile or resolution % tile:
                below = max(1, resolution // tile) * tile
                raise ValueError(
                    f"resolution {resolution} is not a multiple of {tile} (downsample {self.downsample} x patch "
                    f"{tile // self.downsample}): give {below} or {below + tile}"
                )

    def model_config(self, mixer: str, resolution: int) -> dict:
        """The constructor's arguments of the model with this mixer at this resolution."""
        config = preset_config(MIXERS[mixer].format(self.preset))
        overrides = {"input_size": resolution // self.downsample, "in_channels": self.channels}
        return {**config, **overrides, **({} if self.depth is None else {"depth": self.depth})}


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


@dataclass(frozen=True)
class Measurement:
    """One model at one resolution in one dtype; DEFINITIONS says what each figure means."""

    preset: str
    mixer: str
    resolution: int
    dtype: str
    parameters: int
    multiply_adds: int
    forward_ms: Rounds
    images_per_second: Rounds
    weight_bytes: int
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Speedup:
    """A mixer's speed over attention's, from the ratios of the single rounds; above 1 is faster."""

    mixer: str
    resolution: int
    dtype: str
    forward: Rounds
    sampling: Rounds


@dataclass(frozen=True)
class Comparison:
    """What was asked, where it ran and what came out."""

    options: SpeedOptions
    environment: dict
    measurements: list[Measurement]
    speedups: list[Speedup]

    def to_json(self) -> dict:
        return {**asdict(self), "definitions": DEFINITIONS}


def compare(
    options: SpeedOptions, *, clock: Callable[[], float] = time.perf_counter, progress: bool = False
) -> Comparison:
    """Times the preset with every mixer, at each resolution and in each dtype.

    Args:
        options: what to time.
        clock: returns seconds.
        progress: draw a bar on stderr.

    Raises:
        ValueError: the device is not there, does not compute in one of the dtypes, or has too little memory.
    """
    device = open_device(options.device)
    for dtype in options.dtypes:
        check_dtype(device, dtype)
    measurements, speedups = [], []
    cases = [(resolution, dtype) for dtype in options.dtypes for resolution in options.resolutions]
    total = len(cases) * (options.rounds + options.warmup)
    with tqdm(total=total, unit="round", disable=not progress) as bar:
        for resolution, dtype in cases:
            bar.set_description(f"{options.preset} {resolution} px {dtype}")
            try:
                found = measure(options, resolution, dtype, device, clock=clock, after_round=bar.update)
            except torch.cuda.OutOfMemoryError:
                raise ValueError(f"{resolution} px in {dtype} with batch_size {options.batch_size} does not fit into "
                                 f"the memory of {device}: lower the batch size") from None
            measurements += found
            speedups += [speedup(found[0], other) for other in found[1:]]
    return Comparison(options, describe_environment(device), measurements, speedups)


def speedup(baseline: Measurement, other: Measurement) -> Speedup:
    """The ratios of two models timed in the same rounds."""
    before, after = baseline.forward_ms.rounds, other.forward_ms.rounds
    slow, fast = baseline.images_per_second.rounds, other.images_per_second.rounds
    return Speedup(
        mixer=other.mixer,
        resolution=other.resolution,
        dtype=other.dtype,
        forward=Rounds.of([a / b for a, b in zip(before, after, strict=True)]),
        sampling=Rounds.of([b / a for a, b in zip(slow, fast, strict=True)]),
    )


# ----------------------------------------------------------------------------------------------------- measuring

@torch.inference_mode()
def measure(
    options: SpeedOptions,
    resolution: int,
    dtype: str,
    device: torch.device,
    *,
    clock: Callable[[], float] = time.perf_counter,
    after_round: Callable[[], object] = lambda: None,
) -> list[Measurement]:
    """One measurement for each of MIXERS, in that order, all from the same rounds."""
    generator = torch.Generator(device).manual_seed(0)
    B, side = options.batch_size, resolution // options.downsample
    noise = torch.randn(B, options.channels, side, side, generator=generator, device=device)
    t = torch.rand(B, generator=generator, device=device)
    models = {mixer: random_model(options.model_config(mixer, resolution), dtype, device) for mixer in MIXERS}
    y = torch.arange(B, device=device) % models[BASELINE].config.num_classes

    def sample(model: SiT) -> Tensor:
        return sample_ode(guided(model, y, cfg=options.cfg), noise, num_steps=LOOP_STEPS)

    forwards = {("forward", mixer): partial(model, noise, t, y) for mixer, model in models.items()}
    samplings = {("sampling", mixer): partial(sample, model) for mixer, model in models.items()}
    seconds = time_interleaved(
        forwards | samplings,
        rounds=options.rounds,
        warmup=options.warmup,
        synchronize=partial(synchronize, device),
        clock=clock,
        after_round=after_round,
    )

    measurements = []
    for mixer, model in models.items():
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        peak = peak_bytes(samplings["sampling", mixer], device)
        measurements.append(Measurement(
            preset=MIXERS[mixer].format(options.preset),
            mixer=mixer,
            resolution=resolution,
            dtype=dtype,
            parameters=sum(p.numel() for p in model.parameters()),
            multiply_adds=multiply_adds(options.model_config(mixer, resolution)),
            forward_ms=Rounds.of([1000 * s for s in seconds["forward", mixer]]),
            images_per_second=Rounds.of([B * LOOP_STEPS / (options.steps * s) for s in seconds["sampling", mixer]]),
            weight_bytes=weights,
            peak_memory_bytes=None if peak is None else weights + peak,
        ))
    return measurements


def time_interleaved(
    runs: dict[Hashable, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    synchronize: Callable[[], object],
    clock: Callable[[], float],
    after_round: Callable[[], object] = lambda: None,
) -> dict[Hashable, list[float]]:
    """Runs all of `runs` in turn, round after round. The seconds that each took, but for the `warmup` first rounds."""
    seconds = {name: [] for name in runs}
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


def random_model(config: dict, dtype: str, device: torch.device) -> SiT:
    """SiT(**config) with every parameter drawn from a normal distribution, the same at every call."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        model = SiT(**config)
    weights = {
        name: 0.02 * torch.randn(tensor.shape, generator=generator, device=device, dtype=DTYPES[dtype])
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(weights, assign=True)
    return model.eval()


def multiply_adds(config: dict) -> int:
    """Multiply-adds of SiT(**config) for one image at its `input_size`; computes nothing and allocates nothing.

    Counted are linears, convolutions and attention's two products, as the published figures do.
    """
    with FakeTensorMode():
        model = SiT(**config)
        x = torch.empty(1, model.config.in_channels, model.config.input_size, model.config.input_size)
        # As plain matrix products, attention is counted by every version of torch.
        with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
            model(x, torch.empty(1), torch.empty(1, dtype=torch.int64))
    return counter.get_total_flops() // 2


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """The largest sum of tensors that `run` has alive at once, beyond those alive before; None where it is not known.

    On a CPU these are the blocks of torch's allocator; scratch memory inside the kernels' libraries stays unseen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type == "cpu":
        return _peak_of_trace(run)
    return None


def _peak_of_trace(run: Callable[[], object]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library reports a missing GPU as an error
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        trace.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        alive += event["args"]["Bytes"]  # negative where a block is freed
        peak = max(peak, alive)
    return peak


# -------------------------------------------------------------------------------------------------------- device

def open_device(name: str) -> torch.device:
    """"auto" -> the accelerator if there is one, else the CPU. ValueError: torch cannot use that device here."""
    if name == "auto":
        name = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises either
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}): give cpu, or leave it out") from None


def check_dtype(device: torch.device, dtype: str) -> None:
    """ValueError: the device has no kernels for `dtype`, tried on a model of one narrow block of each mixer."""
    tiny = dict(input_size=4, hidden_size=8, depth=2, num_heads=2, mixer="hybrid", num_classes=1)
    model = random_model(tiny, dtype, device)
    try:
        with torch.inference_mode():
            model(torch.zeros(1, 4, 4, 4, device=device), torch.zeros(1, device=device),
                  torch.zeros(1, device=device, dtype=torch.int64))
    except RuntimeError:
        others = " or ".join(name for name in DTYPES if name != dtype)
        raise ValueError(f"{dtype} does not run on this {device.type}: use {others}") from None


def synchronize(device: torch.device) -> None:
    """Waits for all that was asked of the device; a CPU has nothing pending."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def describe_environment(device: torch.device) -> dict:
    """Hardware, versions and date, without which a speed means nothing."""
    return {
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------------------------- showing

def describe(comparison: Comparison) -> str:
    """One line: where and how it was measured."""
    options, where = comparison.options, comparison.environment
    threads = f", threads: {where['cpu_threads']}" if where["device"] == "cpu" else ""
    return (f"{where['hardware']}{threads}, torch {where['torch']}, {where['date'][:10]}; "
            f"batch {options.batch_size}, {options.rounds} rounds")


def table(comparison: Comparison) -> str:
    """The comparison as Markdown: medians, in brackets the quartiles."""
    options = comparison.options
    depth = "" if options.depth is None else f", {options.depth} blocks only"
    speedups = {(s.mixer, s.resolution, s.dtype): s for s in comparison.speedups}
    lines = [
        f"**{options.preset}{depth}: attention and ATConv.** {describe(comparison)}.",
        "",
        f"| px | dtype | model | parameters | GMACs / image | ms / forward | images/s, {options.steps} Euler steps, "
        f"cfg {options.cfg:g} | peak memory, MiB | speed / attention's, forward | speed / attention's, sampling |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for m in comparison.measurements:
        ratio = speedups.get((m.mixer, m.resolution, m.dtype))
        cells = [
            f"{m.resolution}",
            m.dtype,
            m.preset,
            f"{m.parameters:,}",
            f"{m.multiply_adds / 1e9:.2f}",
            _cell(m.forward_ms),
            _cell(m.images_per_second),
            "not measured" if m.peak_memory_bytes is None else f"{m.peak_memory_bytes / MIB:.1f}",
            *([_cell(ratio.forward, ".2f"), _cell(ratio.sampling, ".2f")] if ratio else ["", ""]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    keys = ("multiply_adds", "images_per_second", "peak_memory_bytes", "speedups")
    return "\n".join([*lines, "", *(f"- {key}: {DEFINITIONS[key]}." for key in keys)])


def _cell(rounds: Rounds, form: str = ".4g") -> str:
    return f"{rounds.median:{form}} ({rounds.q1:{form}}-{rounds.q3:{form}})"


def save_chart(comparison: Comparison, path: Path) -> None:
    """Draws ms per forward: a row of panels for each dtype, a panel for each resolution, a bar for each mixer."""
    options = comparison.options
    rows, columns = len(options.dtypes), len(options.resolutions)
    figure = Figure(figsize=(max(6.4, 2.9 * columns + 0.6), 3.3 * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for row, dtype in enumerate(options.dtypes):
        for column, resolution in enumerate(options.resolutions):
            here = (resolution, dtype)
            bars = [m for m in comparison.measurements if (m.resolution, m.dtype) == here]
            ratios = {s.mixer: s.forward for s in comparison.speedups if (s.resolution, s.dtype) == here}
            _draw_panel(panels[row, column], bars, ratios)
            panels[row, column].set_title(f"{resolution} x {resolution} px, {dtype}", fontsize=10)
        panels[row, 0].set_ylabel("ms per forward (lower is better)")
    depth = "" if options.depth is None else f" ({options.depth} blocks)"
    figure.suptitle(f"SiT-{options.preset}{depth}: ATConv against attention", fontsize=12, fontweight="bold")
    figure.supxlabel(f"{describe(comparison)}\nmedians; lines from quartile to quartile", fontsize=7.5, color="0.35")
    figure.savefig(path, format="png", dpi=150)


def _draw_panel(axes, bars: list[Measurement], ratios: dict[str, Rounds]) -> None:
    colors = {"attention": "#75808c", "atconv": "#2a6f97"}
    names = {"attention": "attention", "atconv": "ATConv"}
    top = max(m.forward_ms.q3 for m in bars)
    for place, m in enumerate(bars):
        ms = m.forward_ms
        axes.bar(place, ms.median, width=0.62, color=colors[m.mixer], zorder=2)
        axes.vlines(place, ms.q1, ms.q3, color="0.15", linewidth=1.4, zorder=3)
        axes.text(place, ms.median / 2, f"{ms.median:.3g} ms", ha="center", va="center", color="white",
                  fontsize=10, fontweight="bold", zorder=4)
        if m.mixer in ratios:
            axes.text(place, ms.q3 + 0.03 * top, f"{ratios[m.mixer].median:.2f}x the speed", ha="center", va="bottom",
                      color=colors[m.mixer], fontsize=11, fontweight="bold")
    axes.set_xticks(range(len(bars)), [names[m.mixer] for m in bars])
    axes.set_xlim(-0.6, len(bars) - 0.4)
    axes.set_ylim(0, 1.18 * top)
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", zorder=0)
