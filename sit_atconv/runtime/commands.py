"""Command-line helpers: short user errors without a traceback, output from rank 0 only, option types."""

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
from typing import TypeVar

from sit_atconv.runtime.files import write_aside
from sit_atconv.runtime.tables import import_modules

Number = TypeVar("Number", int, float)


def is_main_process() -> bool:
    """True if this is rank 0, the process that prints. Works before any process group starts."""
    return int(os.environ.get("RANK", "0")) == 0


def wants_json(flag: bool) -> bool:
    """True if stdout gets JSON: `--json` was given (`flag`), or stdout is not a terminal."""
    return flag or not sys.stdout.isatty()


def warn_if_hidden(option: str, name: str) -> None:
    """Warns if a file or folder here has the name of built-in data, which is read instead."""
    if is_main_process() and Path(name).exists():
        print(
            f"warning: {option} {name} is built-in data, not the {name} in this folder: write ./{name} for that",
            file=sys.stderr,
        )


def fail(message: object, code: int = 1, everywhere: bool = False):
    """Prints an error from local rank 0, or from all ranks if `everywhere`, and exits with `code`."""
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        from tqdm import tqdm  # late: Ctrl-C during an import would print a traceback

        tqdm.write(f"error: {message}", file=sys.stderr)  # does not break a progress bar
    _tell_launcher(f"error: {message}")
    raise SystemExit(code)


def _tell_launcher(message: str) -> None:
    """Makes torchrun and multi-process `accelerate launch` end their report with our message.

    The format is that of `torch.distributed.elastic.multiprocessing.errors.record`, written without importing torch.
    The launcher reports the earliest failure and dates a process without a message in whole seconds, so one second is
    subtracted: our message precedes the processes that failed because of this one.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        failure = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()) - 1)}}}
        with contextlib.suppress(OSError):
            write_aside(Path(path), json.dumps(failure))  # a partial file would crash the launcher


@contextlib.contextmanager
def user_errors(everywhere: bool = False):
    """Turns a ValueError, OSError or Ctrl-C into `fail`, for the part of a command that checks its input.

    Args:
        everywhere: set it for errors that can occur on a single rank.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        fail(error, everywhere=everywhere)
    except KeyboardInterrupt:
        fail("interrupted", code=130)


def say_at_once(text: str) -> None:
    """Prints a line on stderr from a signal handler, where `print` is not safe; local rank 0 only."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, f"\n{text}\n".encode())


def leave_at_once(message: str) -> None:
    """Ends this process from a signal handler with one line, without cleanup."""
    say_at_once(f"error: {message}")
    os._exit(130)


def leave_on_ctrl_c() -> None:
    """Makes Ctrl-C end this process immediately, while it has nothing to save or clean up."""
    _on_ctrl_c(lambda number, frame: leave_at_once("interrupted"))


def run_command(main: Callable[[], object]) -> None:
    """Runs the `main` of a command; Ctrl-C ends it with one line at any point."""
    _on_ctrl_c(_interrupt)
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted", code=130)
    finally:
        leave_on_ctrl_c()  # while Python shuts down


def _on_ctrl_c(handler: Callable) -> None:
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # ignored in background jobs of shell scripts
        signal.signal(signal.SIGINT, handler)


def _interrupt(number: int, frame) -> None:
    """Raises KeyboardInterrupt, or exits during an import, where libraries swallow exceptions."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            leave_at_once("interrupted")
        frame = frame.f_back
    raise KeyboardInterrupt


def _number(kind: type[Number], holds: Callable[[Number], bool], what: str) -> Callable[[str], Number]:
    """Returns an option type: parsed by `kind`, checked by `holds`; its error says "not `what`"."""

    def parse(text: str) -> Number:
        with contextlib.suppress(ValueError):
            if holds(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return parse


finite = _number(float, math.isfinite, "a finite number")
positive = _number(float, lambda value: 0 < value < math.inf, "above 0")


def at_least(smallest: int) -> Callable[[str], int]:
    """Returns the type of an option that takes an integer of at least `smallest`."""
    return _number(int, lambda value: value >= smallest, f"a whole number of at least {smallest}")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help formatter that shows defaults other than None, () and booleans."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default == () or isinstance(action.default, bool)
        return action.help if silent else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` with defaults in the help; errors print its one-line `usage` first."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        if is_main_process():
            self.print_usage(sys.stderr)
        fail(message, code=2)


class _Import(argparse.Action):
    """Option action that imports a module while parsing, so that later checks know the names it registers."""

    def __call__(self, parser, namespace, module, option_string=None):
        try:
            import_modules([module])
        except ValueError as error:
            parser.error(str(error))


def add_import_option(parser: argparse._ActionsContainer) -> None:
    """Adds the repeatable option `--import MODULE`; check names of parts only after `parse_args`."""
    parser.add_argument(
        "--import",
        action=_Import,
        metavar="MODULE",
        default=argparse.SUPPRESS,
        help="import your module, which registers solvers, metrics or other parts; may be repeated",
    )
