"""Models from published files, files from our models, and errors that name the remedy."""

import argparse
import dataclasses
import itertools
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from sit_atconv.checkpoints.published_models import load_published, save_published
from sit_atconv.checkpoints.weights import load_weights
from sit_atconv.models.presets import preset_config
from sit_atconv.models.sit import SiT
from sit_atconv.runtime.files import sha256_of
from sit_atconv.sampling import sample_ode
from tests.checkpoints.test_published import CONVOLUTIONS
from tests.conftest import relative_error
from tests.models.test_sit import randomised

PRESETS = {"attention": "SiT-Tiny/2", "atconv": "SiT-ATConv-Tiny/2", "hybrid": "SiT-ATConv-Tiny/2-Hybrid"}
BATCH = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.3, 1.0]), torch.tensor([0, 0, 0])


def small(mixer, **options):
    return randomised(**{**preset_config(PRESETS[mixer]), **options})


def repa_model(mixer, **options):
    """Returns a network as REPA trains it: t = 1 is noise, and its output is noise - data."""
    return small(mixer, **{"learn_sigma": False, "use_pos_embed": True, "kernel_act": "silu", **options})


def published(net, path, form="sit", **args):
    """Writes a training file in the format of SiT or REPA for a network with their convention."""
    tensors = {**net.state_dict()}
    if form == "repa":
        for name in tensors:
            block, _, part = name.rpartition(".attn.")
            if part in CONVOLUTIONS and f"{block}.attn.kernel_gen.weight" in tensors:
                tensors[name] = tensors[name][:, :, None, None]
        tensors["projectors.0.0.weight"] = torch.ones(7, 128)
    others = {f"module.{name}": tensor + 1 for name, tensor in tensors.items()}
    torch.save(
        {
            "model": others,
            "ema": {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()},
            "opt": {"state": {}},
            "args": argparse.Namespace(**args),
        },
        path,
    )
    return path


def load(path, *args, **kwargs):
    return load_published(path, *args, vae="identity", **kwargs)


def assert_same_function(loaded, theirs, form, batch=BATCH):
    x, t, y = batch
    expected = theirs(x, t, y) if form == "sit" else -theirs(x, 1 - t, y)
    assert relative_error(loaded(x, t, y), expected) < 1e-5


@pytest.mark.parametrize(
    ("form", "mixer", "options"),
    [
        *(("sit", mixer, dict(learn_sigma=sigma)) for mixer, sigma in itertools.product(PRESETS, (True, False))),
        *(("repa", mixer, {}) for mixer in PRESETS),
        ("sit", "atconv", dict(num_classes=1, has_null_label=False)),
        ("repa", "atconv", dict(num_classes=1, has_null_label=False)),
        ("sit", "atconv", dict(use_pos_embed=True, input_size=16)),
        ("sit", "attention", dict(qk_norm=True, mlp_ratio=2.0)),
        ("sit", "atconv", dict(kernel_size=5, in_channels=3)),
    ],
)
def test_every_published_form_gives_the_same_output(tmp_path, form, mixer, options):
    theirs = (small if form == "sit" else repa_model)(mixer, **options)
    path = published(theirs, tmp_path / "a.pt", form)
    loaded = load(path, PRESETS[mixer])
    shape = (3, theirs.config.in_channels, 8, 8)
    assert_same_function(loaded.model, theirs, form, (torch.randn(shape), *BATCH[1:]))
    for name in ("num_classes", "has_null_label", "learn_sigma", "kernel_size", "kernel_act", "mlp_ratio", "num_heads"):
        assert loaded.model.config[name] == theirs.config[name], name
    if theirs.pos_embed is not None:
        assert loaded.model.config.input_size == theirs.config.input_size
    recipe = loaded.recipe
    assert (recipe.interpolant, recipe.prediction, recipe.ema_decay) == ("linear", "velocity", 0.9999)
    assert recipe.class_names == [str(i) for i in range(theirs.config.num_classes)]
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize("mixer", PRESETS)
def test_trajectories_equal_those_of_repas_sampler(tmp_path, mixer):
    """REPA's sampler goes from t = 1, noise, to t = 0, data, with the network as trained."""
    theirs = repa_model(mixer)
    ours = load(published(theirs, tmp_path / "a.pt", "repa"), PRESETS[mixer]).model
    noise, _, y = BATCH
    x, expected, steps = noise, [], 8
    for i in range(steps):
        expected.append(x)
        x = x - theirs(x, torch.full((3,), 1 - i / steps), y) / steps
    trajectory = []

    def velocity(x, t):
        trajectory.append(x)
        return ours(x, t.float().expand(3), y)

    end = sample_ode(velocity, noise, num_steps=steps)
    assert relative_error(end, noise) > 0.01
    for a, b in zip([*trajectory, end], [*expected, x], strict=True):
        assert (a - b).abs().max() < 1e-4


