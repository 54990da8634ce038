"""Tables of exchangeable parts (solvers, mixers, metrics, ...), and how users name parts of their own.

A part is named by its entry in a table, or by the path of an object in a module of the user's, `my_module.my_part`. A
module is imported when the user names it, on a command line or in a config that the user gives. A path that stands in a
file that may come from others, such as a checkpoint, is looked up among the modules that are imported already.
"""

import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar

Entry = TypeVar("Entry")


class Table(Mapping[str, Entry], Generic[Entry]):
    """Entries of one kind by name.

    Args:
        kind: what an entry is, as messages call it: "solver".
        entry_type: class of the entries, which a user's own must have.
        entries: the first entries.
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
        """Adds an entry. ValueError: the name is taken, or holds a dot, as the path of an object does."""
        if name in self or "." in name:
            reason = "the name is taken" if name in self else "a name with a dot is a path"
            raise ValueError(f"the {self.kind} {name!r} cannot be registered: {reason}")
        self._entries[name] = entry
        return entry

    def find(self, name: str) -> Entry:
        """Returns the entry of that name, or the object of that path in a module that is imported.

        Raises:
            ValueError: there is no such entry or object, its module is not imported, or it is of another class.
        """
        if name in self:
            return self[name]
        module, _, attribute = name.rpartition(".")
        if not module:
            raise ValueError(f"{self.kind} must be one of {', '.join(self)}, or your own as module.NAME, not {name!r}")
        if module not in sys.modules:
            raise ValueError(f"{self.kind} {name} is not known here: give --import {module}, if you trust that module")
        entry = getattr(sys.modules[module], attribute, None)
        if not isinstance(entry, self.entry_type):
            raise ValueError(f"{self.kind} {name} is no {self.entry_type.__name__}: see docs/extending.md")
        return entry


def import_modules(modules: Iterable[str]) -> None:
    """Imports modules that the user names, those in the working directory too.

    Raises:
        ValueError: one cannot be imported.
    """
    if "" not in sys.path:
        sys.path.append("")
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"the module {module} cannot be imported ({error}): give one that Python finds from "
                             "here") from error


def import_module_of(name: str) -> str:
    """Imports the module of a part that the user typed, `my_module.my_part`; returns the name.

    Does nothing for a name without a dot. ValueError: as `import_modules`.
    """
    if "." in name:
        import_modules([name.rpartition(".")[0]])
    return name
