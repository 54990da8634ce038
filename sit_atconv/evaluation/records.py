"""Records of evaluations as JSON: scores and everything that could change them; comparison of two."""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from sit_atconv.evaluation.metrics import ANYTHING, kind_of, metric_of
from sit_atconv.evaluation.scores import Score, jackknife_error
from sit_atconv.runtime.files import write_aside
from sit_atconv.runtime.settings import changed, flatten, is_among

ALWAYS = ("extractor", "metrics", "samples.image_size")  # parts of the protocol that every score depends on


@dataclass(frozen=True)
class Evaluation:
    """Scores of one set of samples, and how they were measured.

    Args:
        scores: scores by name: "FID", "FID-1000", "sFID", "IS", "precision", "recall", "KID"; with another extractor
            than Inception "FD-NAME" and so on.
        protocol: how it was measured: samples, reference, extractor, metrics, versions. Evaluations with different
            protocols are not comparable.
        subject: what was measured: path and content of the samples, weights, step, seed, speed.
        environment: what should not matter: date, device, processes.
        warnings: warnings printed during the evaluation.
    """

    scores: dict[str, Score]
    protocol: dict
    subject: dict
    environment: dict
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=False)

    def save(self, path: Path) -> None:
        write_aside(path, self.to_json() + "\n")

    def brief(self) -> "Evaluation":
        """Returns the same evaluation without `Score.without_group`, for display."""
        return replace(self, scores={name: replace(score, without_group=[]) for name, score in self.scores.items()})

    def with_scores_of(self, earlier: "Evaluation") -> "Evaluation":
        """Adds the other scores of an earlier evaluation if it had the same samples and protocol."""
        if self.subject.get("content") != earlier.subject.get("content") or protocol_differences(self, earlier):
            return self
        return replace(self, scores={**earlier.scores, **self.scores}, protocol={**earlier.protocol, **self.protocol})


def read_evaluation(path: Path) -> Evaluation:
    """Reads a record, whose metrics need not be imported. ValueError: the file is not an evaluation."""
    try:
        return parse_evaluation(json.loads(path.read_text()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is not an evaluation that eval/fid.py wrote: give its --out, or the folder of "
            "samples that contains one"
        ) from error


def parse_evaluation(content: dict) -> Evaluation:
    """Returns the evaluation that `to_json` wrote.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: the content is none.
    """
    scores = {name: Score(**score) for name, score in content["scores"].items()}
    evaluation = Evaluation(**{**content, "scores": scores})
    _check_types(evaluation)
    return evaluation


def _check_types(evaluation: Evaluation) -> None:
    """Raises TypeError or ValueError for invalid values, as after editing a record by hand."""
    numbers = [(score.value, score.error or 0.0, *score.without_group) for score in evaluation.scores.values()]
    if not all(math.isfinite(number) for each in numbers for number in each) or any(each[1] < 0 for each in numbers):
        raise ValueError("a score is not finite, or its error negative")
    if odd := [name for name in evaluation.scores if not kind_of(name).isidentifier()]:  # a name becomes part of a path
        raise ValueError(f"no score is called {odd[0]}")
    facts = evaluation.subject | flatten(evaluation.protocol)
    texts = ("ckpt", "path", "device")
    for name in (*texts, "images_per_second", "step", "processes", "samples.sampler.steps", "samples.sampler.cfg"):
        if not isinstance(facts.get(name), str | None if name in texts else int | float | None):
            raise TypeError(f"{name} is {facts[name]!r}")


def protocol_differences(a: Evaluation, b: Evaluation) -> dict[str, tuple]:
    """Returns the differences of two protocols: dotted name -> (value in a, value in b), None if missing.

    A part that one of them lacks entirely, such as that of a metric that was not asked for, is not a difference.
    """
    both = a.protocol.keys() & b.protocol.keys()
    return changed(*({part: facts for part, facts in e.protocol.items() if part in both} for e in (a, b)))


def is_measured_alike(a: Evaluation, b: Evaluation, name: str) -> bool:
    """True if score `name` may be subtracted: everything that it depends on agrees."""
    metric = metric_of(name)
    matters = (*ALWAYS, *(metric.depends_on if metric else ANYTHING))
    return (
        name in a.scores
        and name in b.scores
        and not any(is_among(part, matters) for part in protocol_differences(a, b))
    )


def are_paired(a: Evaluation, b: Evaluation) -> bool:
    """True if sample i of both was drawn from the same noise with the same label."""
    drawn = [
        [
            e.subject.get("seed"),
            *(flatten(e.protocol).get(f"samples.{name}") for name in ("num", "labels", "image_size")),
        ]
        for e in (a, b)
    ]
    return drawn[0] == drawn[1] and drawn[0][0] is not None


def difference(a: Evaluation, b: Evaluation, name: str) -> Score:
    """Returns score `name` of a minus that of b, with the standard error of the difference.

    If both were drawn from the same noise and labels, the error comes from the differences group by group, in which
    shared noise cancels. Otherwise the two errors are independent and their squares add up.
    """
    ours, theirs = a.scores[name], b.scores[name]
    value = ours.value - theirs.value
    if are_paired(a, b) and len(ours.without_group) == len(theirs.without_group) > 1:
        without = [x - y for x, y in zip(ours.without_group, theirs.without_group, strict=True)]
        return Score(value, jackknife_error(without), without)
    if ours.error is None or theirs.error is None:
        return Score(value)
    return Score(value, math.hypot(ours.error, theirs.error))
