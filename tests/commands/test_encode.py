"""The encoding command: it writes the same bytes after any kill, and its errors name the remedy."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from sit_atconv.data.latent_folder import open_shard, read_index
from sit_atconv.data.latents import CachedLatents
from sit_atconv.runtime.files import exclusive
from tests.conftest import encode_argv, load_command, relative_error
from tests.data.test_stores import same_images

ENCODE = "sit_atconv/encode.py"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(folder: Path, other: Path) -> bool:
    here, there = content(folder), content(other)
    assert here.keys() == there.keys() and "index.json" in here and "preview.png" in here
    return [name for name in here if here[name] != there[name]] == []


@pytest.fixture
def argv(digit_folder, vae, tmp_path):
    return encode_argv(digit_folder, vae, tmp_path / "out")


def test_two_processes_give_the_bytes_of_one(launch, latents, argv, tmp_path):
    codes, output = launch(ENCODE, argv, processes=2)
    assert codes == [0, 0], output
    assert output.count("is complete") == 1 and "2 x cpu" in output
    assert same(tmp_path / "out", latents)


@pytest.mark.parametrize("kind", ["zip", "tar", "hf"])
def test_other_places_give_the_bytes_of_the_folder(launch, latents, digit_folder, argv, tmp_path, kind):
    place = same_images(digit_folder, tmp_path, kind)
    codes, output = launch(ENCODE, [argument if argument != digit_folder else place for argument in argv])
    assert codes == [0] and f"{place}: 120 images, 10 classes" in output, output
    assert same(tmp_path / "out", latents)


def test_another_number_of_threads_gives_the_same_moments_to_rounding(launch, latents, argv, tmp_path):
    codes, output = launch(ENCODE, [*argv, "--cpu-threads", 2])
    assert codes == [0], output
    one, two = CachedLatents(latents), CachedLatents(tmp_path / "out")
    for i in range(len(one)):
        assert relative_error(two[i, True][0], one[i, True][0]) < 1e-5


@pytest.mark.parametrize("die", ["before the second renaming", "after the second renaming", "before the index"])
def test_after_a_kill_at_a_write_the_same_command_completes_the_folder(launch, latents, argv, tmp_path, die):
    codes, _ = launch(ENCODE, argv, die=die)
    assert codes == [-9]
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    expected = {
        "before the second renaming": [".lock", ".partial-shard-00001.safetensors", "shard-00000.safetensors"],
        "after the second renaming": [".lock", "shard-00000.safetensors", "shard-00001.safetensors"],
    }
    assert left == expected.get(die, left) and "index.json" not in left
    whole = (tmp_path / "out" / "shard-00000.safetensors").stat().st_ino
    codes, output = launch(ENCODE, argv)
    assert codes == [0], output
    assert same(tmp_path / "out", latents)
    assert (tmp_path / "out" / "shard-00000.safetensors").stat().st_ino == whole  # it was not encoded again


def killed_and_completed(launch, argv, out: Path, latents: Path, processes: int, count: int) -> bool:
    """Kills the command, completes it, compares the bytes. Returns True if shards existed before completion."""
    launch(ENCODE, argv, processes, kill_at=count)
    assert not (out / "index.json").exists()
    partly = any(out.glob("shard-*"))
    codes, output = launch(ENCODE, argv, processes)
    assert codes == [0] * processes, output
    assert same(out, latents)
    shutil.rmtree(out)
    return partly


def test_a_killed_and_resumed_command_writes_the_same_bytes(launch, latents, argv, tmp_path):
    assert killed_and_completed(launch, argv, tmp_path / "out", latents, 1, 70)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_command_killed_at_ten_moments_writes_the_same_bytes(launch, latents, argv, tmp_path, processes):
    moments = random.Random(0).sample(range(1, 115 // processes), 10)
    partly = [killed_and_completed(launch, argv, tmp_path / "out", latents, processes, at) for at in moments]
    assert sum(partly) >= 5


def test_a_complete_folder_is_not_encoded_again(launch, latents, digit_folder, vae):
    before = {path: path.stat().st_mtime_ns for path in latents.iterdir()}
    codes, output = launch(ENCODE, encode_argv(digit_folder, vae, latents))
    assert codes == [0] and "is complete: 120 images of 10 classes in 6 shards" in output and "images/s" not in output
    assert {path: path.stat().st_mtime_ns for path in latents.iterdir()} == before


@pytest.mark.parametrize("lost", ["index.json", "shard-00003.safetensors"])
def test_lost_or_damaged_files_are_written_again(launch, latents, argv, tmp_path, lost):
    out = shutil.copytree(latents, tmp_path / "out")
    (out / lost).write_bytes((out / lost).read_bytes()[:-20])
    codes, output = launch(ENCODE, argv)
    assert codes == [0], output
    assert same(out, latents)


def test_an_index_of_other_shards_is_replaced(launch, latents, digit_folder, make_vae, argv, tmp_path):
    """The shards are replaced by those of another VAE, and the command is killed before it writes the index."""
    out = shutil.copytree(latents, tmp_path / "out")
    for shard in out.glob("shard-*"):
        shard.unlink()
    other = encode_argv(digit_folder, make_vae(1), out)
    assert launch(ENCODE, other, die="before the second renaming")[0] == [-9]
    assert not (out / "index.json").exists()
    codes, output = launch(ENCODE, other)
    assert codes == [0], output
    shutil.copy(latents / "index.json", out / "index.json")
    codes, output = launch(ENCODE, other)  # with an index of other shards
    assert codes == [0], output
    assert read_index(out).settings.codec["weights"] != read_index(latents).settings.codec["weights"]


def test_skip_unreadable_does_not_skip_a_failing_disk(launch, mixed, vae, tmp_path):
    (mixed / "class 1" / "gone.png").symlink_to("nowhere")
    spoil(mixed)
    codes, output = launch(ENCODE, [*encode_argv(mixed, vae, tmp_path / "out"), "--skip-unreadable"])
    assert codes == [1] and f"{mixed / 'class 1' / 'gone.png'} cannot be read: No such file" in output
    assert "Traceback" not in output and not (tmp_path / "out" / "index.json").exists()


def test_a_damaged_shard_does_not_get_into_a_new_index(launch, latents, argv, tmp_path):
    """One shard is missing and encoded again; another one has a flipped bit."""
    out = shutil.copytree(latents, tmp_path / "out")
    (out / "shard-00002.safetensors").unlink()
    flipped = out / "shard-00004.safetensors"
    content_ = bytearray(flipped.read_bytes())
    content_[-1000] ^= 4
    flipped.write_bytes(content_)
    codes, output = launch(ENCODE, argv)
    assert codes == [1] and f"{flipped} is damaged: its content does not match its checksum: delete that file" in output
    flipped.unlink()
    codes, output = launch(ENCODE, argv)
    assert codes == [0] and same(out, latents), output


def test_verify_reports_intact_and_damaged_folders(launch, latents, fails, tmp_path, capsys):
    load_command(ENCODE).main(["--verify", str(latents)])
    assert "is intact: 120 images of 10 classes in 6 shards, 2.0 MB" in capsys.readouterr().out
    out = shutil.copytree(latents, tmp_path / "out")
    (out / "shard-00002.safetensors").unlink()
    flipped = bytearray((out / "shard-00004.safetensors").read_bytes())
    flipped[-1000] ^= 4
    (out / "shard-00004.safetensors").write_bytes(flipped)
    with pytest.raises(SystemExit) as stop:
        load_command(ENCODE).main(["--verify", str(out)])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and f"error: {out} is damaged; delete the shards named below" in error
    assert "shard-00002.safetensors is missing" in error
    assert "shard-00004.safetensors is damaged: its content does not match its checksum" in error


@pytest.fixture
def mixed(tmp_path):
    """Images of many modes in two classes; `spoil` adds unreadable ones."""
    photograph = Image.fromarray(load_sample_image("flower.jpg")).crop((100, 100, 340, 280))
    folder = tmp_path / "mixed"
    for i in range(12):
        path = folder / f"class {i % 2}" / f"image {i:02d} ä.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph.crop((i * 4, 0, i * 4 + 96, 90)).save(path)
    photograph.convert("CMYK").save(folder / "class 0" / "cmyk.jpg")
    photograph.convert("RGBA").save(folder / "class 0" / "rgba.png")
    Image.fromarray(np.array(photograph.convert("L")).astype(np.uint16) * 257).save(folder / "class 1" / "deep.png")
    (folder / "class 0" / "notes.txt").write_text("no image")
    return folder


UNREADABLE = {"class 0/empty.png": b"", "class 1/text ä.jpg": b"no picture"}


def spoil(folder: Path):
    for name, written in UNREADABLE.items():
        (folder / name).write_bytes(written)


def test_unreadable_images_are_all_named_and_can_be_fixed_in_place(launch, mixed, vae, tmp_path):
    argv = encode_argv(mixed, vae, tmp_path / "out")
    spoil(mixed)
    codes, output = launch(ENCODE, argv)
    assert codes == [1] and "error: 2 images cannot be read: fix them" in output and "--skip-unreadable" in output
    assert all(f"{mixed / name} cannot be read as an image: cannot identify" in output for name in UNREADABLE)
    assert "Traceback" not in output and not (tmp_path / "out" / "index.json").exists()
    for name in UNREADABLE:
        Image.new("RGB", (40, 40), "red").save(mixed / name)
    codes, output = launch(ENCODE, argv)
    assert codes == [0] and "17 images of 2 classes" in output, output


def test_skip_unreadable_leaves_images_out_and_records_them(launch, mixed, vae, tmp_path, fails):
    """Two processes encode; the moments of the other images stay the same."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    spoil(mixed)
    for name in UNREADABLE:
        Image.new("RGB", (40, 40)).save(mixed / name)
    codes, output = launch(ENCODE, encode_argv(mixed, vae, whole))
    assert codes == [0], output
    spoil(mixed)
    codes, output = launch(ENCODE, [*encode_argv(mixed, vae, out), "--skip-unreadable"], processes=2)
    assert codes == [0, 0] and "15 images of 2 classes in 1 shards" in output and "2 left out" in output, output
    index = read_index(out)
    assert index.class_counts == [8, 7] and index.skipped.keys() == UNREADABLE.keys()
    assert all("cannot be read as an image" in why and str(tmp_path) not in why for why in index.skipped.values())
    read, complete = (open_shard(folder / "shard-00000.safetensors") for folder in (out, whole))
    kept = [i for i, name in enumerate(complete.names) if name not in UNREADABLE]
    assert [complete.names[i] for i in kept] == read.names
    for name in ("moments", "mirrored", "labels"):
        assert torch.equal(complete.tensors[name][kept], read.tensors[name])
    codes, output = launch(ENCODE, [*encode_argv(mixed, vae, out), "--skip-unreadable"])
    assert codes == [0] and "2 left out" in output and "images/s" not in output
    codes, output = launch(ENCODE, encode_argv(mixed, vae, out))  # without --skip-unreadable
    assert codes == [1] and "2 images cannot be read: fix them" in output
    for name in UNREADABLE:
        Image.new("RGB", (40, 40)).save(mixed / name)
    codes, output = launch(ENCODE, encode_argv(mixed, vae, out))
    assert codes == [0] and same(out, whole), output


