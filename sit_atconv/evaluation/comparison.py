"""Comparison of evaluations: rows over seeds, a baseline, and differences to it."""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

from sit_atconv.evaluation.comparison_inputs import distinct_names, find_evaluations, paths_to_name
from sit_atconv.evaluation.metrics import METRICS, find_metric, kind_of
from sit_atconv.evaluation.records import Evaluation, difference, is_measured_alike, read_evaluation
from sit_atconv.evaluation.scores import Score
from sit_atconv.evaluation.seeds import difference_of_means, over_seeds


@dataclass(frozen=True)
class Run:
    """A row of the comparison: one evaluation, or several that differ in their seeds alone."""

    name: str
    evaluations: tuple[Evaluation, ...]

    @property
    def evaluation(self) -> Evaluation:
        """The first evaluation, whose protocol the others share."""
        return self.evaluations[0]

    @cached_property
    def scores(self) -> dict[str, Score]:
        """Scores by name, over all seeds."""
        names = [name for name in self.evaluation.scores if all(name in e.scores for e in self.evaluations)]
        return {name: over_seeds([e.scores[name] for e in self.evaluations], self.shares_noise) for name in names}

    @property
    def shares_noise(self) -> bool:
        """True if two of the evaluations drew their samples from the same noise."""
        seeds = [e.subject.get("seed") for e in self.evaluations]
        return len(set(seeds)) < len(seeds)

    @property
    def model(self) -> Path:
        """Folder of the training run, as far as the recorded paths tell."""
        subjects = [evaluation.subject for evaluation in self.evaluations]
        paths = [subject.get("ckpt") or subject.get("path") or "" for subject in subjects]
        runs = [re.sub(r"/(checkpoints/step-|samples/step)\d.*", "", path) for path in paths]
        return Path(shared_name(runs) if len(set(runs)) > 1 else runs[0])

    @property
    def place(self) -> str | None:
        """Hardware that drew the samples: "cuda x 8"."""
        device, processes = (self.evaluation.subject.get(name) for name in ("device", "processes"))
        jobs = (self.evaluation.subject.get("sweep") or {}).get("jobs", 1)
        return device and f"{device} x {processes or 1}" + (f", one of {jobs} jobs" if jobs > 1 else "")

    @property
    def speed(self) -> float | None:
        """Images per second, the median over seeds."""
        known = [rate for e in self.evaluations if (rate := e.subject.get("images_per_second"))]
        return median(known) if known else None


@dataclass(frozen=True)
class Comparison:
    """The rows, the baseline among them, and the score that is compared: "FID-1000"."""

    runs: list[Run]
    baseline: Run
    metric: str

    def is_measured_alike(self, run: Run) -> bool:
        """True if the run's score may be subtracted from the baseline's."""
        return is_measured_alike(self.baseline.evaluation, run.evaluation, self.metric)

    def difference(self, run: Run) -> Score | None:
        """Returns the run's score minus the baseline's, or None if they are not comparable."""
        if run is self.baseline or not self.is_measured_alike(run):
            return None
        ours, theirs = ({seeds_of(e): e for e in each.evaluations} for each in (run, self.baseline))
        common = [seeds for seeds in ours if seeds in theirs]
        if len(common) >= 2 or len(ours) == len(theirs) == 1:
            pairs = [(ours[seeds], theirs[seeds]) for seeds in common] or [(run.evaluation, self.baseline.evaluation)]
            return over_seeds([difference(a, b, self.metric) for a, b in pairs], run.shares_noise)
        return difference_of_means(
            *([e.scores[self.metric].value for e in each.evaluations] for each in (run, self.baseline))
        )


def read_comparison(
    sources: Sequence[Path],
    names: Sequence[str] | None,
    baseline: str,
    metric: str,
    messages: list[str],
    per_seed: bool = False,
) -> Comparison:
    """Reads evaluations; takes arguments of `compare`, and appends skipped sources to `messages`."""
    paths = find_evaluations(sources, messages)
    runs = make_runs([read_evaluation(path) for path in paths], distinct_names(paths_to_name(paths)), per_seed)
    if names is not None:
        runs = rename(runs, names)
    return make_comparison(runs, baseline, metric)


