"""Files that are whole or not there, folders that one command holds at a time, hub ids, and room on the disk."""

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

PARTIAL = ".partial-"  # what a file is called until it is whole


def write_aside(
    path: Path, content: str | bytes | Callable[[Path], object], durable: bool = False, writer: str = ""
) -> None:
    """Writes under another name and renames: a file under its own name is whole, whatever happens meanwhile.

    Args:
        path: where it shall lie.
        content: text, bytes, or what is called with the name to write to. Where it fails nothing is left behind.
        durable: also outlast a power failure.
        writer: a name of this process, where others may write the same file at the same time.

    Raises:
        OSError: the disk is full, ...; the message names the file.
    """
    with _renamed(path, writer, durable) as partial:
        if callable(content):
            content(partial)
        else:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
        if durable:
            flush(partial)


def write_folder_aside(folder: Path, content: Callable[[Path], object]) -> None:
    """Writes a folder under another name and renames it: it is whole or not there.

    Args:
        folder: where it shall lie; there must be nothing, or an empty folder.
        content: called with the folder to fill. Where it fails nothing is left behind.

    Raises:
        OSError: the disk is full, something is in the way, ...; the message names the folder.
    """
    with _renamed(folder) as partial:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        content(partial)
        for path in partial.rglob("*.safetensors"):
            path.chmod(0o666 & ~_umask())  # safetensors leaves it to its owner alone


@contextlib.contextmanager
def _renamed(path: Path, writer: str = "", durable: bool = False) -> Iterator[Path]:
    """Yields the name to write to, which becomes `path` afterwards; where anything fails nothing is left behind."""
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
            raise OSError(f"{path} cannot be written ({error.strerror or error}): mend that and run the same command "
                          "again") from error
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def flush(path: Path) -> None:
    """Has the disk keep a file or a folder's names, whatever happens to the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it for this process, until left or dead.

    Raises:
        ValueError: another process holds it; the message says which.
        OSError: it cannot be written to.
    """
    # filelock 4.3 was tried: it keeps the holder's name, and neither a kill nor a forked worker keeps its lock. But it
    # needs Python 3.11, and raises as fcntl does on most file systems without locks, so that little would go here.
    import fcntl  # not on Windows, where everything else works

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
            raise ValueError(f"{folder} is in use by {file.read() or 'another process'}: wait until that has "
                             "ended") from None
        except OSError as error:  # a file system without locks
            print(f"warning: {folder} cannot be locked ({error.strerror}): see to it that one command at a time "
                  "writes there", file=sys.stderr)
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            break
        file.close()  # whoever held it removed it before we locked it: what we hold is nobody's any more
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def hub_options(name: str) -> dict:
    """How to ask the hub for `name`, which is no folder here, so that the network never sees a path that is gone.

    Args:
        name: what the user gave: owner/name where it is a hub id.

    Returns:
        Keyword arguments for the hub's functions: where a folder `owner` is here, `name` may have been a path, and only
        what the hub's cache holds is taken.

    Raises:
        ValueError: it cannot be a hub id: it has no slash or several, or it begins or is written as a path.
    """
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise ValueError(f"there is no folder {name}, and it is no hub id (owner/name)")
    return {"local_files_only": Path(name).parent.is_dir()}


def weights_variant(folder: Path) -> str | None:
    """The variant, such as fp16, that a model's weights were saved as by diffusers; None where some are plain."""
    found = [re.fullmatch(r"diffusion_pytorch_model(?:\.(\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)", path.name)
             for path in sorted(folder.glob("diffusion_pytorch_model*"))]
    variants = [match[1] for match in found if match]
    return None if None in variants or not variants else variants[0]


def sha256_of(*paths: Path) -> str:
    """Of the files' content, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def sha256_of_state(
    state: "Mapping[str, Tensor]", label: "Callable[[str, Tensor], str]", begin: str = ""
) -> str:
    """Returns the digest of named tensors in the order of their names.

    Args:
        state: the tensors.
        label: text that stands for a tensor's name, and for whatever else than its bytes shall count.
        begin: text before all of them.
    """
    import torch

    digest = hashlib.sha256(begin.encode())
    for name, tensor in sorted(state.items()):
        digest.update(label(name, tensor).encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_room(folder: Path, needed: int) -> None:
    """Raises ValueError where the disk that `folder` is on, or will be, has less than `needed` bytes free."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(f"{folder} needs {gigabytes(needed)} and its disk has {gigabytes(free)} free")


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def gibibytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 / 10 else f"{num_bytes / 2**20:.1f} MiB"
