"""Whole evaluations, in this process."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity import register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from sit_atconv.data.digits import load_digits
from sit_atconv.evaluation import features
from sit_atconv.evaluation import metric_functions as metrics
from sit_atconv.evaluation.checks import is_lossy
from sit_atconv.evaluation.evaluate import EvaluateOptions, ReferenceOptions, evaluate, make_reference
from sit_atconv.evaluation.gaussians import fit_gaussian
from sit_atconv.evaluation.image_sets import ImageSet, evenly_spaced
from sit_atconv.evaluation.protocol import write_record
from sit_atconv.evaluation.records import difference, is_measured_alike, protocol_differences, read_evaluation
from sit_atconv.evaluation.references import save_reference
from tests.conftest import working_folder
from tests.pixel_features import Pixels

DIGITS = np.repeat(load_digits()[0][..., None], 3, axis=-1)[np.random.default_rng(0).permutation(1797)]


@pytest.fixture
def npz(tmp_path):
    """npz(images, name) writes a file and returns its path."""

    def write(images, name="x.npz", **arrays):
        np.savez(tmp_path / name, *([] if images is None else [images]), **arrays)
        return str(tmp_path / name)

    return write


@pytest.fixture
def options(tmp_path, npz):
    """Options that compare 300 digits with 400 others."""
    return EvaluateOptions(
        samples=npz(DIGITS[:300], "a.npz"),
        reference=npz(DIGITS[300:700], "b.npz"),
        extractor="digits",
        features=str(tmp_path / "features"),
    )


@pytest.fixture
def pixels():
    register_feature_extractor("pixels", Pixels)
    Pixels.seen = 0
    yield Pixels
    del FEATURE_EXTRACTORS_REGISTRY["pixels"]


def of_reference(options):
    return ReferenceOptions(reference=options.reference, extractor=options.extractor, features=options.features)


def values(evaluation):
    return {name: score.value for name, score in evaluation.scores.items()}


def test_scores_have_names_and_errors(options):
    found = evaluate(options)
    assert set(found.scores) == {"FD-digits-300", "score-digits", "precision-digits", "recall-digits", "KD-digits"}
    for name in ("FD-digits-300", "KD-digits"):
        assert found.scores[name].error > 0 and len(found.scores[name].without_group) == 20
    assert found.protocol["extractor"]["sha256"] and found.protocol["samples"]["num"] == 300
    assert found.protocol["reference"]["num"] == 400 and found.environment["versions"]["torch"] == torch.__version__
    assert write_record(found).name.startswith("a.scores-digits-")


def test_statistics_give_the_same_scores_as_their_images(options, tmp_path):
    direct = evaluate(options)
    recipe = make_reference(of_reference(options), tmp_path / "reference.npz")
    assert recipe["num"] == 400 and recipe["extractor"]["name"] == "digits"
    by_statistics = evaluate(replace(options, reference=str(tmp_path / "reference.npz")))
    for name, value in values(direct).items():
        assert values(by_statistics)[name] == pytest.approx(value, rel=1e-6), name
    assert by_statistics.protocol["reference"]["num"] == 400


def test_a_folder_and_an_npz_of_the_same_images_have_the_same_scores(options, tmp_path):
    for i, image in enumerate(DIGITS[:300]):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "a" / f"{i:04d}.png")
    folder = evaluate(replace(options, samples=str(tmp_path / "a")))
    assert folder.scores == evaluate(options).scores


def test_shards_give_the_same_scores_as_one_pass(options, pixels, monkeypatch):
    """Features read from disk give bitwise the same scores as extracted ones."""
    whole = evaluate(replace(options, extractor="pixels"))
    monkeypatch.setattr(features, "SHARD", 128)
    first = evaluate(replace(options, extractor="pixels"))
    seen = pixels.seen
    again = evaluate(replace(options, extractor="pixels"))
    assert again.scores == first.scores and pixels.seen == seen + 1  # the check of one image
    assert values(first) == pytest.approx(values(whole), rel=1e-9)


def test_large_references_are_compared_by_some_of_their_images(options, monkeypatch):
    for module in ("evaluate", "protocol"):
        monkeypatch.setattr(f"sit_atconv.evaluation.{module}.COMPARED", 300)
    found = evaluate(replace(options, metrics=["prc", "fid"]))
    assert found.protocol["compared"]["num"] == 300
    assert values(found)["recall-digits"] * 300 == pytest.approx(round(values(found)["recall-digits"] * 300), abs=1e-4)


def test_num_samples_evaluates_the_first_ones(options):
    found = evaluate(replace(options, num_samples=100, metrics=["fid"]))
    assert list(found.scores) == ["FD-digits-100"]


def test_other_samples_and_references_change_the_protocol(options, npz):
    base = evaluate(replace(options, metrics=["fid"]))
    fewer = evaluate(replace(options, metrics=["fid"], num_samples=200))
    assert set(protocol_differences(base, fewer)) == {"samples.num"}
    other = evaluate(replace(options, metrics=["fid"], reference=npz(DIGITS[300:699], "c.npz")))
    assert {"reference.num", "reference.content"} <= set(protocol_differences(base, other))
    assert difference(base, other, "FD-digits-300").error > 0


def test_other_metrics_do_not_change_the_protocol(options, tmp_path):
    make_reference(of_reference(options), tmp_path / "r.npz")
    options = replace(options, reference=str(tmp_path / "r.npz"))
    few, many = evaluate(replace(options, metrics=["fid"])), evaluate(options)
    assert "compared" not in few.protocol and "compared" in many.protocol and not protocol_differences(few, many)


def test_the_protocol_contains_the_manifest(options, tmp_path):
    folder = tmp_path / "samples"
    (folder / "images").mkdir(parents=True)
    np.savez(folder / "samples.npz", DIGITS[:300])
    settings = {
        "num_samples": 300,
        "seed": 7,
        "labels": "balanced",
        "solver": "heun",
        "cfg": 2.0,
        "steps": 12,
        "weights": "w",
        "uint8_rule": "truncated",
        "codec": {"kind": "identity"},
        "size": [8, 8],
    }
    manifest = {
        "complete": True,
        "settings": settings,
        "labels": [i % 10 for i in range(300)],
        "step": 400,
        "images_per_second": 9.0,
        "sessions": [{"device": "cpu", "processes": 2}],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = evaluate(replace(options, samples=str(folder), metrics=["fid"]))
    assert found.protocol["samples"] == {
        "num": 300,
        "image_size": [8, 8],
        "labels": "balanced",
        "uint8_rule": "truncated",
        "codec": {"kind": "identity"},
        "sampler": {"solver": "heun", "cfg": 2.0, "steps": 12},
    }
    assert found.subject["seed"] == 7 and found.subject["step"] == 400 and found.subject["processes"] == 2
    assert (
        found.scores["FD-digits-300"].error != evaluate(replace(options, metrics=["fid"])).scores["FD-digits-300"].error
    )  # its groups are balanced over the classes
    assert write_record(found).parent == folder
    listed = {"sampler": ["solver", "steps", "cfg", "absent"]}  # as in new manifests
    (folder / "manifest.json").write_text(json.dumps(manifest | listed))
    assert evaluate(replace(options, samples=str(folder), metrics=["fid"])).protocol == found.protocol
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sampler": ["seed"]}))
    of_others = evaluate(replace(options, samples=str(folder), metrics=["fid"])).protocol
    assert of_others["samples"]["sampler"] == {"seed": 7}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    of_npz = evaluate(replace(options, samples=str(folder / "samples.npz"), metrics=["fid"]))
    assert of_npz.protocol == found.protocol and write_record(of_npz) == write_record(found)


# --------------------------------------------------------------------------------------------- errors and warnings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": "none"}, "holds 0 images, too few"),
        ({"samples": "one"}, r"no metric compares .*: \S*/one\.npz holds 1 image, and fid needs at least 2"),
        ({"reference": "one"}, r"no metric compares .*: the reference \S*/one\.npz holds 1 image, and fid needs"),
        ({"reference": "none"}, r"no metric compares .*: the reference \S*/none\.npz holds 0 images, and fid needs"),
        ({"samples": "one", "reference": "none"}, r"holds 1 image and the reference \S* holds 0 images, and fid"),
        (
            {"samples": "three", "metrics": ["prc"]},
            r"prc of .* not possible: \S*/three\.npz holds 3 images, .* at least 4",
        ),
        ({"reference": "three", "metrics": ["prc"]}, r"prc of .* not possible: the reference \S*/three\.npz holds 3"),
        (
            {"samples": "one", "metrics": ["fid"]},
            "fid of .* is not possible: .* holds 1 image, and fid needs at least 2",
        ),
        ({"samples": "wide"}, "for 8x8 images, not 16x16"),
        ({"metrics": ["fvd"]}, "not 'fvd'"),
        ({"metrics": ["sfid"]}, "sfid of .* is not possible: extractor 'digits' has no spatial features"),
        ({"reference": "statistics", "metrics": ["prc"]}, "prc of .* is not possible: .* has no images"),
        ({"reference": "inception"}, "mu of .* has 2048 values, but extractor 'digits' gives 48"),
        ({"extractor": "clip9"}, r"no extractor 'clip9'.*digits.*inception"),
    ],
)
def test_impossible_evaluations_are_named(options, npz, change, message):
    made = {
        "none": lambda: npz(DIGITS[:0], "none.npz"),
        "one": lambda: npz(DIGITS[:1], "one.npz"),
        "three": lambda: npz(DIGITS[:3], "three.npz"),
        "wide": lambda: npz(np.zeros((9, 16, 16, 3), np.uint8)),
        "statistics": lambda: npz(None, mu=np.zeros(48), sigma=np.eye(48)),
        "inception": lambda: npz(None, mu=np.zeros(2048), sigma=np.eye(2048)),
    }
    for side in ("samples", "reference"):
        if change.get(side) in made:
            change = change | {side: made[change[side]]()}
    with pytest.raises(ValueError, match=message):
        evaluate(replace(options, **change))


def test_a_reference_made_with_other_weights_is_refused(options, tmp_path, npz):
    recipe = json.dumps({"extractor": {"name": "digits", "sha256": "0000"}})
    np.savez(tmp_path / "r.npz", mu=np.zeros(48), sigma=np.eye(48), recipe=np.array(recipe))
    with pytest.raises(ValueError, match=r"made with an extractor of sha256 '0000', and this one has '9c94"):
        evaluate(replace(options, reference=str(tmp_path / "r.npz")))


def test_a_reference_fitted_to_too_few_images_gives_a_warning(options, npz, tmp_path):
    """This holds for images and for statistics."""
    options = replace(options, reference=npz(DIGITS[300:340], "few.npz"), metrics=["fid"])
    make_reference(of_reference(options), tmp_path / "r.npz")
    for reference in (options.reference, str(tmp_path / "r.npz")):
        (warning,) = evaluate(replace(options, reference=reference)).warnings
        assert warning.startswith(f"{reference} is fitted to 40 images, no more than the 48 features")


def test_metrics_left_out_are_reported(options, tmp_path, capsys):
    np.savez(tmp_path / "r.npz", mu=np.zeros(48), sigma=np.eye(48))
    found = evaluate(replace(options, reference=str(tmp_path / "r.npz")))
    assert set(found.scores) == {"FD-digits-300", "score-digits"}
    said = capsys.readouterr().err
    assert "left out: prc, since" in said and "left out: kid, since" in said and "left out: sfid, since" in said


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ("few", "holds 20 images, no more than the 48 features"),
        ("few", "20 samples are too few for a standard error"),
        ("equal", "all 60 images of .* are equal"),
        ("copies", "20 of the 60 images of .* are copies of others"),
        ("large", "the samples are 16x16 and the reference's images 8x8"),
        ("compressed", r"x\.npz is compressed.* every process reads all of it into memory \(0\.0 MB\)"),
        (".jpg", "samples are .jpg files, whose compression changes every score"),
    ],
)
def test_suspicious_samples_give_a_warning_that_is_recorded(options, npz, pixels, samples, message, capsys, tmp_path):
    images = {
        ".jpg": DIGITS[:60],
        "compressed": DIGITS[:60],
        "few": DIGITS[:20],
        "equal": DIGITS[:1].repeat(60, 0),
        "copies": np.concatenate([DIGITS[:40], DIGITS[:20]]),
        "large": DIGITS[:60].repeat(2, 1).repeat(2, 2),
    }[samples]
    extractor = "pixels" if samples == "large" else "digits"
    if samples.startswith("."):
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / f"{i:03d}{samples}")
    source = str(tmp_path) if samples.startswith(".") else npz(images)
    if samples == "compressed":
        np.savez_compressed(source, images)
    found = evaluate(replace(options, samples=source, metrics=["fid"], extractor=extractor))
    assert any(re.search(message, warning) for warning in found.warnings)
    assert re.search(message, capsys.readouterr().err)


def test_lossy_formats():
    lossy = {suffix for suffix in Image.registered_extensions() if is_lossy(suffix)}
    assert {".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".gif", ".jp2"} <= lossy
    assert not lossy & {".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".tga"} and not is_lossy(".npy")


def test_good_samples_give_no_warning(options, capsys):
    found = evaluate(options)
    assert found.warnings == [] and "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "is_warned_of"),
    [
        (np.arange(300) // 30, True),
        (9 - np.arange(300) // 30, True),  # in any order of the classes
        (np.array([0, 1, 10, 2])[np.arange(300) // 75], True),  # numbered folders in the order of their names
        (np.arange(300) % 150 // 15, True),  # two processes wrote sorted samples
        (np.arange(300) % 10, False),
        (np.zeros(300, int), False),
        (np.random.RandomState(0).randint(0, 99, 300), False),
        (np.arange(300), False),  # few or one of each class
    ],
)
def test_samples_sorted_by_label_give_a_warning(options, npz, pixels, monkeypatch, labels, is_warned_of):
    monkeypatch.setattr("sit_atconv.evaluation.metric_functions.IS_SPLIT", 100)
    found = evaluate(replace(options, samples=npz(DIGITS[:300], arr_1=labels), metrics=["is"])).warnings
    assert ["order of their labels" in warning for warning in found] == [True] * is_warned_of


def test_the_first_of_sorted_samples_have_few_classes(options, npz):
    """FID would cover only these classes, too."""
    of_sorted = npz(DIGITS[:300], arr_1=np.arange(300) // 30)
    found = evaluate(replace(options, samples=of_sorted, metrics=["is"], num_samples=100)).warnings
    assert "the first 100 of 300 have few classes" in found[0] and len(found) == 1
    of_mixed = npz(DIGITS[:300], arr_1=np.arange(300) % 10)
    assert evaluate(replace(options, samples=of_mixed, metrics=["is"], num_samples=100)).warnings == []


@pytest.fixture
def class_folders(tmp_path):
    """Folder with 300 digits in ten subfolders 0 ... 9, and their labels."""
    labels = np.arange(300) // 30
    for i, label in enumerate(labels):
        (tmp_path / "classes" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(DIGITS[i]).save(tmp_path / "classes" / str(label) / f"{i:03d}.png")
    return tmp_path / "classes", labels


def test_class_folders_give_labels(options, npz, class_folders, monkeypatch):
    """The evaluation equals that of an .npz with the labels in arr_1."""
    folder, labels = class_folders
    metrics = ["fid", "is"]
    of_array = evaluate(replace(options, samples=npz(DIGITS[:300], arr_1=labels), metrics=metrics))
    of_folder = evaluate(replace(options, samples=str(folder), metrics=metrics))
    assert of_folder.scores == of_array.scores and not protocol_differences(of_folder, of_array)
    assert of_folder.protocol["samples"]["labels"] == "balanced" and of_folder.warnings == []
    monkeypatch.setattr("sit_atconv.evaluation.metric_functions.IS_SPLIT", 100)
    assert "class folders" in evaluate(replace(options, samples=str(folder), metrics=metrics)).warnings[0]


def test_an_old_record_without_labels_of_class_folders_is_still_compared(options, class_folders):
    now = evaluate(replace(options, samples=str(class_folders[0]), metrics=["fid"]))
    before = replace(now, protocol={**now.protocol, "samples": {**now.protocol["samples"], "labels": None}})
    assert protocol_differences(before, now) == {"samples.labels": (None, "balanced")}
    assert difference(now, before, "FD-digits-300").value == 0
    assert is_measured_alike(now, before, "FD-digits-300")


# ------------------------------------------------------------------------------ which features go into which score


@pytest.fixture
def three_outputs(monkeypatch):
    """Makes an extractor with all outputs of Inception, each different; returns its features of digits."""
    from sit_atconv.evaluation.extractors import Extractor

    def network(x):
        pixels = x[:, 0].float() / 255
        return pixels[:, 2:5, 1:4].flatten(1), pixels[:, 1:3].flatten(1)[:, :8] * 9, pixels[:, 5:7, 2:6].flatten(1) ** 2

    extractor = Extractor("inception", network, "abc", ("features", "logits", "spatial"), "none")
    monkeypatch.setattr("sit_atconv.evaluation.evaluate.open_extractor", lambda *args: extractor)
    return lambda images: extractor(torch.from_numpy(images).permute(0, 3, 1, 2))


def test_each_score_uses_its_own_features(options, three_outputs, monkeypatch):
    monkeypatch.setattr(features, "SHARD", 128)
    ours, real = three_outputs(DIGITS[:300]), three_outputs(DIGITS[300:700])
    found = values(evaluate(options))
    precision, recall = metrics.precision_recall(ours["features"], real["features"])
    assert precision.value != recall.value
    assert found == pytest.approx(
        {
            "FID-300": metrics.frechet(ours["features"], fit_gaussian(real["features"])).value,
            "sFID-300": metrics.frechet(ours["spatial"], fit_gaussian(real["spatial"])).value,
            "IS": metrics.inception_score(ours["logits"]).value,
            "precision": precision.value,
            "recall": recall.value,
            "KID": metrics.kid(ours["features"], real["features"]).value,
        },
        rel=1e-6,
    )


def test_statistics_are_preferred_to_images(options, three_outputs, tmp_path):
    """As in ADM's file, which contains only a fifth of the images behind its statistics."""
    ours, real = three_outputs(DIGITS[:300]), three_outputs(DIGITS[300:])
    fitted = {"features": fit_gaussian(real["features"]), "spatial": fit_gaussian(real["spatial"])}
    save_reference(tmp_path / "r.npz", fitted, ImageSet("x", DIGITS[300:700]), {})
    found = values(evaluate(replace(options, reference=str(tmp_path / "r.npz"))))
    assert found["FID-300"] == pytest.approx(metrics.frechet(ours["features"], fitted["features"]).value, rel=1e-6)
    assert found["sFID-300"] == pytest.approx(metrics.frechet(ours["spatial"], fitted["spatial"]).value, rel=1e-6)
    compared = three_outputs(DIGITS[300:700])["features"]
    assert found["recall"] == metrics.precision_recall(ours["features"], compared)[1].value


