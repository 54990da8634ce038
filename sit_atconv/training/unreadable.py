"""Record of the images that a run leaves out because they cannot be read, RUN/unreadable.json."""

import json
from pathlib import Path

from sit_atconv.runtime.files import write_aside


class Unreadable:
    """Unreadable images of a run, file name -> reason; the same on all processes, written by rank 0.

    A run that does not resume ignores an existing record. Raises ValueError if the record is damaged.
    """

    def __init__(self, run: Path, resumes: bool):
        self.path = run / "unreadable.json"
        self.recorded: dict[str, str] = {}
        self.met: dict[str, str] = {}  # found by this process since the last `record`
        if resumes and self.path.exists():
            try:
                self.recorded = dict(json.loads(self.path.read_text()))
            except ValueError as error:
                raise ValueError(f"{self.path} is damaged: delete it, and it will be written again") from error

    def note(self, unreadable: dict[str, str]) -> None:
        """Notes images that this process could not read, except those that are recorded."""
        self.met |= {name: reason for name, reason in unreadable.items() if name not in self.recorded}

    def record(self, met: dict[str, str], write: bool) -> dict[str, str]:
        """Adds the images met by all processes; returns the new ones. OSError: the record cannot be written."""
        new = {name: reason for name, reason in sorted(met.items()) if name not in self.recorded}
        self.recorded, self.met = self.recorded | new, {}
        if new and write:
            write_aside(self.path, json.dumps(self.recorded, indent=1))
        return new
