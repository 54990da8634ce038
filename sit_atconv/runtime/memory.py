"""Free memory of a device, and the peak memory of a computation."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch.profiler import ProfilerActivity, profile


def free_bytes(device: torch.device) -> int:
    """Returns the free memory of a device, or of the machine if the device shares its memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Returns the peak memory that `run` allocates for tensors, in bytes; None if the device cannot tell.

    On a CPU, torch's allocator is traced; scratch memory inside kernel libraries is not counted.
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
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's error about a missing GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        trace.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        alive += event["args"]["Bytes"]  # negative when a block is freed
        peak = max(peak, alive)
    return peak
