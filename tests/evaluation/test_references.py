import json

import numpy as np
import pytest

from sit_atconv.data.digits import load_digits
from sit_atconv.evaluation.gaussians import Gaussian
from sit_atconv.evaluation.image_sets import ImageSet
from sit_atconv.evaluation.references import open_reference, save_reference

DIGITS = np.repeat(load_digits()[0][:50, ..., None], 3, axis=-1)
EYE = {"mu": np.zeros(5), "sigma": np.eye(5)}


def test_a_written_reference_is_read_by_adm_and_by_us(tmp_path):
    gaussians = {"features": Gaussian(np.arange(3.0), np.eye(3)), "spatial": Gaussian(np.arange(2.0), np.eye(2))}
    save_reference(tmp_path / "x.npz", gaussians, ImageSet("digits", DIGITS), {"num": 50})
    with np.load(tmp_path / "x.npz") as file:  # as ADM's evaluator does
        assert {"mu", "sigma", "mu_s", "sigma_s", "arr_0"} <= set(file.files)
        assert np.array_equal(file["arr_0"], DIGITS) and np.array_equal(file["mu_s"], np.arange(2.0))
    reference = open_reference(str(tmp_path / "x.npz"))
    assert reference.recipe == {"num": 50, "images_kept": 50} and len(reference.images) == 50
    for name, gaussian in gaussians.items():
        assert np.array_equal(reference.gaussians[name].sigma, gaussian.sigma)


def test_kept_images_are_evenly_spaced(tmp_path, monkeypatch):
    monkeypatch.setattr("sit_atconv.evaluation.references.COMPARED", 5)
    save_reference(tmp_path / "x.npz", {}, ImageSet("digits", DIGITS), {})
    with np.load(tmp_path / "x.npz") as file:
        assert np.array_equal(file["arr_0"], DIGITS[[0, 12, 24, 36, 49]])


def test_statistics_from_other_tools(tmp_path):
    """They are in single precision, without images or sFID, and have an additional array."""
    np.savez(tmp_path / "x.npz", mu=np.zeros(5, np.float32), sigma=np.eye(5, dtype=np.float32), more=np.zeros(2))
    reference = open_reference(str(tmp_path / "x.npz"))
    assert reference.images is None and list(reference.gaussians) == ["features"] and reference.recipe == {}
    assert reference.gaussians["features"].sigma.dtype == np.float64
    other = dict(EYE, mu=np.ones(5))
    np.savez(tmp_path / "y.npz", **other)
    np.savez(tmp_path / "z.npz", **EYE | {"sigma": 2 * np.eye(5)})
    contents = [open_reference(str(tmp_path / f"{name}.npz")).content() for name in "xyz"]
    assert len(set(contents)) == 3


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(5)}, "no sigma"),
        ({"labels": np.zeros(5)}, r"contains \['labels'\]: give a file with mu and sigma, or images as arr_0"),
        (EYE | {"sigma": np.eye(4)}, r"\(5,\) and \(4, 4\), not \(D,\) and \(D, D\)"),
        (EYE | {"mu": np.full(5, np.nan)}, "are not finite"),
        (EYE | {"mu": np.zeros(5, complex)}, "complex128 and float64, not floating point"),
        (EYE | {"mu": np.array(list("abcde"))}, "not floating point"),
        (EYE | {"sigma": -np.eye(5)}, "no negative eigenvalues"),
        (EYE | {"sigma": np.triu(np.ones((5, 5))) + np.eye(5)}, "which is symmetric"),
        (EYE | {"sigma": 1e200 * np.eye(5)}, "above 1e12"),
        (EYE | {"mu": np.full(5, 1e200)}, "above 1e12"),
        (EYE | {"mu_s": np.zeros(3)}, "no sigma_s"),
        (EYE | {"arr_0": np.zeros((4, 8, 8, 3))}, "float64"),
    ],
)
def test_impossible_references_are_named(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        open_reference(str(tmp_path / "x.npz"))


def test_statistics_are_not_cropped(tmp_path):
    np.savez(tmp_path / "x.npz", **EYE)
    with pytest.raises(ValueError, match="--image-size crops the images of a folder"):
        open_reference(str(tmp_path / "x.npz"), crop_to=8)


def test_an_invalid_recipe_is_named(tmp_path):
    for recipe in ("{", "null", "[]", '{"extractor": "x"}', '{"extractor": 3}', '{"num": "many"}'):
        np.savez(tmp_path / "x.npz", **EYE, recipe=np.array(recipe))
        with pytest.raises(ValueError, match=r"recipe of .*x\.npz is not one that --make-reference writes"):
            open_reference(str(tmp_path / "x.npz"))
    np.savez(tmp_path / "x.npz", **EYE, recipe=np.array(json.dumps({"num": 3})))
    assert open_reference(str(tmp_path / "x.npz")).recipe == {"num": 3}
