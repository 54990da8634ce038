"""Work that several processes share: each does its part, and all of them go on or raise together."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object

from sit_atconv.runtime.files import exclusive


def share(items: Sequence, state: PartialState) -> Sequence:
    """Returns this process's part of what all of them have listed."""
    return items[state.process_index :: state.num_processes]


@contextlib.contextmanager
def together() -> Iterator[list[str]]:
    """Lets every process finish the block, and then raises on all of them what any of them met.

    So none waits for another that has left. Yields a list for faults to which the block adds its own.

    Raises:
        OSError: with each fault, and the text of each ValueError and OSError, on a line of its own.
    """
    faults = []
    try:
        yield faults
    except (ValueError, OSError) as error:
        faults.append(str(error))
    if faults := sorted(set(gather_object(faults))):
        raise OSError("\n".join(faults))


@contextlib.contextmanager
def held_by_main(folder: Path, state: PartialState) -> Iterator[None]:
    """Holds a folder, by the main process for all. Raises OSError on all of them where another command holds it."""
    with contextlib.ExitStack() as stack:
        with together():
            if state.is_main_process:
                stack.enter_context(exclusive(folder))
        yield