def test_settings_come_from_the_training_arguments_or_from_options(tmp_path, vae):
    args = dict(model="SiT-ATConv-Tiny/2", num_classes=11, image_size=32, path_type="GVP", prediction="noise")
    path = published(small("atconv"), tmp_path / "a.pt", **args)
    weights = load_published(path, vae=str(vae))
    config, recipe = weights.model.config, weights.recipe
    assert (config.num_classes, config.has_null_label, config.input_size) == (11, False, 16)  # the VAE halves sides
    assert (recipe.interpolant, recipe.prediction) == ("gvp", "noise")
    assert recipe.codec["source"] == str(vae) and recipe.codec["scale"] == 0.5 and "weights" in recipe.codec
    names = [f"class {i}" for i in range(10)]
    given = load(path, num_classes=10, class_names=names, interpolant="vp", prediction="score")
    assert given.model.null_label == 10 and given.recipe.class_names == names
    assert (given.recipe.interpolant, given.recipe.prediction) == ("vp", "score")


@pytest.mark.parametrize("mixer", PRESETS)
def test_mixers_come_from_the_tensors_even_if_the_preset_is_wrong(tmp_path, mixer):
    """REPA's port has presets named ATConv whose blocks are attention."""
    path = published(repa_model(mixer), tmp_path / "a.pt", "repa", model="SiT-ATConv-Tiny/2", prediction="v")
    assert load(path).model.config.mixer == mixer


def test_weights_as_trained_and_half_precision_weights_are_loaded(tmp_path):
    theirs = small("atconv").bfloat16()
    path = published(theirs, tmp_path / "a.pt", model="SiT-ATConv-Tiny/2")
    averaged, trained = (load(path, ema=ema) for ema in (True, False))
    assert averaged.model.dtype is torch.float32
    assert_same_function(averaged.model, theirs.float(), "sit")
    bias = [weights.model.final_layer.linear.bias for weights in (averaged, trained)]
    assert (bias[1] - bias[0]).mean() > 0.9 and trained.recipe.ema_decay is None
    torch.save({"ema": theirs.state_dict()}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="holds only EMA weights: leave out --no-ema"):
        load(tmp_path / "b.pt", ema=False)


def test_load_weights_takes_a_file(tmp_path, vae):
    path = published(small("attention"), tmp_path / "0400000.pt")
    weights = load_weights(str(path), model="SiT-Tiny/2", vae=str(vae))
    assert weights.home == tmp_path / "0400000" and weights.identity() == sha256_of(path)
    assert_same_function(weights.model, small("attention"), "sit")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda args: argparse.Namespace(**args),
        dict,
        lambda args: {"seed": 0, "model": args["model"], "transport": args, "data": argparse.Namespace(**args)},
    ],
)
def test_training_arguments_are_read_from_namespaces_dicts_and_groups(tmp_path, wrap):
    args = dict(
        model="SiT-ATConv-Tiny/2", num_classes=10, image_size=8, path_type="GVP", prediction="noise", cfg_prob=0
    )
    torch.save({"ema": small("atconv").state_dict(), "args": wrap(args)}, tmp_path / "a.pt")
    weights = load(tmp_path / "a.pt")
    assert (weights.recipe.interpolant, weights.recipe.prediction) == ("gvp", "noise")
    assert weights.model.config.input_size == 8 and weights.recipe.null_label_trained is False
    assert weights.null_label is None and not any("assuming" in note for note in weights.notes)


@pytest.mark.parametrize(
    "args",
    [
        argparse.Namespace(model="DiT-S/8", image_size=64),
        {"model": "dit-s/8"},
        {"model": {"name": "DiT-S/8"}},
        {"model": "models.DiT_S_8"},
        None,
    ],
)
def test_a_dit_is_refused(tmp_path, args):
    """Its tensors have the names and shapes of a SiT's; without arguments only the file's name tells."""
    tensors, path = small("attention").state_dict(), tmp_path / ("fast-DiT-S-8.pt" if args is None else "a.pt")
    torch.save({"ema": tensors} if args is None else {"ema": tensors, "args": args}, path)
    for read in (lambda: load(path, "SiT-Tiny/2", prediction="velocity"), lambda: load_weights(str(path))):
        with pytest.raises(ValueError, match="a DiT predicts noise and variance on the discrete steps of DDPM"):
            read()
    torch.save({"ema": tensors, "args": argparse.Namespace(model="SiT-Tiny/2")}, tmp_path / "DiT-as-a-flow.pt")
    assert load(tmp_path / "DiT-as-a-flow.pt").model.config.mixer == "attention"