def test_no_mirror_encodes_only_plain_images(launch, mixed, vae, tmp_path):
    codes, output = launch(ENCODE, [*encode_argv(mixed, vae, tmp_path / "out"), "--no-mirror"])
    assert codes == [0], output
    cached = CachedLatents(tmp_path / "out")
    assert cached[3, False][0].shape == (8, 16, 16) and "mirrored" not in cached.shards[0].tensors
    with pytest.raises(ValueError, match=r"has no horizontally flipped images: set data\.mirror to false"):
        CachedLatents(tmp_path / "out", mirror=True)


def test_values_that_the_dtype_cannot_hold_are_refused(launch, mixed, make_vae, tmp_path):
    from safetensors.torch import load_file, save_file

    vae = shutil.copytree(make_vae(), tmp_path / "vae")
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    weights["quant_conv.bias"] = torch.full_like(weights["quant_conv.bias"], 1e6)
    save_file(weights, vae / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    argv = encode_argv(mixed, vae, tmp_path / "out")
    argv[argv.index("float32")] = "float16"
    codes, output = launch(ENCODE, argv)
    assert codes == [1] and "class 0/cmyk.jpg: its latents are too large for float16: give --dtype float32" in output
    assert list((tmp_path / "out").iterdir()) == []


def test_dataset_json_and_a_codec_of_16_channels_with_shift(launch, mixed, make_vae, tmp_path):
    import json

    names = [path.relative_to(mixed).as_posix() for path in mixed.rglob("*") if path.suffix in (".png", ".jpg")]
    (mixed / "dataset.json").write_text(json.dumps({"labels": [[name, i % 5] for i, name in enumerate(names)]}))
    vae = make_vae(latent_channels=16, shift_factor=0.1159, scaling_factor=0.3611)
    codes, output = launch(ENCODE, [*encode_argv(mixed, vae, tmp_path / "out"), "--precision", "bf16", "--slicing"])
    assert codes == [0], output
    index, cached = read_index(tmp_path / "out"), CachedLatents(tmp_path / "out")
    assert index.class_counts == [3] * 5 and index.settings.moments_shape == [32, 16, 16]
    assert (index.settings.codec["scale"], index.settings.codec["shift"]) == (0.3611, 0.1159)
    labels = {name: i % 5 for i, name in enumerate(names)}
    stored = [name for path in sorted((tmp_path / "out").glob("shard-*")) for name in open_shard(path).names]
    assert [labels[name] for name in stored] == [cached[i, False][1] for i in range(15)]


def test_unusable_options_are_refused(fails, digit_folder, vae, make_vae, argv, latents, tmp_path, monkeypatch):
    def error(*options, of=argv):
        return fails(load_command(ENCODE).main, [*of, *options])

    assert "give --images" in error(of=["--out", "x"]) and "give --out" in error(of=["--images", digit_folder])
    assert "nowhere does not exist: give a folder, .zip or .tar of images" in error("--images", "nowhere")
    assert "no VAE could be loaded from '/nowhere/vae'" in error("--vae", "/nowhere/vae")
    assert "image size 33 is not divisible by the codec's downsampling 2" in error("--image-size", 33)
    assert "--dtype" in error("--dtype", "int8") and "'0' is not above 0" in error("--shard-mib", 0)
    assert f"is inside {digit_folder} and would count as images" in error("--out", digit_folder / "latents")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    assert "holds something else (thesis.tex)" in error("--out", tmp_path / "other")
    assert "thesis.tex is a file" in error("--out", tmp_path / "other" / "thesis.tex")
    assert "other settings (image_size 32 -> 16; moments_shape " in error("--out", latents, "--image-size", 16)
    assert "was encoded with other settings (codec.weights " in error("--out", latents, "--vae", make_vae(1))
    assert "was encoded with other settings (batch_size 5 -> 4)" in error("--out", latents, "--batch-size", 4)
    assert "/proc/x needs 2.0 MB and its disk has 0.0 MB free" in error("--out", "/proc/x")
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
        assert f"{tmp_path / 'out'} needs 2.0 MB and its disk has 1.0 MB free" in error()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_folder_in_use_is_refused(launch, argv, tmp_path, processes):
    with exclusive(tmp_path / "out"):
        codes, output = launch(ENCODE, argv, processes)
    assert codes == [1] * processes and "is in use by process" in output and "Traceback" not in output


def test_the_command_can_be_repeated_after_a_full_disk(launch, argv, latents, tmp_path):
    """A limit on the file size replaces the full disk: the same system call fails."""
    codes, output = launch(ENCODE, argv, 2, die="files of 100 kB are too large")
    assert codes == [1, 1] and "shard-00000.safetensors cannot be written (File too large)" in output, output
    assert "Traceback" not in output and list((tmp_path / "out").iterdir()) == []
    codes, output = launch(ENCODE, argv, 2)
    assert codes == [0, 0] and same(tmp_path / "out", latents), output
