"""The command that measures how fast training data are read."""

import json
import subprocess

import pytest

from sit_atconv.data.loading_speed import private_mib
from tests.conftest import ROOT, load_command, python

LOADING = "eval/loading.py"


def test_latents_and_images_by_turns(latents, digit_folder, capsys):
    options = ["--latents", latents, "--images", digit_folder, "--image-size", 32, "--random-gb", 0.01,
               "--batch-size", 10, "--num-workers", 0, "--rounds", 2, "--seconds", 0.02]
    load_command(LOADING).main(list(map(str, options)))
    found = json.loads(capsys.readouterr().out)
    assert [speed["samples"] for speed in found.values()] == [120, 306, 120]
    assert list(found) == ["latents", "random latents", "images"] and all(len(s["rounds"]) == 2 for s in found.values())


def test_errors(fails, latents, tmp_path):
    main = load_command(LOADING).main
    assert "give --latents, --images or --random-gb" in fails(main, [])
    assert "nowhere holds no index.json" in fails(main, ["--latents", "nowhere"])
    assert "needs 100390.6 GB" in fails(main, ["--random-gb", "1e5"])
    assert "batch_size 256 exceeds the 120 images" in fails(main, ["--latents", latents])
    assert "nowhere is not a folder" in fails(main, ["--images", "nowhere"])
    assert "No such file" in fails(main, ["--random-gb", "0.01", "--scratch", tmp_path / "nowhere"])


@pytest.mark.scale
@pytest.mark.skipif(not private_mib("self"), reason="this system tells no RssAnon")
def test_ten_gigabytes_of_latents_are_read_in_less_than_one_of_private_memory(tmp_path):
    """In a process of its own, since workers begin with all that their parent holds."""
    done = subprocess.run(python(ROOT / LOADING, "--random-gb", 10, "--scratch", tmp_path, "--rounds", 8),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    speed = json.loads(done.stdout)["random latents"]
    print(f"\n{speed}")
    assert speed["samples"] >= 10e9 / (2 * 2 * 8 * 32 * 32)
    assert sum(speed["rounds"]) * 3 > speed["samples"] / 2  # much of it has been touched
    assert speed["private_mib"] < 1024
