"""Constant tensors that every forward needs: made once, on the device."""

import functools
from collections.abc import Callable

import torch


def kept(make: Callable) -> Callable:
    """Keeps what a function of hashable arguments made, of the last 32 calls with different ones.

    In a compiled graph it makes its tensor anew: nothing from outside becomes part of the graph, and sizes may be open.
    So it does where fake tensors stand in for real ones: neither meets the other.
    """

    @functools.lru_cache(maxsize=32)
    def once(*arguments):
        with torch.inference_mode(False):  # or training could not use what sampling leaves here
            return make(*arguments)

    @functools.wraps(make)
    def constant(*arguments):
        fake = type(torch.empty(0)) is not torch.Tensor
        return make(*arguments) if torch.compiler.is_compiling() or fake else once(*arguments)

    return constant
