"""Work shared by several processes: each does its part, and all continue or raise together."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object

from sit_atconv.runtime.files import exclusive


def share(items: Sequence, state: PartialState) -> Sequence:
    """Returns this rank's part of a list that all ranks have."""
    return items[state.process_index :: state.num_processes]


@contextlib.contextmanager
def together() -> Iterator[list[str]]:
    """Runs the block on every rank, then raises the errors of any on all, so that none waits forever.

    Yields a list to which the block may add error messages.

    Raises:
        OSError: one line for each message, ValueError and OSError of any rank.
    """
    faults: list[str] = []
    try:
        yield faults
    except (ValueError, OSError) as error:
        faults.append(str(error))
    if faults := sorted(set(gather_object(faults))):
        raise OSError("\n".join(faults))


@contextlib.contextmanager
def held_by_main(folder: Path, state: PartialState) -> Iterator[None]:
    """Locks a folder from rank 0 for all ranks; raises OSError on all if another command holds it."""
    with contextlib.ExitStack() as stack:
        with together():
            if state.is_main_process:
                stack.enter_context(exclusive(folder))
        yield
