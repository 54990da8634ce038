"""Choice of the device before any process group starts, and CPU set-up: threads and memory."""

import ctypes
import os
import sys

import joblib
import torch


def on_cpu() -> bool:
    """True if accelerate will run on the CPU: without an accelerator, or by `accelerate launch --cpu`.

    Pass it as `Accelerator(cpu=on_cpu())`: without it, several CPU processes form no group and each acts as rank 0.
    """
    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return forced or not torch.accelerator.is_available()


def open_device(name: str) -> torch.device:
    """Returns the device of a name; "auto" is the accelerator if available, else the CPU.

    Raises:
        ValueError: torch cannot use that device on this machine.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = accelerator.type if accelerator else "cpu"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises either
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {name!r} is not available ({reason}): give cpu, or omit the option") from None


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def prepare_device(device: torch.device, cpu_threads: int | None = None, tf32: bool = True) -> None:
    """Sets threads and malloc of a CPU, and whether CUDA multiplies fp32 matrices in TF32."""
    if device.type == "cpu":
        share_cores(cpu_threads)
        keep_freed_memory()
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


def has_fused_optimizers(device: torch.device) -> bool:
    """True if torch has fused optimizer kernels for the device."""
    return device.type in ("cuda", "cpu", "mps", "xpu")


def share_cores(threads: int | None = None) -> None:
    """Sets torch's CPU threads; None means this process's share of the cores.

    (`accelerate launch` would give each process a single thread.)
    """
    torch.set_num_threads(threads or max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def usable_cores() -> int:
    """Returns the number of physical cores, or of the CPUs that this process may use if they are fewer.

    Slurm, taskset and containers limit them. More threads than CPUs make every operator wait, many times over.
    """
    return joblib.cpu_count(only_physical_cores=True)


def keep_freed_memory() -> None:
    """Makes glibc reuse large freed blocks instead of returning them to the system.

    glibc returns blocks above 32 MiB immediately, and the kernel then clears every page at the next allocation. Has no
    effect with another C library.
    """
    _set_malloc(mmap_max=0, trim_threshold=2**31 - 1)


def return_freed_memory() -> None:
    """Undoes `keep_freed_memory` and returns cached memory, for work with few but very large blocks."""
    if libc := _set_malloc(mmap_max=65_536, trim_threshold=128 * 1024):  # glibc's own
        libc.malloc_trim(0)


def _set_malloc(mmap_max: int, trim_threshold: int) -> ctypes.CDLL | None:
    """Sets two limits of glibc's malloc and returns the library; None if the C library is another one."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):
        return None
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and numbers of malloc.h
    libc.mallopt(M_MMAP_MAX, mmap_max)
    libc.mallopt(M_TRIM_THRESHOLD, trim_threshold)
    return libc
