"""What a run was made by: command line, commit and package versions, in a file beside its results."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sit_atconv import __version__
from sit_atconv.runtime.files import write_aside

ROOT = Path(__file__).parents[2]
PACKAGES = ("accelerate", "diffusers", "jsonargparse", "numpy", "pillow", "safetensors", "timm", "torch", "torchvision")


def record_provenance(run: Path) -> None:
    """Appends what `describe` returns to RUN/provenance.json, a list of sessions.

    Raises:
        OSError: it cannot be written.
    """
    path = run / "provenance.json"
    try:
        sessions = list(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # there is none yet, or a damaged one, which is no reason to stop a run
        sessions = []
    write_aside(path, json.dumps([*sessions, describe()], indent=1))


def describe() -> dict:
    """Returns command line, folder, commit and versions of this process, None for any not found.

    Never fails. "commit" is that of the checkout that the package is imported from, "dirty" whether its tracked files
    differ from that.
    """
    changes = _try(_git, "status", "--porcelain", "--untracked-files=no")
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "folder": _try(os.getcwd),
        "commit": _try(_git, "rev-parse", "HEAD"),
        "dirty": None if changes is None else changes != "",
        "versions": {"python": platform.python_version(), "sit-atconv": __version__}
        | {name: _try(version, name) for name in PACKAGES},
    }


def _git(*arguments: str) -> str:
    if not (ROOT / ".git").exists():  # a wheel, whose environment may be inside another project's checkout
        raise OSError
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _try(function: Callable[..., str], *arguments: str) -> str | None:
    try:
        return function(*arguments)
    except (OSError, subprocess.SubprocessError, PackageNotFoundError):
        return None
