"""Pixels and encoder features beside cached latents: they belong to the same images, flipped as these are."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sit_atconv.data.codecs import open_codec
from sit_atconv.data.latent_folder import _crc32, open_shard, read_index, verify
from sit_atconv.data.latents import CachedLatents
from sit_atconv.data.loading import BatchReader
from sit_atconv.data.pixels import to_float
from sit_atconv.encoders.by_name import open_encoder
from tests.conftest import relative_error

ITEMS = [(i, mirrored) for i in range(8) for mirrored in (False, True)]


def assert_pixels_are_those_of_the_latents(latents: CachedLatents, tolerance: float):
    """Encodes the pixels again: a wrong image, or one that is not flipped as its latents, differs by far more."""
    codec = open_codec(latents.codec, "tested")
    for item in ITEMS:
        pixels = latents.read_pixels(item)
        assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8
        moments = codec.encode(to_float(pixels)[None])[0]
        other = codec.encode(to_float(pixels.flip(-1))[None])[0]
        assert relative_error(latents[item][0], moments) < tolerance < 0.3 * relative_error(latents[item][0], other)


@pytest.mark.parametrize(("how", "tolerance"), [("uint8", 1e-4), ("jpeg", 0.1), ("originals", 1e-4)])
def test_pixels_are_those_of_the_latents(encode, argv, images, tmp_path, how, tolerance):
    printed = encode(*argv, *([] if how == "originals" else ["--pixels", how]))
    assert ("with their pixels" in printed) == (how != "originals") and verify(tmp_path / "out") == []
    latents = CachedLatents(tmp_path / "out")
    assert latents.has_pixels == (how != "originals")
    if how == "originals":
        latents.read_originals(images)
    assert_pixels_are_those_of_the_latents(latents, tolerance)


def test_features_are_those_of_the_encoder_and_of_the_flipped_image(encode, argv, tmp_path):
    printed = encode(*argv, "--pixels", "uint8", "--features", "fashion", "--features-grid", 4)
    assert "with features of fashion: 4x4 tokens of width 80" in printed and verify(tmp_path / "out") == []
    latents, encoder = CachedLatents(tmp_path / "out"), open_encoder("fashion", None, (4, 4))
    assert latents.features == {"encoder": "fashion", "sha256": encoder.sha256(), "grid_size": [4, 4], "width": 80}
    for item in ITEMS:
        tokens = encoder(to_float(latents.read_pixels(item))[None])[0]
        torch.testing.assert_close(latents.read_features(item).float(), tokens, rtol=1e-3, atol=1e-3)
    for name in ("pixels", "features"):
        batch = BatchReader(latents, beside=name)[ITEMS]
        read = latents.read_pixels if name == "pixels" else latents.read_features
        assert [*batch.beside] == [name] and torch.equal(batch.beside[name][3], read(ITEMS[3]))
    assert BatchReader(latents)[ITEMS].beside == {}


def test_latents_without_them_keep_their_bytes_and_older_versions_refuse_the_others(encode, argv, tmp_path):
    encode(*argv)
    plain = json.loads((tmp_path / "out" / "index.json").read_text())
    assert plain["format"] == 2 and not {"pixels", "features"} & plain["settings"].keys()
    argv[argv.index(tmp_path / "out")] = tmp_path / "with"
    encode(*argv, "--pixels", "jpeg", "--features", "digits")
    index = json.loads((tmp_path / "with" / "index.json").read_text())
    assert index["format"] == 3 and read_index(tmp_path / "with").settings.pixels == "jpeg"
    for one in sorted((tmp_path / "out").glob("shard*")):
        two = tmp_path / "with" / one.name
        plain, more = load_file(one), load_file(two)
        assert all(torch.equal(tensor, more[name]) for name, tensor in plain.items())
        assert more.keys() - plain.keys() == {"jpegs", "jpeg_ends", "features", "mirrored_features"}


@pytest.mark.parametrize("what", ["uint8", "jpeg", "features"])
def test_shards_that_lack_them_are_faults(encode, argv, tmp_path, what):
    encode(*argv, *(["--features", "digits"] if what == "features" else ["--pixels", what]))
    shard = tmp_path / "out" / "shard-00000.safetensors"
    tensors, opened = load_file(shard), open_shard(shard)
    del tensors[{"uint8": "pixels", "jpeg": "jpegs", "features": "mirrored_features"}[what]]
    content = {"settings": opened.settings, "names": opened.names, "skipped": {}}
    save_file(tensors, shard, {"latents": json.dumps({"content": content, "crc32": _crc32(tensors, content)})})
    assert any("must hold" in fault for fault in verify(tmp_path / "out"))


def test_a_folder_that_lost_images_is_one_line(encode, argv, images, tmp_path):
    encode(*argv)
    (images / "b" / "0.png").unlink()
    shutil.rmtree(images / "c")
    with pytest.raises(ValueError, match=r"lacks 5 of the 8 images of .*b/0\.png.* give the folder that was") as error:
        CachedLatents(tmp_path / "out").read_originals(images)
    assert "\n" not in str(error.value)


def test_options_of_features_without_an_encoder_are_one_line(encode, argv, capsys):
    with pytest.raises(SystemExit):
        encode(*argv, "--features-grid", 4)
    assert "--features-grid are for --features: give it too" in capsys.readouterr().err
