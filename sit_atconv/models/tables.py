"""Constant tables that every forward needs: made once, on the device."""

import functools
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode


def kept(make: Callable) -> Callable:
    """Keeps what a function of hashable arguments made, of the last 32 calls with different ones.

    In a compiled graph it makes its table anew: nothing from outside becomes part of the graph, and sizes may be open.
    So it does where a dispatch mode runs, which may stand fake tensors in for real ones: neither meets the other.
    """

    @functools.lru_cache(maxsize=32)
    def once(*arguments):
        with torch.inference_mode(False):  # or training could not use what sampling leaves here
            return make(*arguments)

    @functools.wraps(make)
    def table(*arguments):
        alone = torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None
        return make(*arguments) if alone else once(*arguments)

    return table
