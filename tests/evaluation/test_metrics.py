"""Table of metrics; test_metric_functions.py tests the functions."""

import pytest
import torch

from sit_atconv.evaluation.metric_functions import NEIGHBOURS
from sit_atconv.evaluation.metrics import METRICS, Metric, MetricInput, find_metric, kind_of, metric_of
from sit_atconv.evaluation.scores import Score


@pytest.mark.parametrize(
    ("metric", "extractor", "num", "names"),
    [
        ("fid", "inception", 50_000, ["FID"]),
        ("fid", "inception", 10_000, ["FID-10000"]),
        ("sfid", "inception", 10_000, ["sFID-10000"]),
        ("is", "inception", 10_000, ["IS"]),
        ("fid", "dinov2", 50_000, ["FD-dinov2"]),
        ("fid", "digits", 1000, ["FD-digits-1000"]),
        ("kid", "digits", 1000, ["KD-digits"]),
        ("prc", "digits", 1000, ["precision-digits", "recall-digits"]),
        ("is", "digits", 50_000, ["score-digits"]),
        ("fid", "clip-vit-b-32", 9, ["FD-clip-vit-b-32-9"]),
    ],
)
def test_score_names_and_their_metrics(metric, extractor, num, names):
    """Only 50,000 samples and Inception give "FID"; each name leads back to its metric."""
    assert METRICS[metric].score_names(extractor, num) == names
    assert [metric_of(name) for name in names] == [METRICS[metric]] * len(names)
    assert [kind_of(name) for name in names] == list(METRICS[metric].scores)


def test_names_of_unknown_metrics():
    assert metric_of("gap-digits") is None and kind_of("gap-digits") == "gap"
    for name in ("fvd", "FID"):
        with pytest.raises(
            ValueError, match=f"metric must be one of fid, sfid, is, prc, kid, dc, cmmd, copies, or .* not '{name}'"
        ):
            find_metric(name)


def test_precision_needs_one_image_more_than_neighbours():
    assert METRICS["prc"].at_least == NEIGHBOURS + 1


def test_scores_are_what_the_function_returned():
    def metric(returned, *names):
        return Metric(scores=names, compute=lambda inputs: returned, higher_is_better=True)

    nothing = MetricInput(None, None, None, None)
    score = Score(2.0, 0.5)
    assert metric(score, "a").measure(nothing) == (score,)
    assert metric((score, torch.tensor(0.5)), "a", "b").measure(nothing) == (score, Score(0.5))
    for returned in ((1.0, 2.0), float("nan"), Score(float("inf"))):
        with pytest.raises(ValueError, match=r"a cannot be .*: give a finite number for each name"):
            metric(returned, "a").measure(nothing)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": ("my-score",)}, "identifier, not 'my-score'"),
        ({"scores_elsewhere": ("a/b",)}, "identifier, not 'a/b'"),
        ({"reference": "image"}, "'images', 'every image' or None, not 'image'"),
    ],
)
def test_invalid_metrics_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Metric(**{"scores": ("a",), "compute": print, "higher_is_better": True} | options)
