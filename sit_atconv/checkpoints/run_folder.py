"""The folder of a training run, as far as no tensor is read: its checkpoints and its log.

    RUN/config.yaml, data.json     the resolved configuration, and what the data are
    RUN/stats.jsonl, loss.png      the loss and more, as it went
    RUN/samples/step-*.png         pictures drawn from the EMA weights on the way
    RUN/checkpoints/step-*/        see training_state.py
"""

import json
import re
from pathlib import Path

from sit_atconv.runtime.files import write_aside


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint of the last step in a run folder, or None. Its content is not looked at."""
    return next(reversed(list_checkpoints(run)), None)


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first. (One being written or deleted bears another name.)"""
    found = [path for path in run.glob("checkpoints/step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def append_stats(run: Path, line: dict) -> None:
    """Adds one line to stats.jsonl."""
    with open(run / "stats.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def read_stats(run: Path, up_to_step: int | None = None) -> list[dict]:
    """The lines of stats.jsonl, up to a step. (A line that a kill cut short is left out.)"""
    path, lines = run / "stats.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    lines = [line for line in lines if isinstance(line, dict) and "step" in line]
    return [line for line in lines if up_to_step is None or line["step"] <= up_to_step]


def rewind_stats(run: Path, step: int) -> None:
    """Drops what was logged after the step that a run goes on from, since it will be logged again."""
    write_aside(run / "stats.jsonl", "".join(json.dumps(line) + "\n" for line in read_stats(run, step)))
