"""The commands and configs that we ship: how they are typed and found, in a checkout and installed from a wheel.

`pip install -e .` leaves everything in the checkout. In a wheel configs/ is inside the package, and each command is a
console script, sit-atconv-NAME.
"""

import os
import runpy
import shlex
import sys
from pathlib import Path

from sit_atconv.runtime.commands import leave_on_ctrl_c

PACKAGE = Path(__file__).parents[1]
IS_WHEEL = (PACKAGE / "configs").is_dir()
CONFIGS = (PACKAGE if IS_WHEEL else PACKAGE.parent) / "configs"
COMMANDS = {  # name -> how it is typed in the root of a checkout, and its module
    "train": ("accelerate launch sit_atconv/train.py", "sit_atconv.train"),
    "encode": ("accelerate launch sit_atconv/encode.py", "sit_atconv.encode"),
    "generate": ("python sample/generate.py", "sit_atconv.generation.generate"),
    "fid": ("python eval/fid.py", "sit_atconv.evaluation.fid"),
    "compare": ("python eval/compare.py", "sit_atconv.evaluation.compare"),
    "speed": ("python eval/speed.py", "sit_atconv.speed.speed"),
    "solvers": ("python eval/solvers.py", "sit_atconv.studies.solvers"),
    "convert": ("python -m sit_atconv.convert", "sit_atconv.convert"),
    "quickstart": ("python -m sit_atconv.quickstart", "sit_atconv.quickstart"),
}
LAUNCHERS = {"python": [], "python -m": ["-m"], "accelerate launch": ["-m", "accelerate.commands.launch"]}


def command(name: str) -> str:
    """Returns how to type a command in the working directory: "python sample/generate.py", "sit-atconv-generate"."""
    if IS_WHEEL:
        return f"sit-atconv-{name}"
    launcher, target = _in_checkout(name)
    return f"{launcher} {shlex.quote(os.path.relpath(target) if Path(target).is_relative_to(Path.cwd()) else target)}"


def command_argv(name: str) -> list[str]:
    """Returns how to start a command as it is typed, but from any folder and by this Python, whatever PATH holds."""
    launcher, target = ("python -m", COMMANDS[name][1]) if IS_WHEEL else _in_checkout(name)
    return [sys.executable, *LAUNCHERS[launcher], target]


def _in_checkout(name: str) -> tuple[str, str]:
    """Returns the launcher of a command, and the whole path of its script, or its module."""
    launcher, _, target = COMMANDS[name][0].rpartition(" ")
    return launcher, target if launcher == "python -m" else str(PACKAGE.parent / target)


def console_script() -> None:
    """Runs the command that the console script is named after, as `python -m` would."""
    leave_on_ctrl_c()  # before imports that take seconds
    name = Path(sys.argv[0]).stem.removeprefix("sit-atconv-")
    runpy.run_module(COMMANDS[name][1], run_name="__main__", alter_sys=True)


def shipped_configs() -> dict[str, Path]:
    """Returns the configs that come with the project: "imagenet256" -> its file."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"), key=lambda path: path.stem)}


def find_config(name: str) -> Path:
    """Returns the file that `--config NAME` means: one that exists, else a shipped config of that name.

    Args:
        name: a path, or imagenet256, imagenet256.yaml or configs/imagenet256.yaml for the shipped one.

    Raises:
        ValueError: there is neither.
    """
    path, shipped = Path(name), shipped_configs()
    if path.exists() and not path.is_dir():
        return path
    if path.parent in (Path(), Path("configs")) and path.suffix in ("", ".yaml") and path.stem in shipped:
        return shipped[path.stem]
    raise ValueError(f"there is no file {name}: give a path that exists, or a shipped config ({', '.join(shipped)})")
