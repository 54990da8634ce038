"""The folder of a training run: its list of checkpoints and its log. No tensors are read here.

RUN/config.yaml, data.json     the resolved configuration, and a description of the data
RUN/stats.jsonl, loss.png      the loss and other figures by step
RUN/samples/step-*.png         pictures that the EMA weights drew during training
RUN/checkpoints/step-*/        see training_state.py
"""

import json
import re
from pathlib import Path

from sit_atconv.runtime.files import write_aside


def newest_checkpoint(run: Path) -> Path | None:
    """Returns the checkpoint of the last step in a run folder, or None. Its content is not checked."""
    return next(reversed(list_checkpoints(run)), None)


def list_checkpoints(run: Path) -> list[Path]:
    """Returns the complete checkpoints, oldest first; one being written or deleted has another name."""
    found = [path for path in run.glob("checkpoints/step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def read_config(run: Path) -> dict:
    """Returns the configuration of a training run, or {} if the folder has none that can be read."""
    import yaml

    try:
        return dict(yaml.safe_load((run / "config.yaml").read_text()))
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}


def append_stats(run: Path, line: dict) -> None:
    """Adds one line to stats.jsonl."""
    with open(run / "stats.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def read_stats(run: Path, up_to_step: int | None = None) -> list[dict]:
    """Returns the lines of stats.jsonl up to a step, without lines that a kill cut short."""
    path, lines = run / "stats.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    lines = [line for line in lines if isinstance(line, dict) and "step" in line]
    return lines if up_to_step is None else [line for line in lines if line["step"] <= up_to_step]


def rewind_stats(run: Path, step: int) -> None:
    """Drops the lines after the step that a run resumes from, since they will be logged again."""
    write_aside(run / "stats.jsonl", "".join(json.dumps(line) + "\n" for line in read_stats(run, step)))
