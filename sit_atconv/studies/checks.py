"""Checks of a sweep before anything runs: every command line, and the machine."""

import importlib
import sys
from collections.abc import Sequence

import torch

from sit_atconv.runtime.commands import user_errors
from sit_atconv.runtime.devices import on_cpu, usable_cores
from sit_atconv.runtime.installation import COMMANDS
from sit_atconv.studies.execution import Task
from sit_atconv.training.config import parse


def check_options(tasks: Sequence[Task]) -> None:
    """Parses all command lines; exits with the message of the first that is wrong, and names its run."""
    for task in tasks:
        for name, arguments in task.steps:
            try:
                with user_errors():
                    if name == "train":
                        parse(arguments)
                    else:
                        importlib.import_module(COMMANDS[name][1]).make_parser().parse_args(arguments)
            except SystemExit:
                print(f"in the options of {name} of {task.name}", file=sys.stderr)
                raise


def threads_and_devices(jobs: int) -> tuple[int, int]:
    """Returns the CPU threads of each of several jobs, and the number of GPUs that they share."""
    return max(1, usable_cores() // jobs), 0 if on_cpu() else torch.accelerator.device_count()
