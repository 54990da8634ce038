"""Pixels and encoder features beside cached latents: they belong to the same images, flipped as these are."""

import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file, save_file

from sit_atconv.data.codecs import open_codec
from sit_atconv.data.latent_folder import _crc32, open_shard, read_index, verify
from sit_atconv.data.latents import CachedLatents
from sit_atconv.data.loading import BatchReader, ExtraReader
from sit_atconv.data.pixels import to_float
from sit_atconv.encoders.by_name import open_encoder
from tests.commands.conftest import draw
from tests.conftest import load_command, relative_error

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
    assert latents.features == {"encoder": "fashion", "weights": "default", "grid_size": [4, 4], "width": 80}
    for item in ITEMS:
        tokens = encoder(to_float(latents.read_pixels(item))[None])[0]
        torch.testing.assert_close(latents.read_features(item).float(), tokens, rtol=1e-3, atol=1e-3)
    for name in ("pixels", "features"):
        reader = ExtraReader(BatchReader(latents), name)
        batch = reader[ITEMS, True]
        read = latents.read_pixels if name == "pixels" else latents.read_features
        assert [*batch.extras] == [name] and torch.equal(batch.extras[name][3], read(ITEMS[3]))
        assert reader[ITEMS, False].extras == {}


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


@pytest.mark.parametrize("kind", [["--pixels", "uint8"], ["--pixels", "jpeg"], ["--features", "digits"]])
def test_a_shard_of_unreadable_images_alone_is_written(encode, argv, images, tmp_path, kind):
    for path in sorted(images.rglob("*.png"))[3:6]:
        path.write_bytes(b"no picture")
    encode(*argv, *kind, "--skip-unreadable")
    latents = CachedLatents(tmp_path / "out")
    assert [entry["num_images"] for entry in latents.index.shards] == [3, 0, 2] and verify(tmp_path / "out") == []
    if kind[0] == "--features":
        assert not torch.equal(latents.read_features((4, True)), latents.read_features((4, False)))
    else:
        assert torch.equal(latents.read_pixels((4, True)), latents.read_pixels((4, False)).flip(-1))


def test_an_extension_stores_them_too(encode, argv, images, tmp_path):
    kind = ["--pixels", "uint8", "--features", "digits"]
    encode(*argv, *kind)
    draw(images / "c" / "9.png", 9)
    encode(*argv, *kind, "--extend")
    latents = CachedLatents(tmp_path / "out")
    assert len(latents) == 9 and latents.read_pixels((8, False)).shape == (3, 32, 32) and verify(tmp_path / "out") == []
    with pytest.raises(SystemExit):
        encode(*argv, "--pixels", "uint8", "--extend")


# -------------------------------------------------------------------------------------------------------- training

ALIGNED = ["--auxiliary", "Alignment", "--auxiliary.encoder", "digits", "--auxiliary.projector", "conv"]


@pytest.fixture
def train(argv, vae, tmp_path, monkeypatch, capsys):
    """train(name, *options) -> stats of a run on the latents in `out`, with flipped images."""
    (tmp_path / "empty.yaml").write_text("{}")

    def run(name, *options):
        sizes = dict(hidden_size=16, depth=2, num_heads=2, learn_sigma="false")
        model = [word for key, value in sizes.items() for word in (f"--model.{key}", value)]
        data = ["--data.latents", tmp_path / "out", "--data.mirror", "true", "--data.codec", vae]
        steps = ["--train.steps", 4, "--train.log_every", 1, "--train.batch_size", 4, "--train.lr", 1e-2]
        previews = ["--preview.num_steps", 1, "--preview.num_classes", 1, "--preview.per_class", 1]
        words = ["--config", tmp_path / "empty.yaml", *model, *data, *steps, *previews, "--train.precision", "fp32"]
        load_command("sit_atconv/train.py").main([*map(str, [*words, *ALIGNED, *options, "--out", tmp_path / name])])
        return [json.loads(line) for line in (tmp_path / name / "stats.jsonl").open()]

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)
    PartialState._reset_state()
    AcceleratorState._reset_state()
    GradientState._reset_state()


def test_training_sees_the_same_targets_from_features_pixels_and_originals(encode, argv, images, tmp_path, train):
    encode(*argv, "--features", "digits")
    from_features = train("features")
    argv[argv.index(tmp_path / "out")] = tmp_path / "plain"
    encode(*argv)
    from_originals = train("originals", "--data.latents", tmp_path / "plain", "--data.pixels", images)
    argv[argv.index(tmp_path / "plain")] = tmp_path / "uint8"
    encode(*argv, "--pixels", "uint8")
    from_pixels = train("pixels", "--data.latents", tmp_path / "uint8")
    for one, two, three in zip(from_features, from_originals, from_pixels, strict=True):
        assert one["auxiliary/alignment"] == pytest.approx(two["auxiliary/alignment"], rel=1e-3)  # fp16
        assert two["auxiliary/alignment"] == three["auxiliary/alignment"] and two["grad_norm"] == three["grad_norm"]


def test_what_latents_lack_for_alignment_is_one_line(encode, argv, images, tmp_path, train, capsys):
    encode(*argv)

    def error(*options):
        with pytest.raises(SystemExit):
            train("run", *options)
        lines = capsys.readouterr().err.strip().splitlines()
        return lines[-1]

    assert "out holds neither pixels nor features: give the folder that was encoded as --data.pixels" in error()
    assert (
        "error: data.pixels: " in (gone := error("--data.pixels", tmp_path / "nowhere")) and "is not a folder" in gone
    )
    (images / "b" / "0.png").rename(images / "b" / "renamed.png")
    lost = error("--data.pixels", images)
    assert "error: data.pixels: " in lost and "lacks 1 of the 8 images" in lost
    for path in images.rglob("*.png"):  # other images of the same names
        draw(path, 100 + int(path.stem) if path.stem.isdigit() else 100)
    (images / "b" / "renamed.png").rename(images / "b" / "0.png")
    other = error("--data.pixels", images)
    assert "error: data.pixels: " in other and "b/0.png is not the image that" in other
