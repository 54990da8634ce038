"""Records of a sweep: small files from which its tables and charts are made."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from sit_atconv.checkpoints.run_folder import checkpoint_step, newest_checkpoint, read_config, read_stats
from sit_atconv.evaluation.records import Evaluation, read_evaluation
from sit_atconv.runtime.files import write_aside
from sit_atconv.runtime.settings import differences
from sit_atconv.studies.plan import Leaf, Run


@dataclass(frozen=True)
class Training:
    """Measurements of a training run.

    Args:
        sweep: settings, seeds and options of the run in the sweep.
        config: resolved configuration of the run.
        held_out_loss: (step, held-out flow loss) pairs.
        images_per_second: median over the lines of the log.
        jobs: number of tasks that ran at once.
        versions: provenance of the run.
    """

    sweep: dict
    config: dict
    held_out_loss: list[tuple[int, float]]
    images_per_second: float | None
    jobs: int
    versions: dict


def collect_training(run: Run, jobs: int) -> None:
    """Writes the record of a complete training run. ValueError: the run is not complete."""
    config, newest = read_config(run.folder), newest_checkpoint(run.folder)
    steps = config.get("train", {}).get("steps")
    if newest is None or checkpoint_step(newest) != steps:
        reached = checkpoint_step(newest) if newest else 0
        raise ValueError(f"{run.folder} stopped at step {reached} of {steps}: run the same command again")
    stats = read_stats(run.folder)
    rates = [line["images_per_second"] for line in stats if "images_per_second" in line]
    sessions = json.loads((run.folder / "provenance.json").read_text())
    record = {
        "sweep": run.facts,
        "config": config,
        "held_out_loss": [(line["step"], line["held_out_loss"]) for line in stats if "held_out_loss" in line],
        "images_per_second": median(rates) if rates else None,
        "jobs": jobs,
        "versions": sessions[-1]["versions"],
    }
    run.record.parent.mkdir(parents=True, exist_ok=True)
    write_aside(run.record, json.dumps(record, indent=1) + "\n")


def collect_scores(leaf: Leaf, jobs: int) -> None:
    """Writes the record of a leaf from the file that `eval/fid.py` wrote; paths become relative.

    ValueError: there is no such file, it is damaged, or the run was not complete when its samples were drawn.
    """
    evaluation = read_evaluation(leaf.scores)
    step, steps = evaluation.subject.get("step"), read_config(leaf.run.folder).get("train", {}).get("steps")
    if leaf.is_of_last_step and step != steps:
        raise ValueError(f"the samples in {leaf.folder} are of step {step} of {steps}: delete that folder")
    subject = {
        name: _relative(value) if name in ("path", "ckpt") else value for name, value in evaluation.subject.items()
    }
    leaf.record.parent.mkdir(parents=True, exist_ok=True)
    replace(evaluation, subject={**subject, "sweep": {**leaf.facts, "jobs": jobs}}).save(leaf.record)


def _relative(path: str) -> str:
    return os.path.relpath(path) if os.path.isabs(path) and Path(path).is_relative_to(Path.cwd()) else path


def read_trainings(runs: Iterable[Run]) -> dict[str, Training]:
    """Returns the existing records of training runs by the run's name. ValueError: see `check_record`."""
    found = {}
    for run in runs:
        if run.record.exists():
            try:
                training = Training(**json.loads(run.record.read_text()))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{run.record} is damaged: delete it, and run the same command again") from error
            check_record(run.record, training.sweep, run.facts)
            found[run.name] = training
    return found


def read_scores(leaves: Iterable[Leaf]) -> dict[str, Evaluation]:
    """Returns the existing records of leaves by the leaf's name. ValueError: see `check_record`."""
    found = {}
    for leaf in leaves:
        if leaf.record.exists():
            try:
                evaluation = read_evaluation(leaf.record)
            except ValueError as error:
                raise ValueError(f"{leaf.record} is damaged: delete it, and run the same command again") from error
            check_record(leaf.record, evaluation.subject.get("sweep", {}), leaf.facts)
            found[leaf.name] = evaluation
    return found


def check_record(path: Path, held: dict, wanted: dict) -> None:
    """Raises ValueError if the record was made with other options than the sweep's file has now."""
    parts = ("options", "settings", "ckpt")
    then, now = ({part: facts.get(part) for part in parts} for facts in (held, wanted))
    if changed := differences(then, now):
        raise ValueError(
            f"{path} was made with other options ({'; '.join(changed)}): delete it and its run, or give another --out"
        )
