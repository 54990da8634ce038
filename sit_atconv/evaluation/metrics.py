"""Table of metrics: which features each uses, and how its scores are named and compared.

A metric is one entry here, or one that a user's module registers; commands, checks, records, tables and charts read it.
This file does not import torch; the functions are in metric_functions.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from sit_atconv.evaluation.scores import Score
from sit_atconv.runtime.tables import Table, import_module_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sit_atconv.evaluation.features import Blocks
    from sit_atconv.evaluation.gaussians import Gaussian

FULL = 50_000  # samples for the FID that papers report
BASELINE = 1000  # images of the reference whose nearest other images tell how near real images are
ANYTHING = ("samples.num", "reference", "compared")  # all that a score may depend on


@dataclass(frozen=True)
class MetricInput:
    """Input of a metric.

    Args:
        generated: the extractor's output for the N samples, float32 (N, D), on the CPU.
        real: the reference, as `Metric.reference` says: a `Gaussian`, float32 (M, D) on the CPU, `Blocks`, or None.
        group: group of each sample (N,), for standard errors by the jackknife.
        device: device for slow computations.
        held_out: the extractor's output for real images that are not in the reference, or None.
        notes: what a metric has found beside its scores, for the record's `subject`: JSON.
    """

    generated: "Tensor"
    real: "Gaussian | Tensor | Blocks | None"
    group: "Tensor"
    device: "torch.device"
    held_out: "Tensor | None" = None
    notes: dict = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric, which gives one or more scores.

    Args:
        scores: names of its scores, which must be identifiers: ("precision", "recall").
        compute: maps a `MetricInput` to a `Score` or number, or to a tuple with one for each name.
        higher_is_better: False if lower scores are better.
        features: output of the extractor that it uses: "features", "logits" or "spatial".
        reference: "statistics" compares with the Gaussian of the reference, "images" with the features of up to 10,000
            of its images, "every image" with all of them, in blocks, None with nothing.
        at_least: smallest number of samples, and of reference images if the reference consists of images.
        depends_on: parts of the protocol that change it, besides extractor, constants and image size.
        scores_elsewhere: names of its scores with another extractor than Inception; () keeps the names.
        by_default: True computes it if the user names no metrics.
        extractors: beginning of the names of the extractors that it is defined for; "" is any.
        names_num_samples: True appends a number of samples other than 50,000 to the names, since the bias is strong.
    """

    scores: tuple[str, ...]
    compute: Callable[[MetricInput], Score | float | tuple[Score | float, ...]]
    higher_is_better: bool
    features: str = "features"
    reference: str | None = None
    at_least: int = 2
    depends_on: tuple[str, ...] = ANYTHING
    scores_elsewhere: tuple[str, ...] = ()
    names_num_samples: bool = False
    by_default: bool = True
    extractors: str = ""

    def __post_init__(self):
        object.__setattr__(self, "scores_elsewhere", self.scores_elsewhere or self.scores)
        if odd := [name for name in (*self.scores, *self.scores_elsewhere) if not name.isidentifier()]:
            raise ValueError(f"the name of a score must be an identifier, not {odd[0]!r}")
        if self.reference not in (None, "statistics", "images", "every image"):
            raise ValueError(
                f"a metric's reference must be 'statistics', 'images', 'every image' or None, not {self.reference!r}"
            )

    def measure(self, inputs: MetricInput) -> tuple[Score, ...]:
        """Returns one score per name. ValueError: `compute` returned another number, or one is not finite."""
        computed = self.compute(inputs)
        computed = computed if isinstance(computed, tuple) else (computed,)
        scores = tuple(each if isinstance(each, Score) else Score(float(each)) for each in computed)
        if len(scores) != len(self.scores) or not all(math.isfinite(score.value) for score in scores):
            raise ValueError(
                f"{', '.join(self.scores)} cannot be {', '.join(map(str, scores))}: give a finite number for each name"
            )
        return scores

    def score_names(self, extractor: str, num_samples: int) -> list[str]:
        """Returns the full names of its scores: "FID", "FID-1000", "FD-dinov2".

        Frechet distances are biased by the number of samples, so the name contains it unless it is 50,000. Scores of
        other extractors have other names than Inception's.
        """
        names = self.scores if extractor == "inception" else [f"{name}-{extractor}" for name in self.scores_elsewhere]
        return [f"{name}-{num_samples}" if self.names_num_samples and num_samples != FULL else name for name in names]


