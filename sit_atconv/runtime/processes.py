"""Errors raised on all processes together."""

from accelerate.utils import gather_object


def raise_together(faults: list[str]) -> None:
    """Raises OSError on every process with what any of them found, so that none waits for another that has left."""
    if faults := sorted(set(gather_object(faults))):
        raise OSError("\n".join(faults))
