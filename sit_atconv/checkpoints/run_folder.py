"""The folder of a training run: its list of checkpoints and its log. No tensors are read here.

RUN/config.yaml, data.json     the resolved configuration, and a description of the data
RUN/stats.jsonl, loss.png      the loss and other figures by step
RUN/samples/step-*.png         pictures that the EMA weights drew during training
RUN/checkpoints/step-*/        see training_state.py
RUN/quality/step-*.json, .png  scores of samples during training, and some of them
RUN/best                       link to the checkpoint with the best score
"""

import json
import re
import shutil
from collections.abc import Iterable
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


def add_to_stats(run: Path, step: int, figures: dict) -> None:
    """Adds figures to the line of a step in stats.jsonl, if there is one."""
    lines = [line | figures if line["step"] == step else line for line in read_stats(run)]
    write_aside(run / "stats.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def quality_record(run: Path, step: int) -> Path:
    """Returns the path of the scores of a step."""
    return run / "quality" / f"step-{step:07d}.json"


def read_quality(run: Path) -> dict[int, dict]:
    """Returns the records of all evaluated steps, by step. ValueError: one is damaged."""
    found = {}
    for path in sorted(run.glob("quality/step-*.json")):
        try:
            record = json.loads(path.read_bytes())
            if not record["log"] or not all(isinstance(value, float) for value in record["log"].values()):
                raise ValueError("it holds no scores")
            found[int(path.stem.removeprefix("step-"))] = {"log": record["log"], "protocol": record["protocol"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and it is measured again") from error
    return found


def best_step(run: Path) -> int | None:
    """Returns the step with the lowest distance among those whose checkpoint exists, or None.

    Only those count that were measured as the newest was.
    """
    records = read_quality(run)
    if not records:
        return None
    protocol = records[max(records)]["protocol"]
    scores = {
        step: next(iter(record["log"].values())) for step, record in records.items() if record["protocol"] == protocol
    }
    there = [step for step in map(checkpoint_step, list_checkpoints(run)) if step in scores]
    return min(there, key=lambda step: (scores[step], step), default=None)


def rewind_quality(run: Path, step: int) -> None:
    """Deletes scores and samples after the step that a run resumes from; they may be of a former run here."""
    delete_after(run.glob("quality/step-*"), step)


def delete_after(paths: Iterable[Path], step: int) -> None:
    """Deletes files and folders step-NUMBER... whose number is larger than `step`."""
    for path in paths:
        if int(re.match(r"step-(\d+)", path.name)[1]) > step:  # type: ignore[index]
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def rewind_stats(run: Path, step: int) -> None:
    """Drops the lines after the step that a run resumes from, since they will be logged again."""
    write_aside(run / "stats.jsonl", "".join(json.dumps(line) + "\n" for line in read_stats(run, step)))
