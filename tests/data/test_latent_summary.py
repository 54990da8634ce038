"""What encoding says of the images, and the training command that it prints."""

import dataclasses
import shlex
from pathlib import Path

import numpy as np
import pytest

from sit_atconv.data.images import ImageFolder
from sit_atconv.data.latent_folder import read_index
from sit_atconv.data.latent_summary import (
    CONFIGS,
    describe_classes,
    describe_images,
    describe_latents,
    training_command,
)
from sit_atconv.data.latents import CachedLatents
from sit_atconv.data.order import hold_out
from tests.conftest import load_command
from tests.data.test_latent_folder import settings


@pytest.fixture
def described(tmp_path):
    """described(names, **settings) -> what is said of an image folder with one image of each name."""

    def run(names: list[str], **options) -> str:
        for name in names:
            path = tmp_path / "my images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        images = ImageFolder(tmp_path / "my images", 8)
        images.left_out = {".txt": 2}
        return "\n".join(describe_images(images, settings(rules=images.rules, **options)))

    return run


def test_classes_are_counted(described):
    assert "2 images, 2 classes: 'cat' 1, 'dog ' 1\nleft out: 2 .txt" in described(["cat/a.png", "dog /a.png"])
    assert describe_classes(["a", "b"], [3, 1]) == "2 classes: 'a' 3, 'b' 1"
    names = [f"n{i:02d}" for i in range(11)]
    assert describe_classes(names, [5, 9, *[6] * 9]) == "11 classes of 5 ('n00') to 9 ('n01')"


def test_splits_that_became_classes_are_warned_of(described):
    names = ["train/cat/a.png", "Val/cat/b.png"]
    said = described(names)
    assert "warning: the classes 'Val' and 'train' have the names of a data set's splits" in said
    assert "give --images '" in said and "my images/train'" in said
    assert "warning" not in described([*names, "zebra/a.png"])


def test_one_split_alone_is_a_class(described):
    assert "warning" not in described(["train/a.png"])


def test_latents_that_no_patch_divides_are_warned_of(described):
    said = described(["a.png"], moments_shape=[2, 3, 3])
    assert "latents of 3x3, and no preset's patch (2, 4, 8) divides that" in said
    assert "warning" not in described(["a.png"], moments_shape=[2, 6, 6])


def test_older_rules_are_named(tmp_path):
    (tmp_path / "a.png").touch()
    said = describe_images(ImageFolder(tmp_path, 8, rules=1), settings(rules=1))
    assert said[1] == "rules of its first shards (version 1 of 2): class folders in text order, fewer suffixes"


def test_images_that_were_enlarged_are_counted(latents):
    index = read_index(latents)
    assert describe_latents(index)[-1] == "120 of 120 images are smaller than 32 px and were enlarged"
    assert len(describe_latents(dataclasses.replace(index, enlarged=None))) == 1


def fitted(latents: Path, **changes):
    """The index of the digits, as if other settings had made it."""
    index = read_index(latents)
    return dataclasses.replace(index, settings=dataclasses.replace(index.settings, **changes))


@pytest.mark.parametrize("config", ["imagenet256", "imagenet512"])
def test_the_shipped_configuration_is_printed_where_it_fits(latents, config):
    index = dataclasses.replace(fitted(latents, image_size=int(config[-3:])), num_images=50_000)
    command = training_command(index, np.zeros(50_000, int), Path("my latents"))
    assert command == (f"accelerate launch sit_atconv/train.py --config configs/{config}.yaml --data.latents "
                       "'my latents' --out 'runs/my latents'")


def test_the_printed_command_runs(latents, monkeypatch, capsys):
    """All that training checks before it begins."""
    index = read_index(latents)
    command = shlex.split(training_command(index, CachedLatents(latents).labels, latents))
    assert command[:3] == ["accelerate", "launch", "sit_atconv/train.py"] and (CONFIGS.parent / command[2]).exists()
    train = load_command("sit_atconv/train.py")
    monkeypatch.setattr(train, "dry_run", lambda net, config, plan: f"batch {plan.micro_batch}")
    train.main([*command[3:], "--dry-run"])
    assert capsys.readouterr().out == "batch 64\n"


@pytest.mark.parametrize("changes", [
    {"moments_shape": [8, 3, 3]}, {"mirrored": False},
    {"class_names": ["images"], "class_counts": [7], "num_images": 7},
])
def test_the_printed_command_is_fitted_to_the_latents(latents, changes, monkeypatch, tmp_path):
    of_settings = {key: value for key, value in changes.items() if key in ("moments_shape", "mirrored")}
    index = fitted(latents, **of_settings)
    index = dataclasses.replace(index, **{key: value for key, value in changes.items() if key not in of_settings})
    monkeypatch.chdir(tmp_path)
    Path("runs/digits").mkdir(parents=True)
    command = training_command(index, np.zeros(index.num_images, int), Path("digits"))
    expected = {"moments_shape": "--model.patch_size 1", "mirrored": "--data.mirror false",
                "class_names": "--model.has_null_label false --flow.class_dropout_prob 0 --preview.cfg 1 "
                               "--data.held_out 0 --train.batch_size 4"}[next(iter(changes))]
    assert expected in command and command.endswith("--out runs/digits-2")


def test_no_class_is_held_out_as_a_whole(latents, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = np.zeros(120, int)
    labels[hold_out(120, 12)[3]] = 1  # the one image of its class
    assert "--data.held_out 12 " in training_command(read_index(latents), np.zeros(120, int), Path("x"))
    assert "--data.held_out 0 " in training_command(read_index(latents), labels, Path("x"))