def test_compared_images_are_evenly_spaced(options, three_outputs, monkeypatch):
    monkeypatch.setattr(features, "SHARD", 128)
    monkeypatch.setattr("sit_atconv.evaluation.evaluate.COMPARED", 57)
    real = three_outputs(DIGITS[300:700])["features"][evenly_spaced(400, 57)]
    found = values(evaluate(replace(options, metrics=["prc"])))
    assert found["recall"] == metrics.precision_recall(three_outputs(DIGITS[:300])["features"], real)[1].value


def test_the_inception_score_needs_no_reference(options, pixels):
    evaluate(replace(options, extractor="pixels", metrics=["is"]))
    assert pixels.seen == 300 + 1  # and the check of one image


# ------------------------------------------------------------------------------------------------------- the record


@pytest.mark.parametrize("kind", ["images", "statistics"])
def test_a_second_call_with_other_metrics_adds_to_the_record(options, tmp_path, kind):
    if kind == "statistics":
        make_reference(of_reference(options), tmp_path / "r.npz")
        options = replace(options, reference=str(tmp_path / "r.npz"))
    whole = evaluate(options)
    path = write_record(whole)
    assert write_record(evaluate(replace(options, metrics=["fid"]))) == path
    assert read_evaluation(path).scores == whole.scores and read_evaluation(path).protocol == whole.protocol
    path.write_text("damaged")
    assert write_record(whole) == path and read_evaluation(path).scores == whole.scores
    assert write_record(evaluate(replace(options, num_samples=200))) != path


def test_a_record_holds_absolute_paths(options, tmp_path):
    with working_folder(tmp_path):
        found = evaluate(replace(options, samples="a.npz", reference="b.npz", metrics=["is"]))
        assert write_record(found).is_relative_to(tmp_path)
    assert (found.subject["path"], found.subject["reference"]) == (str(tmp_path / "a.npz"), str(tmp_path / "b.npz"))
    assert evaluate(replace(options, reference="digits", metrics=["is"])).subject["reference"] == "digits"


def test_random_labels_are_not_balanced_even_if_equally_frequent(options, tmp_path):
    folder = tmp_path / "samples"
    (folder / "images").mkdir(parents=True)
    np.savez(folder / "samples.npz", DIGITS[:300])
    errors = []
    for labels in ("balanced", "random"):
        manifest = {
            "complete": True,
            "settings": {"num_samples": 300, "labels": labels},
            "labels": [i % 10 for i in range(300)],
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        found = evaluate(replace(options, samples=str(folder), metrics=["fid"]))
        errors.append(found.scores["FD-digits-300"].error)
    assert errors[0] != errors[1] == evaluate(replace(options, metrics=["fid"])).scores["FD-digits-300"].error
