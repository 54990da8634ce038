"""Metric from a user's module in eval/fid.py and eval/compare.py, without changes to the package."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from sit_atconv.data.digits import load_digits
from sit_atconv.evaluation.metrics import METRICS
from sit_atconv.evaluation.records import read_evaluation
from tests.conftest import load_command

OWN = """
import torch
from sit_atconv.evaluation.metrics import METRICS, Metric
from sit_atconv.evaluation.scores import Score

def closeness(inputs):
    return -torch.cdist(inputs.generated, inputs.real).amin(1).mean()

METRICS.register("near", Metric(scores=("closeness",), compute=closeness, reference="images", higher_is_better=True))

sure = Metric(
    scores=("certainty", "doubt"), scores_elsewhere=("sure", "unsure"), features="logits", higher_is_better=False,
    compute=lambda inputs: (Score(float(inputs.generated.softmax(1).amax(1).mean()), 0.01), 0.25),
)
"""
COMMON = ("--reference", "reference.npz", "--extractor", "digits", "--features", "features")
DIGITS = np.repeat(load_digits()[0][..., None], 3, axis=-1)

SHIPPED = ("fid", "sfid", "is", "prc", "kid", "dc")


@pytest.fixture
def forget(tmp_path, monkeypatch):
    """forget() restores the state of a new process that has not imported the module."""
    (tmp_path / "own_metric.py").write_text(OWN)
    np.savez(tmp_path / "reference.npz", DIGITS[:400])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run():
        monkeypatch.delitem(sys.modules, "own_metric", raising=False)
        monkeypatch.setattr(
            METRICS, "_entries", {name: METRICS[name] for name in ("fid", "sfid", "is", "prc", "kid", "dc")}
        )

    run()
    return run


@pytest.fixture
def evaluate(forget, tmp_path):
    """evaluate(name, first, ...) evaluates 200 digits starting at `first`; returns the record."""

    def run(name, first, *more):
        np.savez(tmp_path / f"{name}.npz", DIGITS[first : first + 200])
        load_command("eval/fid.py").main(["--samples", f"{name}.npz", "--out", f"{name}.json", *COMMON, *more])
        return read_evaluation(tmp_path / f"{name}.json")

    return run


def test_a_registered_metric_is_computed_by_default(evaluate, capsys):
    found = evaluate("all", 0, "--import", "own_metric")
    assert list(found.scores) == [
        "FD-digits-200",
        "score-digits",
        "precision-digits",
        "recall-digits",
        "KD-digits",
        "closeness-digits",
    ]
    assert found.scores["closeness-digits"].value == pytest.approx(0, abs=0.01)  # the samples are in the reference
    assert found.protocol["compared"]["num"] == 400
    assert list(json.loads(capsys.readouterr().out)["scores"]) == list(found.scores)


def test_a_metric_given_by_path_is_added_to_the_record(evaluate, forget, tmp_path):
    options = ("--metrics", "own_metric.sure", "fid")
    assert list(evaluate("one", 0, *options).scores) == ["FD-digits-200", "sure-digits", "unsure-digits"]
    forget()
    (tmp_path / "one.json").unlink()
    for more in (options, ("--metrics", "kid")):  # the second in a process that does not know the metric
        load_command("eval/fid.py").main(["--samples", "one.npz", *COMMON, *more])
        forget()
    (record,) = tmp_path.glob("one.scores-digits-*.json")
    found = read_evaluation(record).scores
    assert list(found) == ["FD-digits-200", "sure-digits", "unsure-digits", "KD-digits"]
    assert found["sure-digits"].error == 0.01 and found["unsure-digits"].value == 0.25


def test_records_are_compared_in_the_direction_of_the_metric(evaluate, forget, tmp_path, monkeypatch, capsys):
    figures = {}
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **options: figures.update({path.name: self}) or path.write_text("")
    )
    for number, name in enumerate("ab"):
        found = evaluate(name, 200 * number, "--metrics", "near", "own_metric.sure", "fid", "--import", "own_metric")
        replace(found, subject={**found.subject, "images_per_second": 10.0 + number}).save(tmp_path / f"{name}.json")
        forget()
    compare = load_command("eval/compare.py").main
    argv = ["a.json", "b.json", "--metric"]

    for known in (["closeness", "--import", "own_metric"], ["near", "--import", "own_metric"], ["own_metric.sure"]):
        capsys.readouterr()
        compare([*argv, *known])
        label = "sure-digits (lower" if known == ["own_metric.sure"] else "closeness-digits (higher"
        assert figures.popitem()[1].axes[0].get_ylabel().startswith(f"{label} is better)")
        assert f"| difference in {label.split(' ')[0]} |" in capsys.readouterr().out
        forget()

    compare([*argv, "closeness"])
    said = capsys.readouterr()
    assert "| closeness-digits | sure-digits | unsure-digits | difference in closeness-digits |" in said.out
    assert (
        "no pareto.png: it is unknown whether a higher closeness-digits is better: give --import MODULE, the "
        "module that registers its metric"
    ) in said.err
    assert figures == {} and "| FD-digits-200 |" in said.out


def test_errors_name_the_remedy(fails, forget, tmp_path):
    main = load_command("eval/fid.py").main
    argv = ["--samples", "reference.npz", *COMMON, "--metrics"]
    assert "no module named 'own_metrics'" in fails(main, [*argv, "own_metrics.sure"]).lower()
    assert "metric own_metric.closeness is not a Metric" in fails(main, [*argv, "own_metric.closeness"])
    assert "must be one of fid, sfid, is, prc, kid, dc, near, or your own as module.NAME, not 'far'" in fails(
        main, [*argv, "far", "--import", "own_metric"]
    )
    (tmp_path / "taken.py").write_text(OWN.replace('"near"', '"my_near"').replace('"closeness"', '"FD"'))
    assert "two metrics have a score FD: rename the score of yours" in fails(main, [*argv, "fid", "--import", "taken"])
