import math

import numpy as np
import pytest
import torch
import torch_fidelity
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from sit_atconv.data.digits import load_digits
from sit_atconv.evaluation import metric_functions as metrics
from sit_atconv.evaluation.extractors import open_extractor
from sit_atconv.evaluation.features import extract_features
from sit_atconv.evaluation.gaussians import Gaussian, fit_gaussian
from sit_atconv.evaluation.image_sets import ImageSet


@pytest.fixture(scope="module")
def digits():
    """Two shuffled parts of the digits: uint8 (300, 8, 8, 3) and (400, 8, 8, 3)."""
    images = np.repeat(load_digits()[0][..., None], 3, axis=-1)[np.random.default_rng(0).permutation(1797)]
    return images[:300], images[300:700]


@pytest.fixture(scope="module")
def features(digits):
    network = open_extractor("digits")
    return [extract_features(network, ImageSet("x", part)) for part in digits]


class Images(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def compare_with_torch_fidelity(generated: dict, real: dict, theirs: dict):
    """Compares our scores from features with torch-fidelity's from the same images."""
    group = metrics.jackknife_groups(len(generated["features"]))
    precision, recall = metrics.precision_recall(generated["features"], real["features"])
    ours = {
        "frechet_inception_distance": metrics.frechet(
            generated["features"], fit_gaussian(real["features"]), group
        ).value,
        "inception_score_mean": metrics.inception_score(generated["logits"]).value,
        "kernel_inception_distance_mean": metrics.kid(generated["features"], real["features"], group).value,
        "precision": precision.value,
        "recall": recall.value,
    }
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name], rel=1e-6), name


ALL = dict(
    fid=True,
    isc=True,
    kid=True,
    prc=True,
    samples_shuffle=False,
    prc_neighborhood=3,
    cache=False,
    cuda=False,
    verbose=False,
)


def test_agrees_with_torch_fidelity_on_digits(digits, features):
    a, b = map(Images, digits)
    theirs = torch_fidelity.calculate_metrics(
        input1=a, input2=b, feature_extractor="digits", isc_splits=1, kid_subset_size=300, **ALL
    )
    compare_with_torch_fidelity(*features, theirs)


@pytest.mark.slow
def test_agrees_with_torch_fidelity_on_inceptions_graph(digits, inception_file, monkeypatch):
    """Uses the real network with random weights."""
    from sit_atconv.evaluation import extractors

    monkeypatch.setattr(extractors, "INCEPTION_SHA256", extractors.sha256_of(inception_file)[:8])
    network = open_extractor("inception", str(inception_file))
    parts = [part[:80] for part in digits]
    ours = [extract_features(network, ImageSet("x", part)) for part in parts]
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(parts[0]),
        input2=Images(parts[1]),
        isc_splits=1,
        kid_subset_size=80,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_file),
        **ALL,
    )
    compare_with_torch_fidelity(*ours, theirs)


def test_torch_fidelity_uses_our_registered_extractor(features):
    assert "digits" in FEATURE_EXTRACTORS_REGISTRY
    assert features[0]["features"].shape == (300, 48) and features[0]["logits"].shape == (300, 10)


# -------------------------------------------------------------------------------------------- Frechet distance


def test_frechet_distance_of_gaussians():
    torch.manual_seed(0)
    a, b = torch.randn(20_000, 3), 2 * torch.randn(20_000, 3) + 1
    assert metrics.frechet_distance(fit_gaussian(a), fit_gaussian(b)) == pytest.approx(3 * (1 + 1), rel=0.03)
    assert abs(metrics.frechet_distance(fit_gaussian(a), fit_gaussian(a))) < 1e-8


def test_the_fast_frechet_distance_is_equal(features):
    generated, real = (fit_gaussian(part["features"]) for part in features)
    fast = metrics._frechet_by_root(generated, real, metrics._root(real.sigma))
    assert fast == pytest.approx(metrics.frechet_distance(generated, real), rel=1e-8)


def test_single_precision_statistics_give_the_same_distance(features):
    """torch-fidelity needs equal dtypes, and published statistics have float32 or float64."""
    generated, real = (fit_gaussian(part["features"]) for part in features)
    single = Gaussian(*(array.astype(np.float32).astype(np.float64) for array in (real.mu, real.sigma)))
    assert metrics.frechet_distance(generated, single) == pytest.approx(
        metrics.frechet_distance(generated, real), rel=1e-4
    )


