"""Cache for constant tensors that every forward needs on the device."""

import functools
from collections.abc import Callable

import torch


def kept(make: Callable) -> Callable:
    """Caches the results of a function of hashable arguments (the last 32).

    Under `torch.compile`, with fake tensors and inside a transform of torch.func the function is called every time: no
    cached tensor becomes part of a graph, sizes may be symbolic, and only plain tensors enter the cache.
    """

    @functools.lru_cache(maxsize=32)
    def once(*arguments):
        with torch.inference_mode(False):  # or training could not use a tensor cached while sampling
            return make(*arguments)

    @functools.wraps(make)
    def constant(*arguments):
        fake = type(torch.empty(0)) is not torch.Tensor
        if torch.compiler.is_compiling() or fake or torch._C._functorch.peek_interpreter_stack() is not None:
            return make(*arguments)  # functorch has no public name for being inside a transform
        return once(*arguments)

    return constant
