import numpy as np
import PIL
import pytest
import torch

from sit_atconv.data.digits import load_digits
from sit_atconv.evaluation import features as features_module
from sit_atconv.evaluation.extractors import Extractor, open_extractor
from sit_atconv.evaluation.features import ExtractedFeatures, FeatureShards, extract_features
from sit_atconv.evaluation.image_sets import ImageSet
from sit_atconv.runtime.files import PARTIAL

DIGITS = np.repeat(load_digits()[0][:100, ..., None], 3, axis=-1)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(features_module, "SHARD", 40)


class Watched:
    """Extractor of the digits that counts the images it has seen."""

    def __init__(self, **changes):
        self.seen = 0
        self.inner = open_extractor("digits")
        fields = {"name": "digits", "sha256": "abc", "outputs": ("features", "logits"), "resize": "none"} | changes
        self.extractor = Extractor(network=self.network, **fields)

    def network(self, images):
        self.seen += len(images)
        return self.inner.network(images)


def shards(folder, watched, images=DIGITS, batch_size=16):
    return FeatureShards(folder, watched.extractor, ImageSet("digits", images), batch_size, "cpu")


def make_all(some_shards):
    contents = [some_shards.make(number) for number in range(len(some_shards))]
    return ExtractedFeatures(some_shards, contents).load("features")


def test_shards_hold_the_features_of_one_pass(tmp_path):
    watched = Watched()
    made = make_all(shards(tmp_path, watched))
    direct = extract_features(watched.extractor, ImageSet("digits", DIGITS), 16)["features"]
    assert len(shards(tmp_path, watched)) == 3 and made.shape == (100, 48)
    torch.testing.assert_close(made, direct, rtol=1e-5, atol=1e-5)


def test_existing_shards_are_not_extracted_again(tmp_path):
    first, second = Watched(), Watched()
    made = make_all(shards(tmp_path, first))
    assert first.seen == 100
    assert torch.equal(make_all(shards(tmp_path, second)), made) and second.seen == 0


@pytest.mark.parametrize(
    "change", ["pixel", "order", "count", "weights", "name", "resize", "batch size", "version", "device"]
)
def test_changed_settings_or_images_are_extracted_again(tmp_path, change, monkeypatch):
    """Changes an image of the first shard, or something else that features depend on."""
    make_all(shards(tmp_path, Watched()))
    images, batch_size = DIGITS.copy(), 16
    described = {"weights": {"sha256": "abd"}, "name": {"name": "x"}, "resize": {"resize": "x"}}
    watched = Watched(**described.get(change, {}))
    if change == "pixel":
        images[39, 7, 7, 2] ^= 1
    if change == "order":
        images[[3, 4]] = images[[4, 3]]
    if change == "count":
        images = images[:39]
    if change == "batch size":
        batch_size = 20
    if change == "version":
        monkeypatch.setattr(PIL, "__version__", "9.9")
    changed = shards(tmp_path, watched, images, batch_size)
    if change == "device":
        changed = FeatureShards(tmp_path, watched.extractor, changed.images, 16, "meta")
        changed.device = torch.device("cpu")
    changed.make(0)
    assert watched.seen == min(40, len(images))


def test_shards_of_a_longer_set_are_shared(tmp_path):
    make_all(shards(tmp_path, Watched(), DIGITS[:80]))
    watched = Watched()
    make_all(shards(tmp_path, watched))
    assert watched.seen == 20


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(p.read_bytes()[:-9]), lambda p: p.write_bytes(b"")])
def test_a_damaged_shard_is_made_again(tmp_path, damage):
    first, second = Watched(), Watched()
    made = make_all(shards(tmp_path, first))
    damage(sorted(tmp_path.glob("*.safetensors"))[0])
    assert torch.equal(make_all(shards(tmp_path, second)), made) and second.seen in (20, 40)


def test_a_missing_shard_is_named(tmp_path):
    made = shards(tmp_path, Watched())
    content = made.make(0)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="give --features a folder that all processes see"):
        made.load("features", content)


def test_only_old_partial_files_are_deleted(tmp_path):
    import os

    old, new = tmp_path / f"{PARTIAL}old", tmp_path / f"{PARTIAL}new"  # `new` may belong to a running process
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    shards(tmp_path, Watched()).make_ready()
    assert not old.exists() and new.exists()


def test_features_that_are_not_finite_are_named():
    def network(images):
        values = images[:, 0, 2:4, 3].float()
        values[images[:, 0, 2, 3] == images[:, 0, 2, 3].max()] = float("nan")
        return values, values

    with pytest.raises(ValueError, match=r"gives features of image \d+ of digits that are not finite"):
        extract_features(Extractor("x", network, None, ("features", "logits"), "none"), ImageSet("digits", DIGITS))


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file cannot be written to \(File exists\): give another --features"):
        shards(tmp_path / "file", Watched()).make_ready()
