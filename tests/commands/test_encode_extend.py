"""Extending cached latents: existing shards stay the same, and a kill leaves the old or the new state."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from sit_atconv.data.latent_folder import open_shard, read_index, verify
from sit_atconv.data.latents import CachedLatents
from tests.commands.conftest import draw
from tests.commands.test_encode import same
from tests.conftest import encode_argv, load_command

ENCODE = "sit_atconv/encode.py"


def grow(images: Path):
    """Adds one image that sorts first in its class, and two of a new class that sorts first."""
    draw(images / "b" / "00.png", 10)
    draw(images / "a" / "0.png", 11)
    draw(images / "a" / "1.png", 12)


@pytest.fixture
def former(encode, argv, images, tmp_path):
    """Latents before the extension; those in `out` are extended."""
    encode(*argv)
    copy = shutil.copytree(tmp_path / "out", tmp_path / "former")
    grow(images)
    encode(*argv, "--extend")
    return copy


def stored(out: Path) -> dict[str, tuple[int, int, torch.Tensor]]:
    """Returns index, label and moments of each image by its name."""
    cached = CachedLatents(out)
    names = [name for entry in cached.index.shards for name in open_shard(out / entry["file"]).names]
    return {name: (i, cached[i, False][1], cached[i, False][0]) for i, name in enumerate(names)}


def test_existing_images_keep_their_place_and_new_ones_follow(encode, argv, images, vae, tmp_path):
    out = tmp_path / "out"
    encode(*argv)
    shards, before = {path: path.read_bytes() for path in out.glob("shard*")}, stored(out)
    identity = CachedLatents(out).describe()
    grow(images)
    printed = encode(*argv, "--extend")
    assert "extension: images 8 to 10; new labels: 2 is 'a'" in printed and "3 of 4 shards are there" in printed
    assert "3 classes: 'b' 5, 'c' 4, 'a' 2" in printed and "refuses these as other data" in printed
    assert {path: path.read_bytes() for path in shards} == shards and len(list(out.glob("shard*"))) == 4
    after, index = stored(out), read_index(out)
    assert {name: found[:2] for name, found in before.items()}.items() <= {k: v[:2] for k, v in after.items()}.items()
    assert {name: found[:2] for name, found in after.items() if name not in before} == {
        "a/0.png": (8, 2),
        "a/1.png": (9, 2),
        "b/00.png": (10, 0),
    }
    assert index.class_names == ["b", "c", "a"] and index.num_images == 11 and verify(out) == []
    assert CachedLatents(out).describe() != identity
    alone = tmp_path / "alone"
    encode(*encode_argv(images, vae, alone))
    for name, found in stored(alone).items():
        assert torch.allclose(found[2], after[name][2], atol=1e-5), name
    for again in ([], ["--extend"]):
        assert "is complete: 11 images of 3 classes in 4 shards" in encode(*argv, *again)
    draw(images / "c" / "01.png", 13)
    assert "extension: images 11 to 11; new labels: none" in encode(*argv, "--extend")
    assert stored(out)["c/01.png"][:2] == (11, 1) and verify(out) == [] and len(read_index(out).settings.parts) == 3
    assert "is complete: 12 images" in encode(*argv)


def test_a_lost_shard_of_any_part_is_encoded_again(encode, fails, argv, images, former, tmp_path):
    """The index is lost, too."""
    draw(images / "c" / "01.png", 13)
    encode(*argv, "--extend")
    out, whole = tmp_path / "out", shutil.copytree(tmp_path / "out", tmp_path / "whole")
    for lost in (1, 3, 4):  # 4 is the only shard of the last part
        (out / f"shard-0000{lost}.safetensors").unlink()
        (out / "index.json").unlink()
        encode(*argv, *(["--extend"] if lost == 4 else []))
        assert same(out, whole)
    for lost in (1, 3):
        (out / f"shard-0000{lost}.safetensors").unlink()
    error = fails(load_command("sit_atconv/encode.py").main, argv)
    assert "lacks shards of several parts, and it is unknown which images belong to which part: restore" in error


def test_refusals_name_the_images(encode, fails, argv, images, tmp_path, capsys):
    main, out = load_command(ENCODE).main, tmp_path / "out"
    assert f"{out} holds no latents to extend: leave --extend out" in fails(main, [*argv, "--extend"])
    encode(*argv)
    grow(images)
    error = fails(main, argv)
    assert "holds 3 images that" in error and "(a/0.png, a/1.png, b/00.png): add them with --extend" in error
    assert "other settings (image_size 32 -> 16; " in fails(main, [*argv, "--extend", "--image-size", 16])
    (images / "b" / "0.png").unlink()
    (images / "c" / "1.png").rename(images / "b" / "1.png")
    for options in ([], ["--extend"]):
        with pytest.raises(SystemExit):
            main(list(map(str, [*argv, *options])))
        assert f"2 images of {out} are gone from {images}: b/0.png, c/1.png" in capsys.readouterr().err


def test_labels_of_dataset_json_may_be_added_but_not_changed(encode, argv, images, tmp_path, capsys):
    out = tmp_path / "out"
    labels = {path.relative_to(images).as_posix(): i % 2 for i, path in enumerate(sorted(images.rglob("*.png")))}
    (images / "dataset.json").write_text(json.dumps({"labels": list(labels.items())}))
    encode(*argv)
    draw(images / "b" / "00.png", 10)
    (images / "dataset.json").write_text(json.dumps({"labels": [*labels.items(), ["b/00.png", 2]]}))
    assert "new labels: 2 is '2'" in encode(*argv, "--extend") and stored(out)["b/00.png"][:2] == (8, 2)
    (images / "dataset.json").write_text(json.dumps({"labels": [*(labels | {"c/7.png": 2}).items(), ["b/00.png", 2]]}))
    with pytest.raises(SystemExit):
        load_command(ENCODE).main(list(map(str, argv)))
    error = capsys.readouterr().err
    assert f"1 images of {out} have another label in {images}: c/7.png" in error and "Traceback" not in error


def test_an_image_that_was_left_out_may_be_gone_and_stays_left_out(encode, argv, images, tmp_path):
    """It also stays left out if it was fixed, because --extend does not change existing shards."""
    out = tmp_path / "out"
    (images / "b" / "2.png").write_bytes(b"no picture")
    (images / "c" / "3.png").write_bytes(b"no picture")
    encode(*argv, "--skip-unreadable")
    (images / "b" / "2.png").unlink()
    draw(images / "c" / "3.png", 3)
    grow(images)
    assert "is complete: 9 images of 3 classes" in encode(*argv, "--extend")
    assert "b/00.png" in stored(out) and read_index(out).skipped.keys() == {"b/2.png", "c/3.png"} and verify(out) == []


def test_incomplete_latents_are_not_extended(encode, fails, argv, images, tmp_path):
    encode(*argv)
    (tmp_path / "out" / "shard-00001.safetensors").unlink()
    grow(images)
    for options in ([], ["--extend"]):
        error = fails(load_command(ENCODE).main, [*argv, *options])
        assert "is incomplete, and" in error and "not hold the images that it was started with: complete it" in error
    assert len(list((tmp_path / "out").glob("shard*"))) == 2


def test_verify_reports_a_stopped_extension(encode, argv, former, tmp_path, capsys):
    shutil.copy(former / "index.json", tmp_path / "out" / "index.json")
    load_command(ENCODE).main(["--verify", str(tmp_path / "out")])
    assert "is intact: 8 images of 2 classes in 3 shards" in (printed := capsys.readouterr().out)
    assert "1 more shards belong to an extension that was stopped: run its command again" in printed
    assert "is complete: 11 images" in encode(*argv)


def killed_and_completed(launch, argv, out: Path, former: Path, whole: Path, die) -> bool:
    """Copies the former latents, kills their extension there, and completes it. Returns whether it was killed."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(former, out)
    extend = [out if option == whole else option for option in argv] + ["--extend"]
    codes, printed = launch(ENCODE, extend, die=die)
    if codes != [-9]:
        assert same(out, whole), printed
        return False
    before = CachedLatents(former)
    if (out / "index.json").read_bytes() != (whole / "index.json").read_bytes():
        assert CachedLatents(out).describe() == before.describe()
        assert all(torch.equal(CachedLatents(out)[i, False][0], before[i, False][0]) for i in range(len(before)))
    codes, printed = launch(ENCODE, extend)
    (out / ".lock").unlink(missing_ok=True)  # a kill at the very end leaves it
    assert codes == [0] and same(out, whole), printed
    return True


def test_after_a_killed_extension_the_former_latents_are_valid_and_the_same_command_completes(
    launch, argv, former, tmp_path
):
    assert killed_and_completed(launch, argv, tmp_path / "killed", former, tmp_path / "out", "before the index")


@pytest.mark.slow
def test_an_extension_can_be_killed_at_any_write(launch, argv, former, tmp_path):
    point = 1
    while killed_and_completed(launch, argv, tmp_path / "killed", former, tmp_path / "out", point):
        point += 1
    assert point > 6