def test_the_digits_distance_tells_good_from_bad():
    digits, labels = load_digits()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(digits))
    means = np.stack([digits[labels == c].mean(0) for c in range(10)]).astype(np.uint8)
    network = open_extractor("digits")

    def distance(images, reference):
        sets = (ImageSet("x", np.repeat(part[..., None], 3, axis=-1)) for part in (images, reference))
        gaussians = [fit_gaussian(extract_features(network, part, 512)["features"]) for part in sets]
        return metrics.frechet_distance(*gaussians)

    halves = distance(digits[order[::2]], digits[order[1::2]])
    assert 0 < halves < 2
    assert distance(rng.integers(0, 256, (1000, 8, 8), dtype=np.uint8), digits) > 50 * halves
    assert distance(digits[labels == 3], digits) > 50 * halves
    assert distance(np.repeat(means, 100, axis=0), digits) > 5 * halves
    assert distance(digits[labels != 3], digits) > 3 * halves


# ---------------------------------------------------------------------------------------------- standard errors


def test_the_jackknife_follows_the_true_spread_of_the_frechet_distance():
    """200 sets of samples in 16 dimensions, whose distance is 10 times its bias."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 16, generator=generator) / 4
    real = Gaussian(np.zeros(16), np.eye(16))
    draws = [torch.randn(1000, 16, generator=generator) @ (torch.eye(16) + mix) + 0.3 for _ in range(200)]
    group = metrics.jackknife_groups(1000)
    scores = [metrics.frechet(draw, real, group) for draw in draws]
    values = np.array([score.value for score in scores])
    true = metrics.frechet_distance(fit_gaussian(torch.cat(draws)), real)
    assert true > 10 * abs(values.mean() - true)
    assert np.mean([score.error for score in scores]) == pytest.approx(values.std(ddof=1), rel=0.2)


def test_the_jackknife_is_too_large_where_the_distance_is_only_bias():
    """The samples have the reference's own distribution, as in docs/evaluation.md."""
    generator = torch.Generator().manual_seed(0)
    real, group = Gaussian(np.zeros(16), np.eye(16)), metrics.jackknife_groups(1000)
    scores = [metrics.frechet(torch.randn(1000, 16, generator=generator), real, group) for _ in range(300)]
    spread = np.std([score.value for score in scores], ddof=1)
    assert 1.2 < np.mean([score.error for score in scores]) / spread < 1.6


@pytest.mark.parametrize("shift", [0.1, 0.5])
def test_the_error_of_kid_is_its_true_spread(monkeypatch, shift):
    monkeypatch.setattr(metrics, "KID_SUBSETS", 12)
    monkeypatch.setattr(metrics, "KID_SUBSET", 200)
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(800, 8, generator=generator)
    group = metrics.jackknife_groups(800)
    scores = [metrics.kid(torch.randn(800, 8, generator=generator) + shift, real, group) for _ in range(120)]
    spread = np.std([score.value for score in scores], ddof=1)
    assert np.mean([score.error for score in scores]) == pytest.approx(spread, rel=0.2)


def test_kid_without_a_group_is_kid_of_the_rest(features):
    from torch_fidelity.metric_kid import kernel_poly

    x, y = (part["features"][:200].numpy().astype(np.float64) for part in features)
    group = metrics.jackknife_groups(200).numpy()
    without = metrics._mmd2_without_groups(kernel_poly(x, x), kernel_poly(x, y), kernel_poly(y, y), group)
    for g in (0, 7, 19):
        rest = x[group != g]
        k_xx, k_xy, k_yy = kernel_poly(rest, rest), kernel_poly(rest, y), kernel_poly(y, y)
        n, m = k_xy.shape
        by_hand = (
            (k_xx.sum() - np.trace(k_xx)) / (n * (n - 1))
            - 2 * k_xy.mean()
            + (k_yy.sum() - np.trace(k_yy)) / (m * (m - 1))
        )
        assert without[g] == pytest.approx(by_hand, rel=1e-9)


def test_groups_are_equal_in_size_and_balanced_over_labels():
    labels = torch.randperm(400).remainder(8).tolist()  # 50 of each
    group = metrics.jackknife_groups(400, labels)
    counts = torch.zeros(8, metrics.GROUPS).index_put_((torch.tensor(labels), group), torch.ones(400), accumulate=True)
    assert counts.min() >= 2 and counts.max() <= 3 and set(counts.sum(0).tolist()) == {20.0}
    by_index = torch.arange(400) % metrics.GROUPS
    assert torch.equal(metrics.jackknife_groups(400), by_index)
    drawn = torch.randint(8, (400,)).tolist()
    assert not metrics.are_balanced(drawn) and torch.equal(metrics.jackknife_groups(400, drawn), by_index)
    assert metrics.are_balanced([0, 0, 1, 1, 1]) and not metrics.are_balanced([0, 0, 1, 1, 1, 1])
    assert not metrics.are_balanced([0, 0]) and not metrics.are_balanced([3, 1, 2])