def _functions():
    from sit_atconv.evaluation import metric_functions  # imports torch, which --help does not need

    return metric_functions


def _frechet(inputs: MetricInput) -> Score:
    return _functions().frechet(inputs.generated, inputs.real, inputs.group, progress=True)


def _nearest(inputs: MetricInput) -> Score:
    from sit_atconv.evaluation.nearest import nearest_ratio

    blocks = cast("Blocks", inputs.real)
    own, baseline = (None, inputs.held_out) if inputs.held_out is not None else blocks.spread(BASELINE)
    score, inputs.notes["nearest"] = nearest_ratio(
        inputs.generated, blocks, baseline, own, inputs.group, inputs.device, progress=True
    )
    return score


METRICS = Table(
    "metric",
    Metric,
    {  # in the order of records and tables
        "fid": Metric(
            scores=("FID",),
            scores_elsewhere=("FD",),
            names_num_samples=True,
            higher_is_better=False,
            compute=_frechet,
            reference="statistics",
            depends_on=("samples.num", "reference"),
        ),
        "sfid": Metric(
            scores=("sFID",),
            names_num_samples=True,
            higher_is_better=False,
            compute=_frechet,
            features="spatial",
            reference="statistics",
            depends_on=("samples.num", "reference"),
        ),
        "is": Metric(
            scores=("IS",),
            scores_elsewhere=("score",),
            higher_is_better=True,
            compute=lambda inputs: _functions().inception_score(inputs.generated),
            features="logits",
            at_least=1,
            depends_on=("samples.num",),
        ),
        "prc": Metric(
            scores=("precision", "recall"),
            higher_is_better=True,
            compute=lambda inputs: _functions().precision_recall(
                inputs.generated, inputs.real, inputs.device, progress=True
            ),
            reference="images",
            at_least=4,
            depends_on=("samples.num", "compared"),
        ),
        "kid": Metric(
            scores=("KID",),
            scores_elsewhere=("KD",),
            higher_is_better=False,
            compute=lambda inputs: _functions().kid(inputs.generated, inputs.real, inputs.group, progress=True),
            reference="images",
            depends_on=("compared",),
        ),
        "dc": Metric(
            scores=("density", "coverage"),
            higher_is_better=True,
            compute=lambda inputs: _functions().density_coverage(
                inputs.generated, inputs.real, inputs.group, inputs.device, progress=True
            ),
            reference="images",
            at_least=6,
            depends_on=("samples.num", "compared"),
            by_default=False,
        ),
        "cmmd": Metric(
            scores=("CMMD",),
            higher_is_better=False,
            compute=lambda inputs: _functions().cmmd(
                inputs.generated, inputs.real, inputs.group, inputs.device, progress=True
            ),
            reference="images",
            depends_on=("samples.num", "compared"),
            extractors="clip-",
        ),
        "copies": Metric(
            scores=("nearest_ratio",),
            higher_is_better=True,
            compute=_nearest,
            reference="every image",
            depends_on=("reference", "compared", "held_out"),
            by_default=False,
        ),
    },
)


def find_metric(name: str) -> Metric:
    """Returns the metric that a user typed; imports and registers one given by its path, `my_module.mine`.

    ValueError: there is no such metric.
    """
    metric = METRICS.find(import_module_of(name))
    return metric if metric in METRICS.values() else METRICS.register(name.rpartition(".")[2], metric)


def metric_of(score: str) -> Metric | None:
    """Returns the metric of a score such as "FD-digits-1000", or None if it is not imported."""
    return next((metric for metric in METRICS.values() if kind_of(score) in metric.scores), None)


def kind_of(score: str) -> str:
    """Returns a score's name without extractor and number: "FID" for "FID-1000" and "FD-digits-1000"."""
    first = score.split("-")[0]
    kinds = {
        there: here
        for metric in METRICS.values()
        for here, there in zip(metric.scores, metric.scores_elsewhere, strict=True)
    }
    return kinds.get(first, first)


def kinds_of_scores() -> list[str]:
    """Returns the kinds of scores of all metrics, in the order of tables."""
    return [kind for metric in METRICS.values() for kind in metric.scores]
