import json
import math

import numpy as np
import pytest

from sit_atconv.evaluation.records import (
    Evaluation,
    difference,
    is_measured_alike,
    protocol_differences,
    read_evaluation,
)
from sit_atconv.evaluation.scores import Score, jackknife_error


def evaluation(values=(2.0, 2.2, 1.8), seed=0, num=1000, **protocol):
    samples = {"num": num, "labels": "random", "image_size": [8, 8]} | protocol
    score = Score(sum(values) / len(values), jackknife_error(values), list(values))
    return Evaluation({"FID-1000": score}, {"samples": samples, "reference": {"num": 7}}, {"seed": seed}, {})


def test_scores_are_printed_to_two_digits_of_their_error():
    assert str(Score(2.1234, 0.0456)) == "2.123 ± 0.046" and str(Score(17.2, 1.23)) == "17.2 ± 1.2"
    assert str(Score(123.456, 25.0)) == "123 ± 25" and str(Score(0.82649)) == "0.8265"
    assert str(Score(1.5, 0.0)) == "1.5" and str(Score(1.5, math.nan)) == "1.5"


def test_a_record_survives_writing_and_reading(tmp_path):
    evaluation().save(tmp_path / "x.json")
    assert read_evaluation(tmp_path / "x.json") == evaluation()
    for text in ("{}", "[]", "no json", '{"scores": {"FID": 3}}', '{"scores": {}}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match="not an evaluation"):
            read_evaluation(tmp_path / "x.json")


@pytest.mark.parametrize(
    "edit",
    [
        lambda held: held["scores"]["FID-1000"].update(value=None),
        lambda held: held["scores"]["FID-1000"].update(value="2"),
        lambda held: held["scores"]["FID-1000"].update(value=float("nan")),
        lambda held: held["scores"]["FID-1000"].update(error=-1.0),
        lambda held: held["scores"]["FID-1000"].update(error="x"),
        lambda held: held["scores"]["FID-1000"].update(without_group=None),
        lambda held: held["scores"]["FID-1000"].update(without_group=["x"]),
        lambda held: held["scores"].update({"../FVD": {"value": 3.0}}),
        lambda held: held.update(subject=None),
        lambda held: held.update(protocol=[]),
        lambda held: held["subject"].update(ckpt=3),
        lambda held: held["subject"].update(images_per_second="fast"),
        lambda held: held["protocol"]["samples"].update(sampler={"steps": "many"}),
    ],
)
def test_records_edited_by_hand_are_refused(tmp_path, edit):
    held = json.loads(evaluation().to_json())
    edit(held)
    (tmp_path / "x.json").write_text(json.dumps(held))
    with pytest.raises(ValueError, match=r"x\.json is not an evaluation"):
        read_evaluation(tmp_path / "x.json")


def test_scores_of_unknown_metrics_are_read(tmp_path):
    """They count as depending on the whole protocol."""
    held = json.loads(evaluation().to_json())
    held["scores"]["FVD-digits"] = {"value": 3.0}
    (tmp_path / "x.json").write_text(json.dumps(held))
    found = read_evaluation(tmp_path / "x.json")
    assert found.scores["FVD-digits"] == Score(3.0) and is_measured_alike(found, found, "FVD-digits")
    for part in ("samples", "reference", "compared"):
        a, b = ({**held["protocol"], part: {"num": num}} for num in (1, 2))
        assert not is_measured_alike(
            Evaluation(found.scores, a, {}, {}), Evaluation(found.scores, b, {}, {}), "FVD-digits"
        )


def test_scores_of_an_earlier_record_are_kept():
    """Only if samples and protocol are the same; newer scores replace older ones."""
    first, second, other = evaluation(), evaluation((3.0, 3.0)), evaluation(num=7)
    for each, content in ((first, "a"), (second, "a"), (other, "a")):
        each.subject["content"] = content
    first.scores["recall"] = Score(0.5)
    first.protocol["compared"] = {"num": 3}
    merged = second.with_scores_of(first)
    assert merged.scores == {"FID-1000": second.scores["FID-1000"], "recall": Score(0.5)}
    assert merged.protocol["compared"] == {"num": 3}
    assert second.with_scores_of(other) is second
    second.subject["content"] = "b"
    assert second.with_scores_of(first) is second


def test_differences_of_protocols_are_named():
    assert protocol_differences(evaluation(), evaluation(seed=1)) == {}
    a, b = evaluation(sampler={"steps": 25}), evaluation(num=500, sampler={"steps": 50})
    assert protocol_differences(a, b) == {"samples.num": (1000, 500), "samples.sampler.steps": (25, 50)}
    assert protocol_differences(evaluation(), a) == {"samples.sampler.steps": (None, 25)}


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=400)
    without = [np.delete(values, i).mean() for i in range(400)]
    assert jackknife_error(without) == pytest.approx(values.std(ddof=1) / 20, rel=1e-9)


def test_samples_from_the_same_noise_are_compared_in_pairs():
    a, b = evaluation((2.0, 2.2, 1.8)), evaluation((1.0, 1.2, 0.8))
    assert difference(a, b, "FID-1000").value == pytest.approx(1)
    assert difference(a, b, "FID-1000").error == pytest.approx(0, abs=1e-12)
    for other in (evaluation((1.0, 1.2, 0.8), seed=1), evaluation((1.0, 1.2, 0.8), labels="balanced")):
        independent = difference(a, other, "FID-1000")
        assert independent.error == pytest.approx(math.sqrt(2) * a.scores["FID-1000"].error)
    unknown = evaluation(seed=None)
    assert difference(unknown, unknown, "FID-1000").error > 0
    of_nobody = Evaluation(a.scores, {}, {}, {})
    assert difference(a, of_nobody, "FID-1000").error == pytest.approx(independent.error)
