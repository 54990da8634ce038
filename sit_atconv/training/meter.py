"""What a run tells of itself: sums kept on the device and read when a line is due, and trackers that show them."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available, is_wandb_available
from torch import Tensor
from tqdm import tqdm

TIME_BUCKETS = 5
PEAK_TFLOPS = {  # dense bf16 products of one device, by its makers' data sheets; TF32 is half of it. First match wins
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362, "L40": 181,
    "L4": 121, "RTX 4090": 165, "RTX 3090": 71, "MI300X": 1307,
}


def peak_tflops(device: torch.device, precision: str, tf32: bool) -> float | None:
    """What the device computes at most, in TFLOP/s; None where that is not known."""
    if device.type != "cuda" or (precision == "fp32" and not tf32):
        return None
    name = torch.cuda.get_device_name(device)
    found = [peak for part, peak in PEAK_TFLOPS.items() if part in name]
    return found[0] / (2 if precision == "fp32" else 1) if found else None


class Meter:
    """Losses, also by time, gradient norms and seconds, since the last line of the log.

    Args:
        device: where losses come from.
        gflops_per_image: of forward and backward, without what is computed a second time to save memory.
        peak: TFLOP/s of the device, if known.
    """

    def __init__(self, device: torch.device, gflops_per_image: float, peak: float | None = None):
        self.device, self.gflops_per_image, self.peak = device, gflops_per_image, peak
        self.process = psutil.Process()
        self._restart()

    def _restart(self) -> None:
        self.sums = torch.zeros(TIME_BUCKETS, device=self.device)
        self.counts = torch.zeros(TIME_BUCKETS, device=self.device)
        self.norms = torch.zeros(2, device=self.device)  # their sum, and how many
        self.others: dict[str, Tensor] = {}  # sums of further loss terms
        self.images, self.seconds, self.start = 0, {"data": 0.0, "pause": 0.0}, time.perf_counter()

    def add(self, losses: Tensor, t: Tensor, readable: Tensor, others: dict[str, Tensor] | None = None) -> None:
        """Adds a micro-batch: losses (B,) at times (B,). Those not `readable` (B,) are 0 and do not count.

        `others` are further terms (B,), logged by name.
        """
        bucket = (t * TIME_BUCKETS).long().clamp(max=TIME_BUCKETS - 1)
        self.sums.index_add_(0, bucket, losses)
        self.counts.index_add_(0, bucket, readable.to(losses.dtype))
        self.images += len(losses)
        for name, term in (others or {}).items():
            self.others[name] = self.others.get(name, 0.0) + term.detach().sum()

    def add_norm(self, norm: Tensor) -> None:
        """Of a step's gradient, 0-d; one that is not finite, as fp16 has them now and then, does not count."""
        self.norms += torch.stack([norm, torch.ones_like(norm)]).where(norm.isfinite(), 0.0)

    @contextlib.contextmanager
    def timed(self, part: Literal["data", "pause"]) -> Iterator[None]:
        """Measures a block: waiting for "data", or a "pause" (saving, drawing), which is not counted as training."""
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def read(self, accelerator: Accelerator) -> dict:
        """All of it since the last call, over all processes, which must all call it; waits for the device.

        `loss`, `loss_by_time` (None where no time fell), further loss terms by name, `grad_norm` before clipping (None
        if never finite), `images_per_second`, `data_wait` (share of this process's time), `memory_gb` (the device's
        peak; on a CPU, what is resident), `tflops_per_second` of each process's device and its share `mfu` of what the
        device can do, if that is known.
        """
        everyone = accelerator.reduce(torch.stack([self.sums, self.counts]), "sum")
        (sums, counts), (norms, steps) = everyone.tolist(), self.norms.tolist()
        others = {name: accelerator.reduce(total, "sum").item() for name, total in self.others.items()}
        seconds = time.perf_counter() - self.start - self.seconds["pause"]
        on_gpu = self.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self.device) if on_gpu else self.process.memory_info().rss
        line = {
            "loss": sum(sums) / max(1, sum(counts)),
            "loss_by_time": [total / count if count else None for total, count in zip(sums, counts, strict=True)],
            **{name: total / max(1, sum(counts)) for name, total in others.items()},
            "grad_norm": norms / steps if steps else None,
            "images_per_second": self.images * accelerator.num_processes / seconds,
            "data_wait": self.seconds["data"] / seconds,
            "memory_gb": memory / 1e9,
            "tflops_per_second": self.images * self.gflops_per_image / 1e3 / seconds,
        }
        if self.peak:
            line["mfu"] = line["tflops_per_second"] / self.peak
        self._restart()
        return line


# ------------------------------------------------------------------------------------------------------ trackers

def check_tracker(name: str | None) -> None:
    """ValueError: the tracker is not installed."""
    available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    if name is not None and not available[name]():
        raise ValueError(f"train.tracker {name} is not installed: pip install 'sit-atconv[trackers]', or leave it out; "
                         "stats.jsonl and loss.png are always written")


class Tracker:
    """TensorBoard or wandb, through accelerate. One that fails is given up, aloud; the run goes on.

    Args:
        accelerator: made with `log_with` and `project_dir`.
        name: "tensorboard", "wandb" or None.
        run: the run's folder; TensorBoard's files lie in its folder `tensorboard`.
        options: the run's configuration, flat.
        step: where the run goes on; TensorBoard forgets what it has seen beyond it.

    Raises:
        ValueError: it cannot be started.
    """

    def __init__(self, accelerator: Accelerator, name: str | None, run: Path, options: dict, step: int = 0):
        self.accelerator, self.name = accelerator, name
        if name is None:
            return
        plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in options.items()}
        project, its_own = {
            "tensorboard": ("tensorboard", {"purge_step": step + 1}),
            "wandb": ("sit-atconv", {"name": run.name, "dir": str(run)}),
        }[name]
        try:
            accelerator.init_trackers(project, config=plain, init_kwargs={name: its_own})
        except Exception as error:  # whatever its library raises
            raise ValueError(f"train.tracker {name} cannot be started ({_reason(error)}): mend that, or leave it "
                             "out") from error

    def log(self, line: dict, step: int) -> None:
        """A line of the log; lists become one value each, name/0, name/1, ..."""
        values = {}
        for key, value in line.items():
            parts = enumerate(value) if isinstance(value, list) else [(None, value)]
            values |= {key if i is None else f"{key}/{i}": part for i, part in parts if part is not None}
        self._try(lambda: self.accelerator.log(values, step=step))

    def end(self) -> None:
        self._try(lambda: [tracker.finish() for tracker in self.accelerator.trackers])

    def _try(self, send) -> None:
        if self.name is None:
            return
        try:
            send()
        except Exception as error:  # whatever its library raises
            tqdm.write(f"warning: train.tracker {self.name} failed ({_reason(error)}) and is given up; stats.jsonl and "
                       "loss.png go on", file=sys.stderr)
            self.name = None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]