def test_notes_say_what_is_assumed_of_a_bare_file(tmp_path):
    save_file(small("attention").state_dict(), tmp_path / "a.safetensors")
    weights = load(tmp_path / "a.safetensors", "SiT-Tiny/2", prediction="noise")
    names, flow = weights.notes
    assert names == f"{tmp_path}/a.safetensors does not name its classes: refer to them by number"
    assert flow == (
        f"{tmp_path}/a.safetensors does not say how it was trained: assuming --path linear; to "
        "change this, use these options of python -m sit_atconv.convert"
    )
    assert weights.recipe.average is None and weights.recipe.ema_decay is None
    assert weights.recipe.null_label_trained is True  # SiT has the row only where it is trained


def test_class_names_come_from_the_file_or_from_an_option(tmp_path):
    theirs = [f"class {i}" for i in range(10)]
    path = published(small("attention"), tmp_path / "a.pt", model="SiT-Tiny/2", class_names=theirs)
    assert load(path).recipe.class_names == theirs and len(load(path).notes) == 1
    given = load(path, class_names=theirs[::-1])
    assert given.recipe.class_names == theirs[::-1] and given.notes[0] == (
        f"the given class names are not those of {path}: label 0 is 'class 0' there, 'class 9' here (and 9 more)"
    )


# -------------------------------------------------------------------------------------------------------- the way back


@pytest.mark.parametrize(
    ("form", "mixer", "options"),
    [
        ("sit", "attention", {}),
        ("sit", "atconv", {}),
        ("sit", "hybrid", {}),
        ("sit", "atconv", dict(num_classes=1)),
        ("repa", "attention", {}),
        ("repa", "atconv", {}),
        ("repa", "hybrid", {}),
        ("repa", "atconv", dict(num_classes=1, has_null_label=False)),
    ],
)
def test_loading_and_saving_restores_the_file(tmp_path, form, mixer, options):
    theirs = (small if form == "sit" else repa_model)(mixer, **options)
    path = published(theirs, tmp_path / "a.pt", form, num_classes=theirs.config.num_classes, image_size=8)
    weights = load(path, PRESETS[mixer])
    assert save_published(weights, tmp_path / "b.pt", form) == PRESETS[mixer]

    with torch.serialization.safe_globals([argparse.Namespace]):
        first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pt", "b.pt"))
    first = {name.removeprefix("_orig_mod."): tensor for name, tensor in first["ema"].items()}
    first.pop("projectors.0.0.weight", None)
    assert first.keys() == second["ema"].keys() == second["model"].keys()
    for name, tensor in first.items():
        assert torch.allclose(second["ema"][name], tensor, rtol=3e-7, atol=1e-7), name
    again = load(tmp_path / "b.pt")  # which needs no preset
    assert {**again.model.config} == {**weights.model.config} and again.recipe == weights.recipe
    for name, tensor in weights.model.state_dict().items():
        assert torch.allclose(again.model.state_dict()[name], tensor, rtol=3e-7, atol=1e-7), name


@pytest.mark.parametrize(
    "recipe",
    [
        dict(class_names=[f"class {i}" for i in range(10)][::-1], null_label_trained=False, step=7, ema_decay=None),
        dict(empty_classes=[2, 3], ema_decay=0.99, interpolant="gvp"),
        dict(ema_decay=None, ema_known=False),
    ],
)
def test_saving_and_loading_restores_the_recipe(tmp_path, recipe):
    weights = load(published(small("attention"), tmp_path / "a.pt"), "SiT-Tiny/2")
    weights = dataclasses.replace(weights, recipe=dataclasses.replace(weights.recipe, **recipe))
    save_published(weights, tmp_path / "b.pt", "sit")
    again = load(tmp_path / "b.pt")
    assert again.recipe == weights.recipe and not again.notes


