"""Shipped commands and configs: how to type and find them in a checkout or an installed wheel.

In a wheel, configs/ is inside the package and each command is a console script, sit-atconv-NAME.
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
COMMANDS = {  # name -> (what to type in the root of a checkout, its module)
    "train": ("accelerate launch sit_atconv/train.py", "sit_atconv.train"),
    "classify": ("accelerate launch sit_atconv/classify.py", "sit_atconv.classify"),
    "encode": ("accelerate launch sit_atconv/encode.py", "sit_atconv.encode"),
    "generate": ("python sample/generate.py", "sit_atconv.generation.generate"),
    "fid": ("python eval/fid.py", "sit_atconv.evaluation.fid"),
    "compare": ("python eval/compare.py", "sit_atconv.evaluation.compare"),
    "speed": ("python eval/speed.py", "sit_atconv.speed.speed"),
    "sweep": ("python eval/sweep.py", "sit_atconv.studies.sweep"),
    "report": ("python eval/report.py", "sit_atconv.studies.report_runs"),
    "demo": ("python -m sit_atconv.demo", "sit_atconv.demo"),
    "average": ("python -m sit_atconv.training.average", "sit_atconv.training.average"),
    "convert": ("python -m sit_atconv.convert", "sit_atconv.convert"),
    "quickstart": ("python -m sit_atconv.quickstart", "sit_atconv.quickstart"),
}
LAUNCHERS = {"python": [], "python -m": ["-m"], "accelerate launch": ["-m", "accelerate.commands.launch"]}


def command(name: str) -> str:
    """Returns what to type in the working directory, e.g. "python sample/generate.py"."""
    if IS_WHEEL:
        return f"sit-atconv-{name}"
    launcher, target = _in_checkout(name)
    return f"{launcher} {shlex.quote(os.path.relpath(target) if Path(target).is_relative_to(Path.cwd()) else target)}"


def command_argv(name: str) -> list[str]:
    """Returns the argument list that starts a command from any folder with this Python."""
    launcher, target = ("python -m", COMMANDS[name][1]) if IS_WHEEL else _in_checkout(name)
    return [sys.executable, *LAUNCHERS[launcher], target]


def launched(name: str, launcher: str | None = None) -> list[str]:
    """Returns the arguments to type that start a command, by its usual launcher or another one."""
    usual, _, script = COMMANDS[name][0].rpartition(" ")
    words = shlex.split(launcher or usual)
    return [*words, "-m", COMMANDS[name][1]] if IS_WHEEL else [*words, os.path.relpath(PACKAGE.parent / script)]


def _in_checkout(name: str) -> tuple[str, str]:
    """Returns the launcher of a command and the absolute path of its script, or its module."""
    launcher, _, target = COMMANDS[name][0].rpartition(" ")
    return launcher, target if launcher == "python -m" else str(PACKAGE.parent / target)


def console_script() -> None:
    """Runs the command whose console script was called, as `python -m` would."""
    leave_on_ctrl_c()  # before imports that take seconds
    name = Path(sys.argv[0]).stem.removeprefix("sit-atconv-")
    runpy.run_module(COMMANDS[name][1], run_name="__main__", alter_sys=True)


def shipped_configs() -> dict[str, Path]:
    """Returns the shipped configs, e.g. "imagenet256" -> its file."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"), key=lambda path: path.stem)}


def shipped_sweeps() -> dict[str, Path]:
    """Returns the shipped sweeps, e.g. "claim" -> its file."""
    return {path.stem: path for path in sorted((CONFIGS / "sweeps").glob("*.yaml"), key=lambda path: path.stem)}


def find_sweep(name: str) -> Path:
    """Returns the file of a sweep: an existing path, else the shipped one of that name.

    Raises:
        ValueError: neither exists.
    """
    shipped = shipped_sweeps()
    if (path := Path(name)).is_file():
        return path
    if path.stem in shipped and path.parent in (Path(), Path("configs/sweeps")):
        return shipped[path.stem]
    raise ValueError(f"there is no file {name}: give a path that exists, or a shipped sweep ({', '.join(shipped)})")


def configs_of(command: str) -> list[str]:
    """Returns the names of the shipped configs of the command "train" or "classify"."""
    return [name for name in shipped_configs() if name.startswith("attnet-") == (command == "classify")]


def find_config(name: str) -> Path:
    """Returns the file for `--config NAME`: an existing path, else the shipped config of that name.

    Args:
        name: a path, or imagenet256, imagenet256.yaml or configs/imagenet256.yaml for a shipped config.

    Raises:
        ValueError: neither exists.
    """
    path, shipped = Path(name), shipped_configs()
    if path.exists() and not path.is_dir():
        return path
    if path.parent in (Path(), Path("configs")) and path.suffix in ("", ".yaml") and path.stem in shipped:
        return shipped[path.stem]
    raise ValueError(f"there is no file {name}: give a path that exists, or a shipped config ({', '.join(shipped)})")
