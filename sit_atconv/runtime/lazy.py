"""Lazy re-exports of packages, so that `--help` does not wait for torch."""

import importlib
from collections.abc import Callable


def lazy_exports(package: str, **modules: str) -> tuple[Callable, Callable]:
    """Returns `__getattr__` and `__dir__` for a package.

    Args:
        package: the package's `__name__`.
        modules: for each of its modules, the exported names, separated by spaces.
    """
    homes = {name: f"{package}.{module}" for module, names in modules.items() for name in names.split()}

    def getattr_(name: str):
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return getattr_, lambda: sorted(homes)
