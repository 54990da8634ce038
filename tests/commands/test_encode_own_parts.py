"""A codec and a data source from a user's own module, used by the commands."""

import json
import sys

import pytest

from sit_atconv.checkpoints.weights import load_weights
from sit_atconv.data.codecs import open_codec
from sit_atconv.data.latent_folder import read_index
from tests.conftest import TINY_RUN, encode_argv, load_command

MODULE = """
import numpy as np
import torch
from torch.nn.functional import avg_pool2d, interpolate

from sit_atconv.data.codecs import Codec
from sit_atconv.data.sources import DataSource


class Halved(Codec):
    "Averages of two by two pixels; beside them their negatives are stored."

    channels, downsample = 3, 2

    def encode(self, images):
        return torch.cat([avg_pool2d(images, 2), -avg_pool2d(images, 2)], 1)

    def stored_shape(self, image_size):
        side = self.latent_size(image_size)
        return 6, side, side

    def latents(self, stored, generator=None, noise=None):
        return stored.float()[:, :3]

    def decode(self, z):
        return interpolate(z, scale_factor=2)


class Misnamed(Halved):
    def describe(self):
        return super().describe() | {"kind": "my_parts.Halved"}


class Stripes(DataSource):
    class_names = ("across", "down")
    image_size = 16
    labels = np.arange(24) % 2

    def __len__(self):
        return 24

    def __getitem__(self, item):
        index, mirrored = item
        if index == 3:
            raise ValueError("image 3 cannot be read: it is not there")
        image = torch.zeros(3, 16, 16, dtype=torch.uint8)
        image[:, ::2] = index
        return (image.mT if self.labels[index] else image), int(self.labels[index])


class Nothing:
    pass
"""
RUN = [*TINY_RUN, "--model.depth", 1, "--train.steps", 2, "--train.batch_size", 8]


@pytest.fixture
def my_parts(tmp_path, monkeypatch):
    (tmp_path / "my_parts.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_parts", None)


def test_a_codec_encodes_trains_and_samples(my_parts, encode, images, launch, tmp_path):
    said = encode(*encode_argv(images, "my_parts.Halved", tmp_path / "out"))
    assert "--data.codec my_parts.Halved" in said
    index = read_index(tmp_path / "out")
    assert index.settings.codec == {"kind": "my_parts.Halved", "channels": 3, "downsample": 2}
    assert index.settings.moments_shape == [6, 16, 16] and index.vae == "my_parts.Halved"
    run = tmp_path / "run"
    codes, output = launch(
        "sit_atconv/train.py",
        [*RUN, "--data.latents", tmp_path / "out", "--data.codec", "my_parts.Halved", "--out", run],
    )
    assert codes == [0], output
    assert json.loads((run / "data.json").read_text())["codec"] == index.settings.codec
    recipe = load_weights(str(run)).recipe
    assert open_codec(recipe.codec).describe() == recipe.codec == index.settings.codec
    assert load_weights(str(run), vae="my_parts.Halved").recipe == recipe
    with pytest.raises(ValueError, match=r"trained with another codec than identity \(kind my_parts\.Halved ->"):
        load_weights(str(run), vae="identity")
    load_command("sample/generate.py").main(
        ["--ckpt", str(run), "--num-samples", "2", "--steps", "1", "--out", str(tmp_path / "samples")]
    )
    manifest = json.loads((tmp_path / "samples" / "manifest.json").read_text())
    assert manifest["complete"] and manifest["settings"]["size"] == [32, 32]
    del sys.modules["my_parts"]
    with pytest.raises(ValueError, match=r"codec my_parts\.Halved is not known here: give --import my_parts"):
        open_codec(recipe.codec)


def test_a_data_source_trains(my_parts, launch, fails, tmp_path):
    argv = [*RUN, "--data.images", "my_parts.Stripes", "--data.skip_unreadable", "true", "--out", tmp_path / "run"]
    codes, output = launch("sit_atconv/train.py", [*argv, "--data.codec", "my_parts.Halved"])
    assert codes == [0], output
    described = json.loads((tmp_path / "run" / "data.json").read_text())
    assert described == {
        "kind": "my_parts.Stripes",
        "images": 24,
        "classes": 2,
        "codec": {"kind": "my_parts.Halved", "channels": 3, "downsample": 2},
    }
    assert "cannot be read: it is not there" in (tmp_path / "run" / "unreadable.json").read_text()
    train = load_command("sit_atconv/train.py").main
    assert "codec.kind my_parts.Halved -> identity" in fails(train, argv)


def test_other_classes_are_refused_as_codec_or_source(my_parts, fails, images, tmp_path):
    train = load_command("sit_atconv/train.py").main
    assert "data.codec: codec my_parts.Nothing does not inherit sit_atconv.data.codecs.Codec" in fails(
        train, [*RUN, "--data.codec", "my_parts.Nothing"]
    )
    assert "data.codec: training begins with another codec than my_parts.Halved (kind my_parts.Misnamed -> my" in fails(
        train, [*RUN, "--data.codec", "my_parts.Misnamed"]
    )
    assert "data.images: my_parts.Nothing does not inherit sit_atconv.data.sources.DataSource" in fails(
        train, [*RUN, "--data.images", "my_parts.Nothing"]
    )
    assert "data.images: the module nowhere cannot be imported" in fails(train, [*RUN, "--data.images", "nowhere.X"])
    assert "encoding begins with another codec than my_parts.Halved" in fails(
        load_command("sit_atconv/encode.py").main, encode_argv(images, "my_parts.Misnamed", tmp_path / "out")
    )
