"""Pipelines of `convert --to pipeline` and `save_pretrained` are loaded with their whole recipe."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from sit_atconv.checkpoints.exported import Weights, export_weights
from sit_atconv.checkpoints.published_models import load_published
from sit_atconv.checkpoints.recipe import Recipe
from sit_atconv.checkpoints.weights import load_weights, locate_weights
from sit_atconv.data.codecs import IdentityCodec, VAECodec
from sit_atconv.pipeline import SiTPipeline, export_pipeline
from tests.conftest import working_folder
from tests.models.test_sit import randomised

NAMES = [f"class {i}" for i in range(10)]


def weights_of(codec, **options) -> Weights:
    recipe = Recipe(
        "linear",
        "noise",
        codec.describe(),
        NAMES,
        step=7,
        ema_decay=0.99,
        null_label_trained=False,
        empty_classes=[3, 8],
    )
    return Weights(randomised(in_channels=codec.channels), dataclasses.replace(recipe, **options), Path("nowhere"))


def assert_same(a: Weights, b: Weights):
    """Compares tensors and recipes, but not the path of the VAE."""
    tensors = b.model.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in a.model.state_dict().items())
    recipes = [dataclasses.asdict(weights.recipe) for weights in (a, b)]
    for recipe in recipes:
        recipe["codec"].pop("source", None)
    assert recipes[0] == recipes[1]


@pytest.mark.parametrize("space", ["latent", "pixel"])
def test_a_pipeline_is_loaded_with_its_recipe(vae, tmp_path, space):
    weights = weights_of(VAECodec(str(vae)) if space == "latent" else IdentityCodec(3))
    export_pipeline(weights, tmp_path / "pipe")
    os.renames(tmp_path / "pipe", tmp_path / "elsewhere" / "pipe")
    with working_folder(tmp_path / "elsewhere"):
        for ckpt in ("pipe", "pipe/transformer"):
            again = load_weights(ckpt, vae="identity" if space == "pixel" else str(vae))
            assert_same(again, weights)
            assert not again.notes and again.null_label is None and again.model.null_label == 10
        SiTPipeline.from_pretrained("pipe").save_pretrained("saved")
        assert_same(load_weights("saved"), weights)
        if space == "latent":
            assert load_weights("saved").recipe.codec["source"] == str(tmp_path / "elsewhere" / "saved" / "vae")
    export_weights(again, tmp_path / "ours")
    assert_same(load_weights(str(tmp_path / "ours"), ema=0.99), weights)
    with pytest.raises(ValueError, match=r"of decay 0\.99: leave out --no-ema"):
        locate_weights(str(tmp_path / "ours"), ema=False)


@pytest.mark.parametrize(
    "options",
    [
        dict(variant="fp16"),
        dict(max_shard_size="100KB"),
        dict(safe_serialization=False),
        dict(max_shard_size="100KB", variant="fp16"),
    ],
)
def test_all_formats_that_diffusers_writes_are_loaded(tmp_path, options):
    weights = weights_of(IdentityCodec(3))
    pipeline = SiTPipeline(weights.model, FlowMatchEulerDiscreteScheduler(), prediction="noise")
    pipeline.save_pretrained(tmp_path / "pipe", **options)
    again, plain = load_weights(str(tmp_path / "pipe")), weights.model.state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in again.model.state_dict().items())
    other = SiTPipeline(randomised(in_channels=3, num_classes=9), FlowMatchEulerDiscreteScheduler())
    other.save_pretrained(tmp_path / "other", **options)
    assert again.identity() != load_weights(str(tmp_path / "other")).identity()


def test_shards_that_diffusers_cannot_read_are_refused(tmp_path):
    pipeline = SiTPipeline(randomised(in_channels=3), FlowMatchEulerDiscreteScheduler())
    pipeline.save_pretrained(tmp_path / "pipe", max_shard_size="100KB", safe_serialization=False)
    with pytest.raises(ValueError, match=r"transformer are \.bin shards, .*: save them as \.safetensors"):
        load_weights(str(tmp_path / "pipe"))


def test_half_precision_weights_are_loaded_in_float32(tmp_path):
    pipeline = SiTPipeline(randomised(in_channels=3).half(), FlowMatchEulerDiscreteScheduler())
    pipeline.save_pretrained(tmp_path / "pipe")
    assert load_weights(str(tmp_path / "pipe")).model.dtype is torch.float32


def test_fields_that_an_earlier_pipeline_lacks_are_not_known(tmp_path):
    export_pipeline(weights_of(IdentityCodec(3)), tmp_path / "pipe")
    file = tmp_path / "pipe" / "model_index.json"
    index = json.loads(file.read_text())
    for name in ("step", "ema_decay", "ema_known", "null_label_trained", "empty_classes"):
        del index[name]
    file.write_text(json.dumps(index | {"id2label": None}))
    weights = load_weights(str(tmp_path / "pipe"))
    assert weights.recipe.average is weights.recipe.null_label_trained is None and weights.recipe.step == 0
    assert weights.recipe.class_names == [str(i) for i in range(10)] and weights.recipe.empty_classes == []
    assert "does not name its classes" in weights.notes[0]


def test_errors_of_other_pipelines_and_of_damaged_ones_differ(vae, tmp_path):
    export_pipeline(weights_of(VAECodec(str(vae))), tmp_path / "pipe")
    for name, break_it, message in [
        (
            "foreign",
            lambda f: (f / "model_index.json").write_text('{"_class_name": "DiTPipeline"}'),
            "is a DiTPipeline, not a SiTPipeline",
        ),
        ("cut", lambda f: (f / "model_index.json").write_text("{"), "incomplete or damaged"),
        (
            "empty",
            lambda f: (f / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b""),
            "incomplete or damaged",
        ),
        ("no vae", lambda f: shutil.rmtree(f / "vae"), "no VAE could be loaded from .*no vae/vae"),
    ]:
        copy = shutil.copytree(tmp_path / "pipe", tmp_path / name)
        break_it(copy)
        with pytest.raises(ValueError, match=message) as error:
            load_weights(str(copy))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="vae is of class AutoencoderKL: give a folder with a SiT"):
        load_weights(str(tmp_path / "pipe" / "vae"))
    with pytest.raises(ValueError, match="is a file of exported weights: give its folder"):
        load_weights(str(tmp_path / "pipe" / "transformer" / "diffusion_pytorch_model.safetensors"))


# ------------------------------------------------------------------------------------------- where the VAE is now


def test_a_vae_that_has_moved_is_given_by_option(vae, make_vae, tmp_path):
    shutil.copytree(vae, tmp_path / "first")
    with working_folder(tmp_path):
        weights = weights_of(VAECodec("first"))
    export_weights(weights, tmp_path / "ours")
    (tmp_path / "first").rename(tmp_path / "second")
    with working_folder(tmp_path):
        moved = load_weights("ours", vae="second")
    assert moved.recipe == dataclasses.replace(
        weights.recipe, codec=weights.recipe.codec | {"source": str(tmp_path / "second")}
    )
    with pytest.raises(
        ValueError, match=rf"from '{tmp_path}/first' \(there is no folder .*Pass its current folder with --vae"
    ):
        export_pipeline(weights, tmp_path / "pipe")
    export_pipeline(moved, tmp_path / "pipe")
    other = str(make_vae(1))
    with pytest.raises(ValueError, match=rf"{tmp_path}/ours .* codec than {other} \(weights \w+ -> \w+\)"):
        load_weights(str(tmp_path / "ours"), vae=other)
    with pytest.raises(ValueError, match=r"with another codec than identity \(kind autoencoder_kl -> id"):
        load_weights(str(tmp_path / "ours"), vae="identity")
    with pytest.raises(ValueError, match="--vae /gone: there is no folder /gone"):
        locate_weights(str(tmp_path / "ours"), vae="/gone")
    export_weights(weights_of(IdentityCodec(3)), tmp_path / "pixels")
    with pytest.raises(ValueError, match=r"with another codec than .* \(kind identity -> autoencoder_kl"):
        load_weights(str(tmp_path / "pixels"), vae=other)


# ------------------------------------------------------------------------------------- a model without a recipe


def test_a_folder_of_save_pretrained_has_notes_on_what_is_assumed(tmp_path):
    model = randomised()
    model.save_pretrained(tmp_path / "bare")
    weights = load_weights(str(tmp_path / "bare"), vae="identity")
    assert weights.notes == (
        f"{tmp_path}/bare does not name its classes: refer to them by number",
        f"{tmp_path}/bare does not say how it was trained: assuming --path linear, --prediction velocity; to "
        "change this, use these options of python -m sit_atconv.convert",
    )
    assert weights.recipe.average is None and weights.home == tmp_path / "bare" and len(weights.identity()) == 64
    assert weights.recipe.null_label_trained is None
    given = load_published(
        tmp_path / "bare", vae="identity", interpolant="gvp", prediction="score", class_names=NAMES, num_classes=10
    )
    assert (given.recipe.interpolant, given.recipe.prediction, given.recipe.class_names) == ("gvp", "score", NAMES)
    assert not given.notes
    with pytest.raises(ValueError, match=r"config\.json in .*bare has 10 classes, which contradicts --num-classes 9"):
        load_published(tmp_path / "bare", vae="identity", num_classes=9)
    (tmp_path / "bare" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="incomplete or damaged"):
        load_weights(str(tmp_path / "bare"), vae="identity")
