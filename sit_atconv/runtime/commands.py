"""Manners that all commands share: errors in a line or two without a traceback, one voice among several processes."""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from sit_atconv.runtime.files import write_aside
from sit_atconv.runtime.tables import import_modules


def is_main_process() -> bool:
    """Whether this is the process that prints; known before any process group starts."""
    return int(os.environ.get("RANK", "0")) == 0


def wants_json(flag: bool) -> bool:
    """True if stdout gets JSON: `--json` was given (`flag`), or stdout is not a terminal."""
    return flag or not sys.stdout.isatty()


def fail(message: object, code: int = 1, everywhere: bool = False):
    """Says what is wrong and leaves. Of several processes on a machine one speaks, or each if `everywhere`."""
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        from tqdm import tqdm  # here, so that importing this file takes no time in which Ctrl-C would be a traceback

        tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own where there is a progress bar
    _tell_launcher(f"error: {message}")
    raise SystemExit(code)


def _tell_launcher(message: str) -> None:
    """Has torchrun, or `accelerate launch` with several processes, end its long report with our message.

    The format is that of `torch.distributed.elastic.multiprocessing.errors.record`, and torch is not imported here. The
    report shows the earliest failure, and dates one without a message by when it was noticed, in whole seconds: a
    second is subtracted so that ours precedes processes that failed or were ended because of this one.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        failure = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()) - 1)}}}
        with contextlib.suppress(OSError):
            write_aside(Path(path), json.dumps(failure))  # half a file would end the launcher in another error


@contextlib.contextmanager
def user_errors(everywhere: bool = False):
    """Turns a ValueError, OSError or Ctrl-C into `fail`. For the part of a command that checks what the user gave.

    `everywhere`: what can go wrong in one process alone.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        fail(error, everywhere=everywhere)
    except KeyboardInterrupt:
        fail("interrupted", code=130)


def say_at_once(text: str) -> None:
    """Prints a line on stderr from a signal handler, where print is not safe; as in `fail`, by one process."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, f"\n{text}\n".encode())


def leave_at_once(message: str) -> None:
    """Ends this process from a signal handler, in one line and without any cleaning up."""
    say_at_once(f"error: {message}")
    os._exit(130)


def leave_on_ctrl_c() -> None:
    """Makes Ctrl-C end this process at once, for as long as it has nothing to save or to clean up."""
    _on_ctrl_c(lambda number, frame: leave_at_once("interrupted"))


def run_command(main: Callable[[], object]) -> None:
    """Runs the `main` of a command as a script: Ctrl-C ends it in one line, wherever it is."""
    _on_ctrl_c(_interrupt)
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted", code=130)
    finally:
        leave_on_ctrl_c()  # while Python shuts down


def _on_ctrl_c(handler: Callable) -> None:
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as in the background of a shell script
        signal.signal(signal.SIGINT, handler)


def _interrupt(number: int, frame) -> None:
    """Raises KeyboardInterrupt, but ends an import at once: libraries swallow exceptions while they are imported."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            leave_at_once("interrupted")
        frame = frame.f_back
    raise KeyboardInterrupt


def _number(kind: type, holds: Callable[[float], bool], what: str) -> Callable[[str], float]:
    """Returns the type of an option: what `kind` reads, if it `holds`; else the error says that it is not `what`."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if holds(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return parse


finite = _number(float, math.isfinite, "a finite number")
positive = _number(float, lambda value: 0 < value < math.inf, "above 0")


def at_least(smallest: int) -> Callable[[str], int]:
    """Returns the type of an option that is a whole number from `smallest` on."""
    return _number(int, lambda value: value >= smallest, f"a whole number of at least {smallest}")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says a default where it says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default == () or isinstance(action.default, bool)
        return action.help if silent else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults in the help. Give it a one-line `usage`: it is what precedes an error."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        if is_main_process():
            self.print_usage(sys.stderr)
        fail(message, code=2)


class _Import(argparse.Action):
    """Imports a module as soon as the option is read, so that names are checked after it wherever it stands."""

    def __call__(self, parser, namespace, module, option_string=None):
        try:
            import_modules([module])
        except ValueError as error:
            parser.error(str(error))


def add_import_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--import MODULE`, repeatable; it sets no attribute. Check names of parts after `parse_args`, not in it."""
    parser.add_argument("--import", action=_Import, metavar="MODULE", default=argparse.SUPPRESS,
                        help="import a module of yours that registers parts of its own; repeat for more")
