"""Choices of the encoding command: empty classes, unreadable and large images, rules of older latents."""

import dataclasses
import json

import pytest

from sit_atconv.data import encoding
from sit_atconv.data.codecs import VAECodec
from sit_atconv.data.image_rules import RULES
from sit_atconv.data.images import ImageFolder
from sit_atconv.data.latent_folder import LatentFolder, open_shard, read_index, write_index
from sit_atconv.data.latents import CachedLatents
from tests.conftest import load_command, working_folder

ENCODE = "sit_atconv/encode.py"


def error_of(argv, capsys) -> str:
    with pytest.raises(SystemExit):
        load_command(ENCODE).main([*map(str, argv), "--num-workers", "0"])
    return capsys.readouterr().err


def test_a_class_of_unreadable_images_is_refused_unless_kept(encode, argv, images, tmp_path, capsys):
    out = tmp_path / "out"
    for path in (images / "c").iterdir():
        path.write_bytes(b"no picture")
    error = error_of([*argv, "--skip-unreadable"], capsys)
    assert "1 class without images: 1 ('c'): fix or add images" in error and "or give --keep-empty-classes" in error
    assert not (out / "index.json").exists()
    assert "'b' 4, 'c' 0" in encode(*argv, "--skip-unreadable", "--keep-empty-classes")
    assert read_index(out).keep_empty_classes and CachedLatents(out).class_counts == [4, 0]
    load_command(ENCODE).main(["--verify", str(out)])
    assert "is complete: 4 images of 2 classes" in encode(*argv, "--skip-unreadable")
    older = dataclasses.replace(read_index(out), keep_empty_classes=False)
    write_index(out, older)
    assert "1 class without images: 1 ('c')" in error_of([*argv, "--skip-unreadable"], capsys)
    assert read_index(out) == older
    encode(*argv, "--skip-unreadable", "--keep-empty-classes")
    assert read_index(out).keep_empty_classes


def test_the_index_records_kept_classes_only_if_there_are_empty_ones(encode, argv, tmp_path):
    encode(*argv, "--keep-empty-classes")
    assert "keep_empty_classes" not in json.loads((tmp_path / "out" / "index.json").read_text())


def test_any_error_while_reading_a_file_names_the_file(encode, argv, images, monkeypatch, capsys):
    read = ImageFolder.read_with_size

    def fail(self, index):
        if self.name(index) == "c/3.png":
            raise MemoryError
        return read(self, index)

    monkeypatch.setattr(ImageFolder, "read_with_size", fail)
    error = error_of(argv, capsys)
    assert "1 images cannot be read: " in error
    assert f"{images / 'c' / '3.png'} cannot be read as an image: MemoryError" in error


def test_enlarged_images_are_counted(encode, argv, images, tmp_path):
    from PIL import Image

    Image.new("RGB", (80, 20)).save(images / "b" / "wide.png")
    assert "1 of 9 images are smaller than 32 px and were enlarged" in encode(*argv)
    assert read_index(tmp_path / "out").enlarged == 1
    assert [open_shard(path).enlarged for path in sorted((tmp_path / "out").glob("shard*"))] == [0, 1, 0]


@pytest.fixture
def opened(monkeypatch):
    """The options with which the images were opened, call by call."""
    calls = []

    def open_images(*args, **kwargs):
        calls.append(kwargs)
        return ImageFolder(*args, **kwargs)

    monkeypatch.setattr(encoding, "ImageFolder", open_images)
    return calls


def test_image_options_reach_the_image_folder(encode, argv, opened, tmp_path):
    encode(*argv, "--max-megapixels", 500, "--keep-empty-classes")
    encode(*argv)
    assert opened[0] == {"rules": RULES, "max_megapixels": 500, "keep_empty_classes": True}
    assert opened[1]["max_megapixels"] == 179 and not opened[1]["keep_empty_classes"]
    content = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert b"megapixels" not in content


def test_latents_keep_the_rules_that_they_were_started_with(encode, argv, images, opened, tmp_path):
    """This holds when they are completed and when they are extended."""
    (images / "b").rename(images / "10")
    (images / "c").rename(images / "2")
    out = tmp_path / "out"
    encode(*argv)
    index = read_index(out)
    assert index.settings.rules == RULES
    (out / "index.json").unlink()
    files = ImageFolder(images, 32, rules=1).files_sha256()
    folder = LatentFolder(out, dataclasses.replace(index.settings, rules=1, files=files))
    for number in range(folder.num_shards):
        shard = open_shard(folder.shard(number))
        tensors = {name: tensor.clone() for name, tensor in shard.tensors.items()}
        tensors["labels"].fill_(0)
        for i, name in enumerate(shard.names):
            tensors["labels"][i] = int(name.startswith("2"))  # in the order of text
        folder.write(number, tensors, shard.names, {})
    folder.shard(0).unlink()
    for rest in ([], ["--extend"]):
        printed = encode(*argv, *rest)
        assert "the rules of the first shards stay (version 1 of 2): class folders in text order" in printed
        assert opened[-1]["rules"] == 1 and read_index(out).class_names == ["10", "2"]
        shards = [open_shard(path) for path in out.glob("shard*")]
        assert {(shard.settings.get("rules"), shard.enlarged) for shard in shards} == {(None, None)}  # as before
        (images / "2" / "extra.png").write_bytes((images / "2" / "1.png").read_bytes())
    assert read_index(out).num_images == 9 and read_index(out).settings.rules == 1


def test_the_index_names_the_vae_as_its_codec_does(encode, argv, vae, tmp_path):
    argv[argv.index(vae)] = vae.name
    with working_folder(vae.parent):
        encode(*argv)
        assert read_index(tmp_path / "out").vae == VAECodec(vae.name).source


@pytest.mark.parametrize("lost", [None, "shard-00001.safetensors"])
def test_the_index_of_a_later_version_is_refused_and_kept(encode, argv, tmp_path, capsys, lost):
    encode(*argv)
    out = tmp_path / "out"
    content = json.loads((out / "index.json").read_text())
    content |= {"format": 9, "versions": {"sit_atconv": "7.1.0"}}
    (out / "index.json").write_text(json.dumps(content))
    if lost:
        (out / lost).unlink()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    error = error_of(argv, capsys)
    assert "was written by sit_atconv 7.1.0; install that version or a later one" in error and "Traceback" not in error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