def make_runs(evaluations: Sequence[Evaluation], names: Sequence[str], per_seed: bool = False) -> list[Run]:
    """Returns a row for each group of evaluations that differ in their seeds alone.

    Args:
        evaluations: all evaluations.
        names: a name for each; that of a group is what its names have in common.
        per_seed: give each evaluation a row of its own.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for number, evaluation in enumerate(evaluations):
        key = None if per_seed else without_seeds(evaluation)
        groups[f"{number}" if key is None else key].append(number)
    members = []
    for group in groups.values():
        is_repeated = len({seeds_of(evaluations[i]) for i in group}) < len(group)  # something else differs
        members += [[i] for i in group] if is_repeated else [group]
    members.sort()
    shared = [shared_name([names[i] for i in group]) for group in members]
    chosen = shared if len({*shared, ""}) == len(shared) + 1 else [names[group[0]] for group in members]
    return [
        Run(" ".join(name.split()), tuple(evaluations[i] for i in group))
        for name, group in zip(chosen, members, strict=True)
    ]


def rename(runs: Sequence[Run], names: Sequence[str]) -> list[Run]:
    """Returns the rows with other names. ValueError: there is not one name for each, or two are equal."""
    names = [" ".join(name.split()) for name in names]  # on one line
    if len(names) != len(runs):
        raise ValueError(
            f"{len(names)} names for {len(runs)} rows: give one for each of {', '.join(run.name for run in runs)}"
        )
    if len({*names, ""}) != len(names) + 1:
        raise ValueError(f"the names {', '.join(map(repr, names))} are not distinct, or empty: give each row its own")
    return [Run(name, run.evaluations) for name, run in zip(names, runs, strict=True)]


def seeds_of(evaluation: Evaluation) -> tuple:
    """Returns the seeds of training and of sampling; None where the record does not know one."""
    training = evaluation.subject.get("training") or {}
    return (training.get("train") or {}).get("seed"), evaluation.subject.get("seed")


def without_seeds(evaluation: Evaluation) -> str | None:
    """Returns a text that evaluations share if they differ in seeds alone; None if records cannot tell.

    Runs of a sweep are told apart by their settings there, others by their configuration, and weights without a
    configuration by their checksum.
    """
    subject = evaluation.subject
    if sweep := subject.get("sweep"):
        of_model: object = {name: value for name, value in sweep["settings"].items() if name not in sweep["seeds"]}
    elif training := subject.get("training"):
        others = {name: value for name, value in training.items() if name != "out"}
        train = {name: value for name, value in others.get("train", {}).items() if name != "seed"}
        of_model = {**others, "train": train, "step": subject.get("step"), "ema_decay": subject.get("ema_decay")}
    else:
        of_model = subject.get("weights")
    return json.dumps([of_model, evaluation.protocol], sort_keys=True) if of_model else None


def shared_name(names: Sequence[str]) -> str:
    """Returns the words that all names share, level by level: a-seed0/cfg1, a-seed1/cfg1 -> a/cfg1."""
    first, *others = ([level.split("-") for level in name.split("/")] for name in names)
    kept = (
        "-".join(word for word in words if all(word in other[depth : depth + 1][0] for other in others))
        for depth, words in enumerate(first)
        if all(len(other) > depth for other in others)
    )
    return "/".join(filter(None, kept))


def make_comparison(runs: list[Run], baseline: str, metric: str) -> Comparison:
    """Chooses baseline and score of a comparison; takes arguments of `compare`."""
    meant = [run for number, run in enumerate(runs, 1) if baseline in (str(number), run.name)]
    if len(meant) > 1:
        raise ValueError(
            f"--baseline {baseline} is ambiguous: it is the number of run {runs[int(baseline) - 1].name} "
            "and the name of another; give --names that are not numbers"
        )
    if not meant:
        raise ValueError(
            f"there is no run {baseline!r} to be the baseline: give a number from 1 to {len(runs)}, or "
            f"one of the names {', '.join(run.name for run in runs)}"
        )
    scores = meant[0].scores
    kinds = find_metric(metric).scores if metric in METRICS or "." in metric else (metric,)
    found = [metric] if metric in scores else [name for name in scores if kind_of(name) in kinds]
    if not found:
        raise ValueError(
            f"the baseline {meant[0].name} has no {metric}: give --metric one of "
            f"{', '.join(scores)}, or another --baseline"
        )
    return Comparison(runs, meant[0], found[0])
