"""Exported weights: their recipes, and errors that name what is damaged."""

import dataclasses
import json

import pytest
import yaml
from safetensors.torch import load_file

from sit_atconv.checkpoints.training_state import save_checkpoint
from sit_atconv.checkpoints.weights import load_weights
from tests.checkpoints.conftest import recipe
from tests.conftest import working_folder


@pytest.mark.parametrize(
    ("options", "null_label"),
    [
        ({"flow": {"class_dropout_prob": 0.0}, "init_from": None}, None),
        ({"flow": {"class_dropout_prob": 0.1}, "init_from": None}, 10),
        ({"flow": {"class_dropout_prob": 0.0}, "init_from": "weights"}, 10),  # whose null label may be trained
        ("damaged", 10),
    ],
)
def test_an_old_runs_config_tells_if_the_null_label_was_trained(tmp_path, state, options, null_label):
    save_checkpoint(tmp_path, state, recipe(7), keep=2)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    assert load_weights(str(tmp_path)).null_label == null_label
    with working_folder(tmp_path / "checkpoints" / "step-0000007"):
        assert load_weights("ema").null_label == null_label
    save_checkpoint(tmp_path, state, dataclasses.replace(recipe(8), null_label_trained=True), keep=2)
    assert load_weights(str(tmp_path)).null_label == 10


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "diffusion_pytorch_model.safetensors").write_bytes(b"\x93" * 4000), "incomplete or damaged"),
        (lambda f: (f / "diffusion_pytorch_model.safetensors").unlink(), "incomplete or damaged"),
        (lambda f: (f / "recipe.json").unlink(), "incomplete or damaged"),
        (lambda f: (f / "config.json").write_text("{"), "incomplete or damaged"),
        (lambda f: (f / "config.json").unlink(), "incomplete or damaged"),
    ],
)
def test_damaged_weights_are_named(tmp_path, state, break_it, message):
    checkpoint = save_checkpoint(tmp_path, state, recipe(3), keep=2)
    break_it(checkpoint / "ema")
    with pytest.raises(ValueError, match=message):
        load_weights(str(tmp_path))


def test_tensors_that_do_not_fit_the_config_are_listed(tmp_path, state):
    folder = save_checkpoint(tmp_path, state, recipe(3), keep=2) / "ema"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"depth": 3}))
    with pytest.raises(ValueError, match=r"blocks\.2|damaged"):
        load_weights(str(folder))
    assert "blocks.1.attn.proj.weight" in load_file(folder / "diffusion_pytorch_model.safetensors")


def test_a_recipe_has_new_fields_only_if_they_are_needed(tmp_path, state):
    """Earlier versions refuse fields that they do not know."""
    folder = save_checkpoint(tmp_path, state, recipe(3), keep=2) / "ema"
    assert list(json.loads((folder / "recipe.json").read_text())) == [
        "interpolant",
        "prediction",
        "codec",
        "class_names",
        "step",
        "ema_decay",
        "null_label_trained",
        "empty_classes",
        "ema_known",
        "versions",
    ]
    other = dataclasses.replace(recipe(4), objective={"class_path": "mine.Objective", "init_args": {"a": 1}})
    save_checkpoint(tmp_path, state, other, keep=2)
    assert load_weights(str(tmp_path)).recipe == dataclasses.replace(other, ema_decay=0.99)


def test_a_recipe_of_a_later_version_is_refused_with_its_number(tmp_path, state):
    file = save_checkpoint(tmp_path, state, recipe(3), keep=2) / "ema" / "recipe.json"
    content = json.loads(file.read_text())
    for versions, wrote in (({"sit_atconv": "9.1"}, "by 9.1"), (None, "by a later one")):
        file.write_text(json.dumps(content | {"versions": versions, "teacher": {}, "shift": 2}))
        with pytest.raises(ValueError, match=rf"ema/recipe\.json has shift, teacher, which .* {wrote}; install"):
            load_weights(str(tmp_path))