def test_few_samples_have_no_error(features):
    generated, real = (part["features"] for part in features)
    few = generated[:39]
    assert metrics.frechet(few, fit_gaussian(real), metrics.jackknife_groups(39)).error is None
    assert metrics.kid(few, real, metrics.jackknife_groups(39)).error is None


# ----------------------------------------------------------------------------- Inception Score, precision, recall


def test_inception_score_uses_chunks_in_the_order_of_the_file():
    logits = torch.eye(10).repeat_interleave(1000, 0) * 20  # 10,000 sorted by class: two chunks of five classes each
    score = metrics.inception_score(logits)
    assert score.value == pytest.approx(5, rel=0.01) and score.error == pytest.approx(0, abs=1e-3)
    assert metrics.inception_score(logits[torch.randperm(10_000)]).value == pytest.approx(10, rel=0.01)
    assert metrics.inception_score(logits[::2]).error is None  # a single chunk
    assert metrics.inception_score(logits[:7500]).value == pytest.approx(4.24, rel=0.01)  # two chunks of 3,750
    assert metrics.inception_score(logits[:7500]).error is not None


def test_the_error_of_inception_score_is_that_of_a_mean_of_chunks():
    logits = torch.cat([torch.randn(5000, 10) * scale for scale in (1, 2, 3, 4)])
    chunks = [metrics.inception_score(chunk).value for chunk in logits.split(5000)]
    assert metrics.inception_score(logits).error == pytest.approx(np.std(chunks, ddof=1) / math.sqrt(4), rel=1e-6)


def test_precision_is_of_the_samples_and_recall_of_the_reference():
    """Samples of one digit only have high precision and low recall."""
    images, labels = load_digits()
    network = open_extractor("digits")
    rgb = np.repeat(images[..., None], 3, axis=-1)
    threes, everything = (
        extract_features(network, ImageSet("x", part))["features"] for part in (rgb[labels == 3], rgb)
    )
    precision, recall = metrics.precision_recall(threes, everything)
    assert precision.value == 1.0 and recall.value < 0.2


def test_a_neighbourhood_reaches_to_the_third_neighbour():
    """Real points are 0, 1, 2, 3, 10: the ball around 0 reaches to 3, the one around 10 to 1."""
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]])
    generated = torch.tensor([[-2.9], [-3.1], [18.9], [19.1]])
    assert metrics.precision_recall(generated, real)[0].value == 0.5


def test_balanced_labels_give_smaller_and_correct_errors():
    """Eight distant classes are equally frequent, so their proportions are not random."""
    generator = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(8, 6, generator=generator)
    labels = torch.arange(8).repeat(100)[torch.randperm(800, generator=generator)].tolist()
    real = Gaussian(np.zeros(6), np.eye(6))
    draws = [means[labels] + torch.randn(800, 6, generator=generator) for _ in range(100)]
    spread = np.std([metrics.frechet_distance(fit_gaussian(draw), real) for draw in draws], ddof=1)
    groups = [metrics.jackknife_groups(800, labels), metrics.jackknife_groups(800)]
    within, across = (np.mean([metrics.frechet(draw, real, group).error for draw in draws]) for group in groups)
    assert within == pytest.approx(spread, rel=0.2) and across > 1.5 * spread


def density_coverage_written_out(generated, real, k=5):
    def distance(a, b):
        return (a - b).square().sum().sqrt()

    radius = [sorted(distance(a, b) for b in real)[k] for a in real]
    inside = [[distance(sample, center) < r for center, r in zip(real, radius, strict=True)] for sample in generated]
    density = sum(map(sum, inside)) / (k * len(generated))
    return float(density), sum(map(any, zip(*inside, strict=True))) / len(real)


def test_density_and_coverage_equal_the_definition(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 7)
    torch.manual_seed(0)
    generated, real = torch.randn(45, 3), torch.randn(30, 3) + 0.5
    density, coverage = metrics.density_coverage(generated, real)
    assert (density.value, coverage.value) == pytest.approx(density_coverage_written_out(generated, real), rel=1e-6)
    density, coverage = metrics.density_coverage(real + 100, real)
    assert (density.value, coverage.value) == (0, 0)
    density, coverage = metrics.density_coverage(real.repeat(2, 1), real)
    assert coverage.value == 1 and metrics.density_coverage(generated[:8], real)[0].error is None


def test_the_error_of_density_follows_the_spread():
    torch.manual_seed(0)
    real = torch.randn(300, 4)
    found = [metrics.density_coverage(torch.randn(200, 4), real)[0] for _ in range(60)]
    spread = np.std([score.value for score in found], ddof=1)
    assert 0.8 < np.mean([score.error for score in found]) / spread < 1.25
