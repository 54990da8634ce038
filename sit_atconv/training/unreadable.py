"""RUN/unreadable.json: the images that a run leaves out because they cannot be read."""

import json
from pathlib import Path

from sit_atconv.runtime.files import write_aside


class Unreadable:
    """The record of a run, file name -> reason; the same on all processes, written by one.

    Args:
        run: the run's folder. ValueError: its record is damaged.
        resumes: whether the record that is there belongs to this run.
    """

    def __init__(self, run: Path, resumes: bool):
        self.path = run / "unreadable.json"
        self.recorded: dict[str, str] = {}
        self.met: dict[str, str] = {}  # by this process, since the last `record`
        if resumes and self.path.exists():
            try:
                self.recorded = dict(json.loads(self.path.read_text()))
            except ValueError as error:
                raise ValueError(f"{self.path} is damaged: delete it; it is written again") from error

    def note(self, unreadable: dict[str, str]) -> None:
        """Notes what this process met; does nothing for a file that is recorded."""
        self.met |= {name: reason for name, reason in unreadable.items() if name not in self.recorded}

    def record(self, met: dict[str, str], write: bool) -> dict[str, str]:
        """Adds what all processes met and returns what is new of it. OSError: the record cannot be written."""
        new = {name: reason for name, reason in sorted(met.items()) if name not in self.recorded}
        self.recorded, self.met = self.recorded | new, {}
        if new and write:
            write_aside(self.path, json.dumps(self.recorded, indent=1))
        return new
