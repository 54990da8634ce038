"""Tables of exchangeable parts (solvers, mixers, metrics, ...), and how users name their own parts.

The name of a part is its entry in a table, or the path of an object in the user's module, `my_module.my_part`. Modules
named on a command line or in the user's config are imported. A path read from a file that others may have written, such
as a checkpoint, is looked up only among modules that are already imported.
"""

import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar, cast

Entry = TypeVar("Entry")


class Table(Mapping[str, Entry], Generic[Entry]):
    """Mapping from names to entries of one kind.

    Args:
        kind: word for an entry in messages, e.g. "solver".
        entry_type: class that all entries have, those of users included.
        entries: the built-in entries.
    """

    def __init__(self, kind: str, entry_type: type, entries: Mapping[str, Entry]):
        self.kind, self.entry_type, self._entries = kind, entry_type, dict(entries)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def register(self, name: str, entry: Entry) -> Entry:
        """Adds and returns an entry; raises ValueError if the name is taken or contains a dot."""
        if name in self or "." in name:
            reason = "the name is taken" if name in self else "a name with a dot is a path"
            raise ValueError(f"the {self.kind} {name!r} cannot be registered: {reason}")
        self._entries[name] = entry
        return entry

    def find(self, name: str) -> Entry:
        """Returns the entry of that name, or the object at that path in an imported module.

        Raises:
            ValueError: no such entry or object, its module is not imported, or it has the wrong class.
        """
        if name in self:
            return self[name]
        module, _, attribute = name.rpartition(".")
        if not module:
            raise ValueError(f"{self.kind} must be one of {', '.join(self)}, or your own as module.NAME, not {name!r}")
        if module not in sys.modules:
            raise ValueError(f"{self.kind} {name} is not known here: give --import {module} if you trust that module")
        entry = getattr(sys.modules[module], attribute, None)
        if not isinstance(entry, self.entry_type):
            raise ValueError(f"{self.kind} {name} is not a {self.entry_type.__name__}: see docs/extending.md")
        return cast(Entry, entry)


def import_modules(modules: Iterable[str]) -> None:
    """Imports modules named by the user; the working directory is searched, too.

    Raises:
        ValueError: a module cannot be imported.
    """
    if "" not in sys.path:
        sys.path.append("")
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(
                f"the module {module} cannot be imported ({error}): check its name, and that Python "
                "finds it from this folder"
            ) from error


def import_module_of(name: str) -> str:
    """Imports the module of a part that the user typed, `my_module.my_part`, and returns the name.

    A name without a dot needs no import. Raises ValueError as `import_modules` does.
    """
    if "." in name:
        import_modules([name.rpartition(".")[0]])
    return name
