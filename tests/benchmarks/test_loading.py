"""Tests of the benchmark of reading training data: its results, the memory of its workers, the command."""

import json
import subprocess

import pytest

from sit_atconv.data.images import ImageFolder
from sit_atconv.data.latent_folder import verify
from sit_atconv.data.latents import CachedLatents
from tests.conftest import load_command, python

loading = load_command("benchmarks/loading.py")


def test_sources_are_measured_in_turn(latents, digit_folder):
    sources = {"latents": lambda: CachedLatents(latents, mirror=True), "images": lambda: ImageFolder(digit_folder, 32)}
    found = loading.measure_loading(sources, batch_size=20, num_workers=1, rounds=3, seconds=0.05)
    assert found.keys() == sources.keys()
    for speed in found.values():
        assert speed["samples"] == 120 and len(speed["rounds"]) == 3
        assert speed["samples_per_second"] == sorted(speed["rounds"])[1] > 0
        assert speed["private_mib"] is None or 1 < speed["private_mib"] < 4096


def test_random_latents_are_a_complete_folder(tmp_path):
    loading.write_random_latents(tmp_path, 5000, (8, 4, 4))
    assert verify(tmp_path) == [] and len(CachedLatents(tmp_path)) == 5000 and len(list(tmp_path.glob("shard*"))) == 2
    moments, label = CachedLatents(tmp_path)[4999, True]
    assert moments.shape == (8, 4, 4) and 0.5 < moments.float().std() < 1.5 and 0 <= label < 10


def test_the_command_measures_latents_and_images(latents, digit_folder, capsys):
    options = [
        "--latents",
        latents,
        "--images",
        digit_folder,
        "--image-size",
        32,
        "--random-gb",
        0.01,
        "--entries",
        50,
        "--batch-size",
        10,
        "--num-workers",
        0,
        "--rounds",
        2,
        "--seconds",
        0.02,
    ]
    loading.main(list(map(str, options)))
    found = json.loads(capsys.readouterr().out)
    assert [speed["samples"] for speed in found.values()] == [120, 306, 120, 50, 50]
    assert list(found)[:3] == ["latents", "random latents", str(digit_folder)] and all(
        len(s["rounds"]) == 2 for s in found.values()
    )


def test_errors(fails, latents, tmp_path):
    main = loading.main
    assert "give --latents, --images, --random-gb or --entries" in fails(main, [])
    assert "nowhere holds no index.json" in fails(main, ["--latents", "nowhere"])
    assert "needs 100390.6 GB" in fails(main, ["--random-gb", "1e5"])
    assert "batch_size 256 exceeds the 120 images" in fails(main, ["--latents", latents])
    assert "nowhere is not a folder" in fails(main, ["--images", "nowhere"])
    assert "No such file" in fails(main, ["--random-gb", "0.01", "--scratch", tmp_path / "nowhere"])


@pytest.mark.scale
@pytest.mark.skipif(not loading.private_mib("self"), reason="this system does not report RssAnon")
def test_ten_gigabytes_of_latents_are_read_in_less_than_one_of_private_memory(tmp_path):
    """Runs in its own process, since workers start with all the memory of their parent."""
    done = subprocess.run(
        python(loading.__file__, "--random-gb", 10, "--scratch", tmp_path, "--rounds", 8),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    speed = json.loads(done.stdout)["random latents"]
    print(f"\n{speed}")
    assert speed["samples"] >= 10e9 / (2 * 2 * 8 * 32 * 32)
    assert sum(speed["rounds"]) * 3 > speed["samples"] / 2  # a large part has been read
    assert speed["private_mib"] < 1024
