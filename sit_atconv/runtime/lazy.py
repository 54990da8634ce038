"""Packages that import what they offer when it is used: a command that prints its help waits for no torch."""

import importlib
from collections.abc import Callable


def lazy_exports(package: str, **modules: str) -> tuple[Callable, Callable]:
    """Returns the `__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`.
        modules: modules of it, each with the names that it gives, separated by spaces.
    """
    homes = {name: f"{package}.{module}" for module, names in modules.items() for name in names.split()}

    def getattr_(name: str):
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return getattr_, lambda: sorted(homes)
