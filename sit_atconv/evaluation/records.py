"""What an evaluation found and all that could change it, as one JSON; and how two of them may be compared."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from sit_atconv.runtime.files import write_aside

FULL = 50_000  # samples of the FID that papers report; another number stands in the score's name


@dataclass(frozen=True)
class Metric:
    """What to know of a metric.

    Args:
        higher_is_better: or lower.
        depends_on: parts of the protocol, beside extractor, constants and image size, that change it.
    """

    higher_is_better: bool
    depends_on: tuple[str, ...]


METRICS = {  # in the order of tables
    "FID": Metric(False, ("samples.num", "reference")),
    "sFID": Metric(False, ("samples.num", "reference")),
    "IS": Metric(True, ("samples.num",)),
    "precision": Metric(True, ("samples.num", "compared")),
    "recall": Metric(True, ("samples.num", "compared")),
    "KID": Metric(False, ("compared",)),
}
ALWAYS = ("extractor", "metrics", "samples.image_size")
OTHERS = {"FID": "FD", "KID": "KD", "IS": "score"}  # what is called otherwise with another extractor than Inception


@dataclass(frozen=True)
class Score:
    """A number and its uncertainty.

    Args:
        value: what is reported.
        error: its standard error for the draw of the samples, the reference held fixed; None where there is none.
        without_group: the value without group 0, 1, ... of the samples, which the error comes from.
    """

    value: float
    error: float | None = None
    without_group: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.error or not math.isfinite(self.error):
            return f"{self.value:.4g}"
        decimals = max(0, 1 - math.floor(math.log10(self.error)))  # two digits of the error
        return f"{self.value:.{decimals}f} ± {self.error:.{decimals}f}"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Args:
        scores: by name: "FID", "FID-1000", "sFID", "IS", "precision", "recall", "KID"; with another extractor than
            Inception "FD-NAME" and so on.
        protocol: how it was measured: samples, reference, extractor, metrics, versions. Two that differ in it are not
            comparable.
        subject: what was measured: path and content of the samples, weights, step, seed, speed.
        environment: what should not matter: date, device, processes.
        warnings: what was found wrong on the way.
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
        """The same without the values that lack a group, for people."""
        return replace(self, scores={name: replace(score, without_group=[]) for name, score in self.scores.items()})

    def with_scores_of(self, earlier: "Evaluation") -> "Evaluation":
        """The same, and what an earlier evaluation of the same samples by the same protocol found beside.

        Where the two are of something else, nothing is added.
        """
        if self.subject.get("content") != earlier.subject.get("content") or protocol_differences(self, earlier):
            return self
        return replace(self, scores={**earlier.scores, **self.scores}, protocol={**earlier.protocol, **self.protocol})


def read_evaluation(path: Path) -> Evaluation:
    """Raises ValueError if the file is not an evaluation."""
    try:
        held = json.loads(path.read_text())
        scores = {name: Score(**score) for name, score in held.pop("scores").items()}
        evaluation = Evaluation(scores, **held)
        _check_types(evaluation)
        return evaluation
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no evaluation as eval/fid.py writes it: give its --out, or the folder of samples "
                         "that it was written to") from error


def _check_types(evaluation: Evaluation) -> None:
    """Raises TypeError or ValueError for what no evaluation holds, as after editing by hand."""
    numbers = [(score.value, score.error or 0.0, *score.without_group) for score in evaluation.scores.values()]
    if not all(math.isfinite(number) for each in numbers for number in each) or any(each[1] < 0 for each in numbers):
        raise ValueError("a score is not finite, or its error negative")
    if unknown := [name for name in evaluation.scores if metric_of(name) not in METRICS]:
        raise ValueError(f"there is no score {unknown[0]}")
    facts = evaluation.subject | flat(evaluation.protocol)
    texts = ("ckpt", "path", "device")
    for name in (*texts, "images_per_second", "step", "processes", "samples.sampler.steps", "samples.sampler.cfg"):
        if not isinstance(facts.get(name), str | None if name in texts else int | float | None):
            raise TypeError(f"{name} is {facts[name]!r}")


def score_name(metric: str, extractor: str, num_samples: int) -> str:
    """What a number deserves to be called.

    Frechet distances are biased by the number of samples, so it stands in the name where it is not 50,000; and no
    number of another extractor bears the name of Inception's.

    Args:
        metric: "FID", "sFID", "IS", "KID", "precision" or "recall".
        extractor: "inception", or another's name.
        num_samples: N.
    """
    other = OTHERS.get(metric, metric)
    name = metric if extractor == "inception" else f"{other}-{extractor}"
    return f"{name}-{num_samples}" if metric in ("FID", "sFID") and num_samples != FULL else name


def metric_of(name: str) -> str:
    """The metric of a score's name: "FID" of "FID-1000" and of "FD-digits-1000"."""
    first = name.split("-")[0]
    return {other: metric for metric, other in OTHERS.items()}.get(first, first)


def protocol_differences(a: Evaluation, b: Evaluation) -> dict[str, tuple]:
    """What differs in their protocols: dotted name -> (of a, of b); None where one says nothing.

    Of a whole part that one of them lacks, as that of metrics that were not asked for, nothing is said.
    """
    both = a.protocol.keys() & b.protocol.keys()
    here, there = (flat({part: e.protocol[part] for part in e.protocol if part in both}) for e in (a, b))
    return {name: (here.get(name), there.get(name))
            for name in dict.fromkeys([*here, *there]) if here.get(name) != there.get(name)}


def flat(values: dict) -> dict[str, object]:
    """{"samples": {"num": 1000}} -> {"samples.num": 1000}"""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= {f"{name}.{below}": inner for below, inner in flat(value).items()}
        else:
            found[name] = value
    return found


def is_measured_alike(a: Evaluation, b: Evaluation, name: str) -> bool:
    """Whether score `name` of one may be subtracted from the other's: all agrees that the metric depends on."""
    matters = (*ALWAYS, *METRICS[metric_of(name)].depends_on)
    differing = protocol_differences(a, b)
    return name in a.scores and name in b.scores and not any(
        found == part or found.startswith(f"{part}.") for found in differing for part in matters)


def are_paired(a: Evaluation, b: Evaluation) -> bool:
    """Whether sample i of both was drawn from the same noise with the same label."""
    drawn = [[e.subject.get("seed"), *(flat(e.protocol).get(f"samples.{name}") for name in
                                       ("num", "labels", "image_size"))] for e in (a, b)]
    return drawn[0] == drawn[1] and drawn[0][0] is not None


def difference(a: Evaluation, b: Evaluation, name: str) -> Score:
    """Score `name` of a minus that of b, with the standard error of the difference.

    Where both were drawn from the same noise and labels it is taken from the differences group by group, which is
    what the two have not in common; else the two errors are independent and add up in squares.
    """
    ours, theirs = a.scores[name], b.scores[name]
    value = ours.value - theirs.value
    if are_paired(a, b) and len(ours.without_group) == len(theirs.without_group) > 1:
        without = [x - y for x, y in zip(ours.without_group, theirs.without_group, strict=True)]
        return Score(value, jackknife_error(without), without)
    if ours.error is None or theirs.error is None:
        return Score(value)
    return Score(value, math.hypot(ours.error, theirs.error))


def jackknife_error(without_group: Sequence[float]) -> float:
    """Standard error from the values without one group each (delete-a-group jackknife, Shao and Tu 1995, 2.3)."""
    groups = len(without_group)
    mean = math.fsum(without_group) / groups
    return math.sqrt((groups - 1) / groups * math.fsum((value - mean) ** 2 for value in without_group))
