"""Log of a run: sums kept on the device and read when a line is due, and trackers that show them."""

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
PEAK_TFLOPS = {  # dense bf16 products of one device, from data sheets; TF32 is half of it. The first match counts
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "MI300X": 1307,
}


def peak_tflops(device: torch.device, precision: str, tf32: bool) -> float | None:
    """Returns the peak TFLOP/s of the device in a precision; None if unknown."""
    if device.type != "cuda" or (precision == "fp32" and not tf32):
        return None
    name = torch.cuda.get_device_name(device)
    found = [peak for part, peak in PEAK_TFLOPS.items() if part in name]
    return found[0] / (2 if precision == "fp32" else 1) if found else None


class Meter:
    """Losses in total and by flow time, gradient norms and seconds, since the last line of the log.

    Args:
        device: device of the losses.
        gflops_per_image: GFLOP of forward and backward, without recomputation by activation checkpointing.
        gflops_of_auxiliary: those of the auxiliary loss, in steps that have it.
        peak: peak TFLOP/s of the device; None if unknown.
    """

    def __init__(
        self,
        device: torch.device,
        gflops_per_image: float,
        peak: float | None = None,
        gflops_of_auxiliary: float = 0.0,
    ):
        self.device, self.gflops_per_image, self.peak = device, gflops_per_image, peak
        self.gflops_of_auxiliary = gflops_of_auxiliary
        self.process = psutil.Process()
        self._restart()

    def _restart(self) -> None:
        self.sums = torch.zeros(TIME_BUCKETS, device=self.device)
        self.counts = torch.zeros(TIME_BUCKETS, device=self.device)
        self.norms = torch.zeros(2, device=self.device)  # their sum and number
        self.others: dict[str, Tensor] = {}  # of further loss terms, sum and number of images
        self.images, self.gflops, self.seconds, self.start = 0, 0.0, {"data": 0.0, "pause": 0.0}, time.perf_counter()

    def add(
        self,
        losses: Tensor,
        t: Tensor,
        readable: Tensor,
        others: dict[str, Tensor] | None = None,
        has_auxiliary: bool = False,
    ) -> None:
        """Adds losses (B,) at times (B,) of a micro-batch, and further terms by name, each (B,).

        Images that are not `readable` (B,) have the loss 0 and do not count.
        """
        bucket = (t * TIME_BUCKETS).long().clamp(max=TIME_BUCKETS - 1)
        self.sums.index_add_(0, bucket, losses)
        self.counts.index_add_(0, bucket, readable.to(losses.dtype))
        self.images += len(losses)
        self.gflops += len(losses) * (self.gflops_per_image + (self.gflops_of_auxiliary if has_auxiliary else 0.0))
        for name, term in (others or {}).items():
            self.others[name] = self.others.get(name, 0.0) + torch.stack([term.detach().sum(), readable.sum()])

    def add_norm(self, norm: Tensor) -> None:
        """Adds the gradient norm of a step, 0-d; a norm that is not finite (possible in fp16) does not count."""
        self.norms += torch.stack([norm, torch.ones_like(norm)]).where(norm.isfinite(), 0.0)

    @contextlib.contextmanager
    def timed(self, part: Literal["data", "pause"]) -> Iterator[None]:
        """Times a block that waits for "data", or is a "pause" from training: saving, drawing."""
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def read(self, accelerator: Accelerator) -> dict:
        """Returns the log of all processes since the last call; all must call it. Waits for the device.

        Returns:
            `loss`, `loss_by_time` (None for a part without times), further loss terms by name, `grad_norm` before
            clipping (None if never finite), `images_per_second`, `data_wait` (share of this process's time),
            `memory_gb` (peak of the device; on a CPU, resident memory), `tflops_per_second` of one device and, if its
            peak is known, the share `mfu` of the peak.
        """
        everyone = accelerator.reduce(torch.stack([self.sums, self.counts]), "sum")
        (sums, counts), (norms, steps) = everyone.tolist(), self.norms.tolist()
        others = {name: accelerator.reduce(total, "sum").tolist() for name, total in self.others.items()}
        seconds = time.perf_counter() - self.start - self.seconds["pause"]
        on_gpu = self.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self.device) if on_gpu else self.process.memory_info().rss
        line = {
            "loss": sum(sums) / max(1, sum(counts)),
            "loss_by_time": [total / count if count else None for total, count in zip(sums, counts, strict=True)],
            **{name: total / max(1, count) for name, (total, count) in others.items()},
            "grad_norm": norms / steps if steps else None,
            "images_per_second": self.images * accelerator.num_processes / seconds,
            "data_wait": self.seconds["data"] / seconds,
            "memory_gb": memory / 1e9,
            "tflops_per_second": self.gflops / 1e3 / seconds,
        }
        if self.peak:
            line["mfu"] = line["tflops_per_second"] / self.peak
        self._restart()
        return line


# ------------------------------------------------------------------------------------------------------ trackers


def check_tracker(name: str | None) -> None:
    """Raises ValueError if the tracker is not installed."""
    available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    if name is not None and not available[name]():
        raise ValueError(
            f"train.tracker {name} is not installed: pip install 'sit-atconv[trackers]', or leave it out; "
            "stats.jsonl and loss.png are always written"
        )


class Tracker:
    """TensorBoard, wandb or none, through an accelerator created with `log_with` and `project_dir`.

    If the tracker fails, it is switched off with a warning, and training continues. TensorBoard writes to the subfolder
    `tensorboard` of the run, and drops points later than the step from which the run resumes.

    Raises:
        ValueError: the tracker cannot be started.
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
            raise ValueError(
                f"train.tracker {name} cannot be started ({_reason(error)}): fix this, or leave it out"
            ) from error

    def log(self, line: dict, step: int) -> None:
        """Sends a line of the log; the elements of a list are named NAME/0, NAME/1, ..."""
        values: dict[str, float] = {}
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
            tqdm.write(
                f"warning: train.tracker {self.name} failed ({_reason(error)}) and is switched off; stats.jsonl "
                "and loss.png are still written",
                file=sys.stderr,
            )
            self.name = None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
