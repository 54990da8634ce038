"""The training command that `encode` prints."""

import dataclasses
import shlex
from pathlib import Path

import numpy as np
import pytest

from sit_atconv.data.latent_folder import read_index
from sit_atconv.data.latents import CachedLatents
from sit_atconv.data.order import hold_out
from sit_atconv.training import preflight
from sit_atconv.training.first_command import training_command
from tests.conftest import ROOT, load_command


def fitted(latents: Path, **changes):
    """Returns the index of the digits with other settings."""
    index = read_index(latents)
    return dataclasses.replace(index, settings=dataclasses.replace(index.settings, **changes))


@pytest.mark.parametrize("config", ["imagenet256", "imagenet512"])
def test_a_shipped_configuration_that_fits_is_printed_without_options(latents, config):
    index = dataclasses.replace(fitted(latents, image_size=int(config[-3:])), num_images=50_000)
    command = training_command(index, np.zeros(50_000, int), Path("my latents"))
    assert command == (
        f"accelerate launch sit_atconv/train.py --config {config} --data.latents 'my latents' --out 'runs/my latents'"
    )


def test_the_printed_command_runs(latents, monkeypatch, capsys):
    """It passes all checks before training."""
    index = read_index(latents)
    command = shlex.split(training_command(index, CachedLatents(latents).labels, latents))
    assert command[:3] == ["accelerate", "launch", "sit_atconv/train.py"] and (ROOT / command[2]).exists()
    train = load_command("sit_atconv/train.py")
    monkeypatch.setattr(preflight, "dry_run", lambda net, config, order: f"batch {order.micro_batch}")
    train.main([*command[3:], "--dry-run"])
    assert capsys.readouterr().out == "batch 64\n"


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 6},
        {"mirrored": False},
        {"class_names": ["images"], "class_counts": [7], "num_images": 7},
    ],
)
def test_the_printed_command_is_fitted_to_the_latents(latents, changes, monkeypatch, tmp_path):
    of_settings = {key: value for key, value in changes.items() if key in ("image_size", "mirrored")}
    index = fitted(latents, **of_settings)
    index = dataclasses.replace(index, **{key: value for key, value in changes.items() if key not in of_settings})
    monkeypatch.chdir(tmp_path)
    Path("runs/digits").mkdir(parents=True)
    command = training_command(index, np.zeros(index.num_images, int), Path("digits"))
    expected = {
        "image_size": "--model.patch_size 1",
        "mirrored": "--data.mirror false",
        "class_names": "--model.has_null_label false --flow.class_dropout_prob 0 --preview.cfg 1 "
        "--data.held_out 0 --train.batch_size 4",
    }[next(iter(changes))]
    assert expected in command and command.endswith("--out runs/digits-2")


def test_no_class_is_held_out_completely(latents, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = np.zeros(120, int)
    labels[hold_out(120, 12)[3]] = 1  # the one image of its class
    assert "--data.held_out 12 " in training_command(read_index(latents), np.zeros(120, int), Path("x"))
    assert "--data.held_out 0 " in training_command(read_index(latents), labels, Path("x"))
