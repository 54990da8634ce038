"""Statistics over seeds: coverage of intervals by simulation, and rows of runs that differ in their seeds alone."""

import math

import numpy as np
import pytest

from sit_atconv.evaluation.comparison import Comparison, make_runs
from sit_atconv.evaluation.comparison_table import to_csv, to_json, to_markdown
from sit_atconv.evaluation.records import Evaluation
from sit_atconv.evaluation.scores import Score, jackknife_error
from sit_atconv.evaluation.seeds import SeedScore, difference_of_means, over_seeds

REPETITIONS, GROUPS = 2000, 20


def score(value, group_errors):
    """Returns a score moved by the mean of known errors of its groups of samples, with the jackknife's error."""
    without = value + (group_errors.sum() - group_errors) / (GROUPS - 1)
    return Score(value + group_errors.mean(), jackknife_error(without), without.tolist())


def evaluation(found, seed=0, sampling_seed=0, **training):
    return Evaluation(
        {"FD-digits-1000": found},
        {"samples": {"num": 1000, "labels": "balanced", "image_size": [8, 8]}, "extractor": {"name": "digits"}},
        {
            "seed": sampling_seed,
            "ckpt": f"runs/{training.get('mixer', 'a')}-{seed}",
            "weights": f"{training} {seed}",
            "training": {"out": f"runs/{seed}", "model": training, "train": {"seed": seed, "steps": 9}},
        },
        {},
    )


@pytest.mark.parametrize("num_seeds", [3, 4, 5])
@pytest.mark.parametrize("noise", ["of each seed", "shared"])
def test_the_interval_of_a_difference_covers_the_truth(num_seeds, noise):
    """Known spread of seeds (0.2) and of samples (0.15), of each seed or the same for all: 95 % within 3 points."""
    rng, covered = np.random.default_rng(num_seeds), 0
    for _ in range(REPETITIONS):
        spread = 0.2 * rng.normal(size=(2, num_seeds))
        sampling = 0.15 * math.sqrt(GROUPS) * rng.normal(size=(2, num_seeds, GROUPS))
        if noise == "shared":
            sampling = np.broadcast_to(sampling[:, :1], sampling.shape)
        (a, b), (noise_a, noise_b) = spread, sampling
        differences = [score(a[seed] - b[seed], noise_a[seed] - noise_b[seed]) for seed in range(num_seeds)]
        low, high = over_seeds(differences, shares_noise=noise == "shared").interval
        covered += low <= 0 <= high
    assert 0.92 <= covered / REPETITIONS <= 0.98


def test_an_interval_that_ignores_the_shared_noise_would_cover_too_little():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(REPETITIONS):
        common = 0.15 * rng.normal()
        found = over_seeds([Score(0.05 * rng.normal() + common, 0.15) for _ in range(5)])
        covered += found.interval[0] <= 0 <= found.interval[1]
    assert covered / REPETITIONS < 0.7


@pytest.mark.parametrize("sizes", [(3, 5), (5, 5)])
def test_seeds_that_cannot_be_paired_are_independent(sizes):
    rng, covered = np.random.default_rng(1), 0
    for _ in range(REPETITIONS):
        found = difference_of_means(*(scale * rng.normal(size=n) for n, scale in zip(sizes, (0.3, 0.1), strict=True)))
        covered += found.interval[0] <= 0 <= found.interval[1]
    assert 0.92 <= covered / REPETITIONS <= 0.98
    assert difference_of_means([1.0], [2.0, 3.0]) == Score(-1.5)


def test_the_mean_of_three_seeds():
    """scipy.stats.t.interval(0.95, 2, 2, 1 / sqrt(3)) = (-0.484, 4.484)."""
    found = over_seeds([Score(1.0, 0.3), Score(2.0, 0.3), Score(3.0, 0.3)])
    assert isinstance(found, SeedScore) and found.num_seeds == 3
    assert (found.value, found.error) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert found.interval == (pytest.approx(-0.4841377), pytest.approx(4.4841377))
    assert found.sampling_error == pytest.approx(0.3 / math.sqrt(3))
    assert over_seeds([Score(1.0, 0.3)]) == Score(1.0, 0.3)


def rows_of(**values):
    """Rows of evaluations {mixer: {seed: value}}."""
    pairs = [(mixer, seed, value) for mixer, seeds in values.items() for seed, value in seeds.items()]
    evaluations = [evaluation(Score(value, 0.1), seed, seed, mixer=mixer) for mixer, seed, value in pairs]
    return make_runs(evaluations, [f"{mixer}-seed{seed}/cfg1" for mixer, seed, _ in pairs])


def test_runs_that_differ_in_their_seeds_alone_become_one_row():
    rows = rows_of(attention={0: 2.0, 1: 2.2, 2: 2.4}, atconv={1: 1.9, 0: 1.8}, other={0: 3.0})
    assert [(row.name, len(row.evaluations)) for row in rows] == [
        ("attention/cfg1", 3),
        ("atconv/cfg1", 2),
        ("other-seed0/cfg1", 1),
    ]
    comparison = Comparison(rows, rows[0], "FD-digits-1000")
    paired = comparison.difference(rows[1])  # over seeds 0 and 1: -0.2, -0.3
    assert paired.value == pytest.approx(-0.25) and paired.error == pytest.approx(0.05)
    assert comparison.difference(rows[2]).value == pytest.approx(3.0 - 2.2)  # one seed alone: no error
    assert comparison.difference(rows[2]).error is None
    text = to_markdown(comparison)
    assert "| attention/cfg1 (baseline) | 3 | 2.20 ± 0.12 (0.058) |" in text
    assert "FD-digits-1000, 95 % from" in to_csv(comparison).splitlines()[0]
    assert '"sampling error of FD-digits-1000"' in to_json(comparison)


def test_what_else_differs_is_another_row():
    two = [evaluation(Score(1.0), seed=0, mixer="a"), evaluation(Score(2.0), seed=1, mixer="b")]
    assert len(make_runs(two, ["x", "y"])) == 2
    twice = [evaluation(Score(1.0), seed=0), evaluation(Score(2.0), seed=0)]  # two averages of one run
    assert [row.name for row in make_runs(twice, ["ema0.9", "ema0.99"])] == ["ema0.9", "ema0.99"]
    unknown = [Evaluation({"FID": Score(float(i))}, {}, {"seed": i}, {}) for i in range(2)]
    assert len(make_runs(unknown, ["x", "y"])) == 2
    assert len(make_runs(two[:1] + [evaluation(Score(2.0), seed=1, mixer="a")], ["x-0", "x-1"], per_seed=True)) == 2