def test_repas_models_without_positions_get_a_table_of_zeros(tmp_path):
    """REPA's models always add a table; loaded again, ours must work without one at other resolutions."""
    model = repa_model("atconv", use_pos_embed=False)
    path = published(model, tmp_path / "a.pt", "repa", image_size=8)
    save_published(load(path, PRESETS["atconv"]), tmp_path / "b.pt", "repa")
    with torch.serialization.safe_globals([argparse.Namespace]):
        table = torch.load(tmp_path / "b.pt", weights_only=True)["ema"]["pos_embed"]
    assert table.shape == (1, 16, 128) and not table.any()
    again = load(tmp_path / "b.pt").model
    assert again.pos_embed is None and again.config.input_size == 8
    assert_same_function(again, model, "repa", (torch.randn(3, 4, 12, 20), *BATCH[1:]))


@pytest.mark.parametrize(
    ("form", "mixer", "options", "message"),
    [
        ("sit", "atconv", dict(kernel_act="silu"), "form needs kernel_act gelu_tanh, but this model has silu"),
        ("sit", "hybrid", dict(kernel_pool="grid"), "SiT's form needs kernel_pool raster"),
        ("sit", "atconv", dict(kernels="static"), "SiT's form needs kernels dynamic"),
        ("sit", "atconv", dict(kernel_inhibition="none"), "SiT's form needs kernel_inhibition learned"),
        ("repa", "atconv", dict(learn_sigma=False), "REPA's form needs kernel_act silu"),
        ("repa", "attention", dict(learn_sigma=True), "REPA's form needs learn_sigma False"),
        ("sit", "attention", dict(num_heads=2), "names a preset, but none has depth 4, width 128.* with 2 heads"),
        ("sit", "attention", dict(depth=3), "names a preset, but none has depth 3, width 128, patch 2"),
        ("sit", "attention", dict(prediction="data"), "SiT's form has no prediction data"),
        ("repa", "attention", dict(learn_sigma=False, interpolant="vp"), "REPA's form has no interpolant vp"),
    ],
)
def test_models_that_a_form_cannot_express_are_refused(tmp_path, form, mixer, options, message):
    recipe = {name: options.pop(name) for name in ("prediction", "interpolant") if name in options}
    weights = load(published(small("attention"), tmp_path / "a.pt"), PRESETS["attention"], **recipe)
    object.__setattr__(weights, "model", small(mixer, **options))
    with pytest.raises(ValueError, match=message):
        save_published(weights, tmp_path / "b.pt", form)
    assert not (tmp_path / "b.pt").exists()


# -------------------------------------------------------------------------------------------------------- errors


def one_line(path, *args, vae="identity", **kwargs) -> str:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        load_published(path, *args, vae=vae, **kwargs)
    message = str(error.value)
    assert message.replace(str(path), "").count(";") <= 3
    return message


def test_the_error_without_a_preset_names_the_one_that_fits(tmp_path):
    for mixer, preset in PRESETS.items():
        save_file(small(mixer).state_dict(), tmp_path / "a.safetensors")
        message = one_line(tmp_path / "a.safetensors")
        assert "does not say which preset" in message
        assert message.endswith(f"give --model {preset}, which fits")
    save_file(small("atconv", depth=3).state_dict(), tmp_path / "a.safetensors")
    assert "no preset has their depth 3, width 128, patch 2 and mixers atconv" in one_line(tmp_path / "a.safetensors")
    assert "there is no preset 'SiT-XXL/2'; similar names: " in one_line(tmp_path / "a.safetensors", "SiT-XXL/2")


@pytest.mark.parametrize(
    ("preset", "listed"),
    [
        ("SiT-ATConv-Tiny/2", r"blocks\.0\.attn\.difference_control missing there, \(128,\) here; .* and \d+ more"),
        ("SiT-Tiny/4", r"x_embedder\.proj\.weight \(128, 4, 2, 2\) there, \(128, 4, 4, 4\) here"),
        ("SiT-S/2", r"x_embedder\.proj\.weight \(128, 4, 2, 2\) there, \(384, 4, 2, 2\) here"),
    ],
)
def test_another_model_is_refused_and_the_right_one_named(tmp_path, preset, listed):
    path = published(small("attention"), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=listed + r".*: give --model SiT-Tiny/2$"):
        load(path, preset)


def test_missing_and_unexpected_tensors_are_listed(tmp_path):
    tensors = small("atconv").state_dict()
    tensors["extra.weight"] = tensors.pop("t_embedder.mlp.2.bias")
    save_file(tensors, tmp_path / "a.safetensors")
    message = one_line(tmp_path / "a.safetensors", "SiT-ATConv-Tiny/2")
    assert "t_embedder.mlp.2.bias missing there, (128,) here; extra.weight (128,) there, none here" in message
    assert message.endswith("give a file with all weights")


