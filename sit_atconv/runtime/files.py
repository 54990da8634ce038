"""Atomic writes, folder locks, hub ids, checksums and free disk space."""

import contextlib
import hashlib
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL = ".partial-"  # prefix of a file that is not complete yet


def write_aside(
    path: Path, content: str | bytes | Callable[[Path], object], durable: bool = False, writer: str = ""
) -> None:
    """Writes a file atomically: it is written under a temporary name and renamed when complete.

    Args:
        path: the file to write.
        content: text, bytes, or a function that writes to the path it is given. On an error nothing is left behind.
        durable: flush to disk, so that the file survives a power failure.
        writer: a unique name of this process, if others may write the same file at the same time.

    Raises:
        OSError: the write failed, e.g. because the disk is full; the message names the file.
    """
    with _renamed(path, writer, durable) as partial:
        if callable(content):
            content(partial)
        else:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
        if durable:
            flush(partial)


def write_folder_aside(folder: Path, content: Callable[[Path], object]) -> None:
    """Writes a folder atomically: it is filled under a temporary name and renamed when complete.

    Args:
        folder: the folder to write; it must not exist, or be empty.
        content: a function that fills the folder it is given. On an error nothing is left behind.

    Raises:
        OSError: the write failed, or the folder is not empty; the message names the folder.
    """
    with _renamed(folder) as partial:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        content(partial)
        for path in partial.rglob("*.safetensors"):
            path.chmod(0o666 & ~_umask())  # safetensors makes files readable by their owner only


@contextlib.contextmanager
def _renamed(path: Path, writer: str = "", durable: bool = False) -> Iterator[Path]:
    """Yields a temporary path that is renamed to `path` afterwards; deletes it on any error."""
    partial = path.with_name(PARTIAL + writer + path.name)
    try:
        yield partial
        os.replace(partial, path)
        if durable:
            flush(path.parent)
    except BaseException as error:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise OSError(
                f"{path} cannot be written ({error.strerror or error}): fix the cause and run the same command again"
            ) from error
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def flush(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Creates the folder and locks it until the block ends or the process dies.

    Raises:
        ValueError: another process holds the lock; the message names it.
        OSError: the folder cannot be written to.
    """
    # Not filelock (4.3): it needs Python 3.11, and raises on file systems without locks, so it would replace little.
    import fcntl  # missing on Windows, where everything else works

    path = folder / ".lock"
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+")  # noqa: SIM115
        except OSError as error:
            raise OSError(f"{folder} cannot be written to ({error.strerror or error}): give another --out") from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, no worker of a loader inherits it
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ValueError(
                f"{folder} is in use by {file.read() or 'another process'}: wait until that has ended"
            ) from None
        except OSError as error:  # a file system without locks
            print(
                f"warning: {folder} cannot be locked ({error.strerror}): let only one command at a time write to it",
                file=sys.stderr,
            )
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            break
        file.close()  # the previous holder deleted the file before we locked it: our lock protects nothing
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def hub_options(name: str) -> dict:
    """Returns arguments for the hub's functions, so that a missing local path is never sent there.

    Args:
        name: the user's input, which is not an existing folder: a hub id `owner/name`, or a path.

    Returns:
        `local_files_only` is true if a folder `owner` exists: `name` may then be a path, and only the cache is used.

    Raises:
        ValueError: `name` is not a valid hub id.
    """
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise ValueError(f"there is no folder {name}, and it is not a hub id (owner/name)")
    return {"local_files_only": Path(name).parent.is_dir()}


def weights_variant(folder: Path) -> str | None:
    """Returns the diffusers variant of saved weights, such as fp16; None if some have no variant."""
    found = [
        re.fullmatch(r"diffusion_pytorch_model(?:\.(\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)", path.name)
        for path in sorted(folder.glob("diffusion_pytorch_model*"))
    ]
    variants = [match[1] for match in found if match]
    return None if None in variants or not variants else variants[0]


def sha256_of(*paths: Path) -> str:
    """Returns the sha256 of the contents of files, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def sha256_of_state(state: "Mapping[str, Tensor]", label: "Callable[[str, Tensor], str]", begin: str = "") -> str:
    """Returns the sha256 of named tensors, in the order of their names.

    Args:
        state: tensors by name.
        label: text that is hashed before a tensor's bytes, such as its name and shape.
        begin: text that is hashed first.
    """
    import torch

    digest = hashlib.sha256(begin.encode())
    for name, tensor in sorted(state.items()):
        digest.update(label(name, tensor).encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_room(folder: Path, needed: int) -> None:
    """Raises ValueError if the disk of `folder` (which need not exist) has fewer than `needed` bytes free."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(f"{folder} needs {gigabytes(needed)} and its disk has {gigabytes(free)} free")


def gigabytes(num_bytes: float) -> str:
    """Formats bytes with decimal units, as disks are sold: "1.2 GB"."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def gibibytes(num_bytes: float) -> str:
    """Formats bytes with binary units, as memory is sold: "1.20 GiB"."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 / 10 else f"{num_bytes / 2**20:.1f} MiB"
