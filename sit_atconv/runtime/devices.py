"""Which device a command runs on, known before any process group starts, and how a CPU is made ready for work."""

import ctypes
import os
import sys

import psutil
import torch


def on_cpu() -> bool:
    """Whether accelerate will run on the CPU: no accelerator here, or `accelerate launch --cpu`.

    To be passed on as `Accelerator(cpu=on_cpu())`: without it several processes on a CPU do not find each other, and
    each believes that it is alone.
    """
    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return forced or not torch.accelerator.is_available()


def open_device(name: str) -> torch.device:
    """"auto" -> the accelerator if there is one, else the CPU. ValueError: torch cannot use that device here."""
    if name == "auto":
        name = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises either
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}): give cpu, or leave it out") from None


def synchronize(device: torch.device) -> None:
    """Waits for all that was asked of the device; a CPU has nothing pending."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def prepare_device(device: torch.device, cpu_threads: int | None = None, tf32: bool = True) -> None:
    """What makes a device fast: threads and memory of a CPU, fp32 products in TF32 on CUDA if `tf32`."""
    if device.type == "cpu":
        share_cores(cpu_threads)
        keep_freed_memory()
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


def has_fused_optimizers(device: torch.device) -> bool:
    return device.type in ("cuda", "cpu", "mps", "xpu")


def share_cores(threads: int | None = None) -> None:
    """Gives torch `threads` CPU threads; None is this process's share of the machine's physical cores.

    (Left alone, `accelerate launch` gives each process one.)
    """
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def keep_freed_memory() -> None:
    """Lets this process use large blocks that it has freed again, instead of returning each to the system.

    glibc returns what is above 32 MiB at once, and the system clears every page anew at the next allocation.
    Does nothing where there is no glibc.
    """
    _set_malloc(mmap_max=0, trim_threshold=2**31 - 1)


def return_freed_memory() -> None:
    """Undoes `keep_freed_memory`, and returns what was kept: before work whose blocks are few and very large."""
    if libc := _set_malloc(mmap_max=65_536, trim_threshold=128 * 1024):  # glibc's own
        libc.malloc_trim(0)


def _set_malloc(mmap_max: int, trim_threshold: int) -> ctypes.CDLL | None:
    """Returns the C library where it is glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):
        return None
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and numbers of malloc.h
    libc.mallopt(M_MMAP_MAX, mmap_max)
    libc.mallopt(M_TRIM_THRESHOLD, trim_threshold)
    return libc