def test_other_errors_name_value_and_remedy(tmp_path, vae):
    path, preset = published(small("attention"), tmp_path / "a.pt"), "SiT-Tiny/2"
    for num_classes in (9, 12):
        assert f"a table of 11 labels, which does not fit {num_classes} classes" in one_line(
            path, preset, num_classes=num_classes
        )
    assert "has 10 classes, but 2 names are given" in one_line(path, preset, class_names=["a", "b"])
    three = published(small("attention", in_channels=3), tmp_path / "b.pt")
    assert f"takes 3 channels, but the VAE {vae} gives 4: give the --vae" in one_line(three, preset, vae=str(vae))
    assert f"no VAE could be loaded from '{tmp_path}'" in one_line(path, preset, vae=str(tmp_path))
    odd = published(small("attention"), tmp_path / "c.pt", path_type="spiral")
    assert "'spiral', which is none of Linear, GVP, VP: " in one_line(odd, preset)
    save_file({"conv_in.weight": torch.ones(3, 3)}, tmp_path / "d.safetensors")
    assert "not a SiT's: x_embedder.proj.weight is missing" in one_line(tmp_path / "d.safetensors", preset)
    (tmp_path / "e.pt").write_bytes(bytes(range(256)))
    assert "is not a checkpoint" in one_line(tmp_path / "e.pt", preset)


def test_options_of_files_and_of_runs_are_refused_for_the_other(tmp_path):
    from sit_atconv.checkpoints.exported import export_weights

    path = published(small("attention"), tmp_path / "a.pt")
    export_weights(load(path, "SiT-Tiny/2"), tmp_path / "ours")
    assert load_file(tmp_path / "ours" / "diffusion_pytorch_model.safetensors")
    assert load_weights(str(tmp_path / "ours")).recipe.ema_decay == 0.9999
    for ckpt, options, message in [
        ("ours", dict(model="SiT-Tiny/2"), r"--model SiT-Tiny/2 is for files .* config\.json"),
        ("ours", dict(vae="nowhere"), r"--vae nowhere: there is no folder nowhere"),
        ("ours", dict(ema=0.5), r"has no EMA of decay 0\.5: give one of 0\.9999"),
        ("ours/diffusion_pytorch_model.safetensors", {}, "is a file of exported weights: give its folder"),
        ("a.pt", dict(ema=0.5), r"without a choice of EMA decays: leave out --ema 0\.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_weights(str(tmp_path / ckpt), **options)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blocks.9999999999.x", torch.zeros(1), r"its 5 blocks are numbered up to 9999999999"),
        ("pos_embed", torch.zeros(()), "pos_embed is missing or of another shape"),
        ("x_embedder.proj.weight", torch.zeros(0, 4, 2, 2), r"x_embedder\.proj\.weight is missing or of another shape"),
        ("final_layer.linear.bias", torch.zeros(16, dtype=torch.int8), r"final_layer\.linear\.bias is torch\.int8"),
        ("final_layer.linear.bias", torch.zeros(16).to_sparse(), "weights must be dense floating-point numbers"),
        ("final_layer.linear.bias", torch.full((16,), math.nan), "numbers that are not finite, first in final_layer"),
        ("module.final_layer.linear.bias", torch.zeros(16), "two of its names are the same"),
    ],
)
def test_odd_tensors_are_named(tmp_path, name, tensor, message):
    weights = SiT.from_preset("SiT-ATConv-Tiny/2", num_classes=10, learn_sigma=False).state_dict()
    torch.save({"ema": {**weights, name: tensor}, "args": argparse.Namespace(num_classes=10)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        load_published(tmp_path / "a.pt", "SiT-ATConv-Tiny/2", vae="identity")


@pytest.mark.parametrize("num_classes", ["10", [1], 10.0, True])
def test_odd_numbers_of_classes_are_named(tmp_path, num_classes):
    weights = SiT.from_preset("SiT-ATConv-Tiny/2", num_classes=10).state_dict()
    torch.save({"ema": weights, "args": argparse.Namespace(num_classes=num_classes)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"which is not a whole number: use python .*convert with --num-classes"):
        load_published(tmp_path / "a.pt", "SiT-ATConv-Tiny/2", vae="identity")
