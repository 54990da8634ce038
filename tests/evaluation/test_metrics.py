import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from safetensors import safe_open
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from sit_atconv.data.images import load_digits
from sit_atconv.data.pixels import to_float
from sit_atconv.evaluation import extractors
from sit_atconv.evaluation.digit_features import WEIGHTS, DigitClassifier
from sit_atconv.evaluation.extractors import open_extractor
from sit_atconv.evaluation.image_sets import ImageSet, open_image_set
from sit_atconv.evaluation.metrics import (
    Features,
    compute_metrics,
    evaluate,
    extract_features,
    frechet_distance,
    frechet_jackknife,
)
from sit_atconv.evaluation.train_digit_features import split


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Two halves of the digits, as npz files and as a folder of PNGs."""
    folder = tmp_path_factory.mktemp("halves")
    images = np.repeat(load_digits()[0][..., None], 3, axis=-1)[np.random.default_rng(0).permutation(1797)]
    for name, half in [("a", images[:300]), ("b", images[300:700])]:
        np.savez(folder / f"{name}.npz", half)
    (folder / "a").mkdir()
    for i, image in enumerate(images[:300]):
        Image.fromarray(image).save(folder / "a" / f"{i:04d}.png")
    return folder


@pytest.fixture(scope="module")
def result(halves):
    return evaluate(str(halves / "a.npz"), str(halves / "b.npz"), extractor="digits")


class Images(torch.utils.data.Dataset):
    def __init__(self, path):
        self.images = torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def test_agrees_with_torch_fidelitys_own_metrics(halves, result):
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(halves / "a.npz"), input2=Images(halves / "b.npz"), feature_extractor="digits",
        fid=True, isc=True, kid=True, prc=True, isc_splits=1, samples_shuffle=False, kid_subset_size=300,
        prc_neighborhood=3, cache=False, cuda=False, verbose=False,
    )
    assert result["fd_digits"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert result["score_digits"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert result["kd_digits"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert result["kd_subset_size_digits"] == 300
    assert (result["precision_digits"], result["recall_digits"]) == (theirs["precision"], theirs["recall"])


def test_no_number_of_another_extractor_is_called_inceptions(result):
    assert not {"fid", "inception_score", "kid", "precision", "recall"} & set(result)
    assert result["extractor"] == "digits" and result["num_samples"] == 300 and result["num_reference"] == 400
    assert len(result["extractor_sha256"]) == 64


def test_a_folder_and_an_npz_of_the_same_images_are_the_same(halves, result):
    folder = evaluate(str(halves / "a"), str(halves / "b.npz"), extractor="digits")
    assert folder | {"samples": None} == result | {"samples": None}


def test_an_npz_stays_on_disk_and_a_compressed_one_is_the_same(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "second.npz", labels=np.arange(10), arr_0=images)
    np.savez_compressed(tmp_path / "compressed.npz", images)
    np.savez(tmp_path / "columns.npz", np.asfortranarray(images))
    for name, on_disk in [("second", True), ("compressed", False), ("columns", False)]:
        opened = open_image_set(str(tmp_path / f"{name}.npz"))
        assert isinstance(opened.images, np.memmap) == on_disk, name
        assert torch.equal(torch.cat(list(opened.batches(3))), torch.from_numpy(images).permute(0, 3, 1, 2)), name


def test_precision_is_of_the_samples_and_recall_of_the_reference():
    """One digit alone is precise and forgets nine of ten."""
    images, labels = load_digits()
    network = open_extractor("digits")
    rgb = np.repeat(images[..., None], 3, axis=-1)
    threes, everything = (extract_features(network, ImageSet("x", part)) for part in (rgb[labels == 3], rgb))
    values = compute_metrics(threes, everything, "digits", ["prc"])
    assert values["precision_digits"] == 1.0 and values["recall_digits"] < 0.2


def test_the_digits_distance_tells_good_from_bad():
    digits, labels = load_digits()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(digits))
    means = np.stack([digits[labels == c].mean(0) for c in range(10)]).astype(np.uint8)
    network = open_extractor("digits")

    def distance(images, reference):
        sets = (ImageSet("x", np.repeat(part[..., None], 3, axis=-1)) for part in (images, reference))
        return frechet_distance(*[extract_features(network, part, 512).features for part in sets])

    halves = distance(digits[order[::2]], digits[order[1::2]])
    assert 0 < halves < 2
    assert distance(rng.integers(0, 256, (1000, 8, 8), dtype=np.uint8), digits) > 50 * halves
    assert distance(digits[labels == 3], digits) > 50 * halves
    assert distance(np.repeat(means, 100, axis=0), digits) > 5 * halves
    assert distance(digits[labels != 3], digits) > 3 * halves


def test_inception_score_is_taken_in_the_order_of_the_file():
    logits = torch.eye(10).repeat_interleave(1000, 0) * 20  # 10,000 sorted by class: two chunks of five classes each
    features = Features(torch.randn(10_000, 4), logits)
    values = compute_metrics(features, features, "inception", ["is"])
    assert values["inception_score"] == pytest.approx(5, rel=0.01)


def test_frechet_distance_of_gaussians():
    torch.manual_seed(0)
    a, b = torch.randn(20_000, 3), 2 * torch.randn(20_000, 3) + 1
    assert frechet_distance(a, b) == pytest.approx(3 * (1 + 1), rel=0.03)
    assert abs(frechet_distance(a, a)) < 1e-8


def test_the_shipped_classifier():
    assert WEIGHTS.stat().st_size <= 500_000
    with safe_open(WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert metadata["command"] == "python -m sit_atconv.evaluation.train_digit_features"
    (pixels, labels), (_, held_out) = map(torch.from_numpy, load_digits()), split(1797)
    network = open_extractor("digits").network.classifier
    assert isinstance(network, DigitClassifier)
    with torch.inference_mode():
        correct = network(to_float(pixels[held_out])[:, None])[1].argmax(1) == labels[held_out]
    assert correct.float().mean().item() == pytest.approx(float(metadata["held_out_accuracy"]), abs=0.003)
    assert correct.float().mean() > 0.98


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: np.savez(f, images=np.zeros((9, 8, 8, 3), np.uint8)), r"holds \['images'\] and no arr_0"),
        (lambda f: np.savez(f, np.zeros((9, 8, 8, 3), np.float32)), r"float32 \(9, 8, 8, 3\)"),
        (lambda f: np.savez(f, np.zeros((9, 3, 8, 8), np.uint8)), r"\(9, 3, 8, 8\)"),
        (lambda f: f.write_bytes(b"no archive"), "cannot be read as an .npz"),
        (lambda f: np.savez(f, np.array([{}])), r"object \(1,\)"),
        (lambda f: damage(f), "cannot be read as an .npz"),
        (lambda f: np.savez(f, np.zeros((0, 8, 8, 3), np.uint8)), "holds 0 images, too few"),
        (lambda f: np.savez(f, np.zeros((2, 8, 8, 3), np.uint8)), "holds 2 images, too few"),
        (lambda f: np.savez(f, np.zeros((9, 16, 16, 3), np.uint8)), "for 8x8 images, not 16x16"),
    ],
)
def test_arrays_of_another_kind_are_named(tmp_path, make, message):
    make(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=message):
        evaluate(str(tmp_path / "x.npz"), "digits", extractor="digits")


def damage(path):
    """A compressed npz whose content is overwritten in the middle."""
    np.savez_compressed(path, np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    path.write_bytes(content)


def test_images_of_several_sizes_are_named(tmp_path):
    for i, side in enumerate((8, 8, 9)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=r"2\.png is 9x9, and those before it 8x8"):
        list(open_image_set(str(tmp_path)).batches(2))


def test_incomplete_samples_are_not_evaluated(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "manifest.json").write_text('{"complete": false}')
    with pytest.raises(ValueError, match="not complete"):
        open_image_set(str(tmp_path))


def test_samples_without_their_npz_are_read_from_images(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "manifest.json").write_text('{"complete": true}')
    for path in [tmp_path / "grid.png", *(tmp_path / "images" / f"{i}.png" for i in range(5))]:
        Image.new("RGB", (8, 8)).save(path)
    assert [path.parent.name for path in open_image_set(str(tmp_path)).images] == ["images"] * 5


def test_few_images_are_warned_of(halves, capsys):
    np.savez(halves / "few.npz", np.load(halves / "a.npz")["arr_0"][:20])
    evaluate(str(halves / "few.npz"), "digits", extractor="digits", metrics=["fid"])
    assert "few.npz holds 20 images" in capsys.readouterr().err
    evaluate(str(halves / "few.npz"), "digits", extractor="digits", metrics=["is"])
    assert "warning" not in capsys.readouterr().err


def test_unknown_names():
    with pytest.raises(ValueError, match=r"no extractor 'clip9'.*digits.*inception"):
        evaluate("digits", "digits", extractor="clip9")
    with pytest.raises(ValueError, match="not 'fvd'"):
        evaluate("digits", "digits", extractor="digits", metrics=["fvd"])


def test_a_registered_extractor_with_one_output(halves):
    register_feature_extractor("corner", Corner)
    try:
        values = evaluate(str(halves / "a.npz"), str(halves / "b.npz"), extractor="corner", metrics=["fid", "is"])
    finally:
        del FEATURE_EXTRACTORS_REGISTRY["corner"]
    assert values["fd_corner"] > 0 and values["score_corner"] >= 1 and values["extractor_sha256"] is None


class Corner(FeatureExtractorBase):
    """Pixels as features and as logits, as torch-fidelity's own CLIP and DINOv2 have one output for all metrics."""

    @staticmethod
    def get_provided_features_list():
        return ("pixels",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "pixels"

    def forward(self, x):
        return (x[:, 0, 3:5, 3:5].flatten(1).float() / 255,)


@pytest.fixture
def tf32():
    """cuDNN and cuBLAS with TF32 switched on."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = True
    yield backends
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


def test_features_are_extracted_without_tf32_and_the_callers_choice_comes_back(tf32):
    seen = []

    def network(images):
        seen.append([backend.allow_tf32 for backend in tf32])
        return torch.zeros(len(images), 2), torch.zeros(len(images), 3)

    extract_features(extractors.Extractor("x", network, None), ImageSet("x", np.zeros((4, 8, 8, 3), np.uint8)))
    assert seen == [[False, False]] and all(backend.allow_tf32 for backend in tf32)


# ----------------------------------------------------------------------------------------------------- Inception

@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """The true graph with random weights, in the format of the real file."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(extractors.FeatureExtractorInceptionV3, "load_state_dict", lambda *a: None)
        torch.manual_seed(0)
        torch.save(extractors.FeatureExtractorInceptionV3("x", ["2048"]).state_dict(), path)
    return path


def test_inception_from_a_path(inception_file, monkeypatch, halves):
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", extractors._sha256(inception_file)[:8])
    network = open_extractor("inception", str(inception_file))
    features = extract_features(network, ImageSet("x", np.load(halves / "a.npz")["arr_0"][:4]), batch_size=2)
    assert features.features.shape == (4, 2048) and features.logits.shape == (4, 1008)
    assert set(compute_metrics(features, features, "inception", ["fid", "is"])) == {"fid", "inception_score"}


def test_another_file_is_not_inception(inception_file, tmp_path):
    with pytest.raises(ValueError, match=r"sha256 begins with .*, not 6726825d"):
        open_extractor("inception", str(inception_file))
    with pytest.raises(ValueError, match=r"no Inception weights at .*nowhere"):
        open_extractor("inception", str(tmp_path / "nowhere"))


def test_weights_that_run_code_are_refused(tmp_path, monkeypatch):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"fc.bias": Payload()}, tmp_path / "evil.pth")
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", extractors._sha256(tmp_path / "evil.pth")[:8])
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        open_extractor("inception", str(tmp_path / "evil.pth"))
    assert not (tmp_path / "owned").exists()


def test_without_network_the_remedy_is_named(monkeypatch, tmp_path):
    from urllib.error import URLError

    def offline(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match=r"could not be downloaded.*--inception-weights"):
        open_extractor("inception")


def test_the_jackknife_tracks_the_true_spread():
    """Of 60 sets of 2,000 samples from a known Gaussian, in 4 dimensions; far from the reference, so that bias is
    small."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(4000, 4, generator=generator)
    values, errors = zip(*[
        frechet_jackknife(1.3 * torch.randn(2000, 4, generator=generator) + 1, real) for _ in range(60)], strict=True)
    assert np.std(values) == pytest.approx(np.mean(errors), rel=0.2)
    with pytest.raises(ValueError, match="39 samples are too few"):
        frechet_jackknife(real[:39], real)
