"""Provenance of a run: command line, commit and package versions, in a file beside its results."""

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
    """Appends the result of `describe` to RUN/provenance.json, a list of sessions.

    Raises:
        OSError: the file cannot be written.
    """
    path = run / "provenance.json"
    try:
        sessions = list(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # missing or damaged: no reason to stop a run
        sessions = []
    write_aside(path, json.dumps([*sessions, describe()], indent=1))


def describe() -> dict:
    """Returns command line, folder, commit and versions of this process, and None for the unknown ones.

    "commit" is the commit of the checkout that the package is imported from; "dirty" is true if tracked files differ
    from it. Never fails.
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
    if not (ROOT / ".git").exists():  # a wheel; its environment may be inside another project's checkout
        raise OSError
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _try(function: Callable[..., str], *arguments: str) -> str | None:
    try:
        return function(*arguments)
    except (OSError, subprocess.SubprocessError, PackageNotFoundError):
        return None
