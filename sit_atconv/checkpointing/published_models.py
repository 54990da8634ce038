"""Models made of files that others publish, and such files made of our models."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sit_atconv.checkpointing.published import REPA_OPTIONS, Published, read_published, to_repa
from sit_atconv.checkpointing.tensors import LABELS, POSITIONS, fitting_preset, list_differences, shown_options
from sit_atconv.checkpointing.weights import Recipe, Weights
from sit_atconv.data import DEFAULT_VAE
from sit_atconv.data.codecs import IdentityCodec, VAECodec
from sit_atconv.files import check_room, write_aside
from sit_atconv.models.sit import PRESETS, SiT, preset_config

EMA_DECAY = 0.9999  # of SiT, REPA and ATConv's ports of both; no file says it


@dataclass(frozen=True)
class Form:
    """What the training code of a published form can express.

    Args:
        owner: whose form it is, for the user.
        kernel_act: ATConv's activation.
        paths: its names of the interpolants -> ours.
        predictions: its names of the predictions -> ours.
        learn_sigma: whether there is such a thing.
    """

    owner: str
    kernel_act: str
    paths: dict[str, str]
    predictions: dict[str, str]
    learn_sigma: bool


FORMS = {
    "sit": Form("SiT", "gelu_tanh", {"Linear": "linear", "GVP": "gvp", "VP": "vp"},
                {"velocity": "velocity", "noise": "noise", "score": "score"}, True),
    "repa": Form("REPA", REPA_OPTIONS["kernel_act"], {"linear": "linear", "cosine": "gvp"}, {"v": "velocity"}, False),
}


# ------------------------------------------------------------------------------------------------------- loading

def load_published(
    path: Path,
    preset: str | None = None,
    *,
    vae: str | None = None,
    ema: bool = True,
    interpolant: str | None = None,
    prediction: str | None = None,
    class_names: list[str] | None = None,
    num_classes: int | None = None,
) -> Weights:
    """Makes a model, in float32, of a file that `read_published` reads.

    Args:
        path: of the file.
        preset: gives depth, width, heads, patch and mixers. None: that of the file's training arguments, but for the
            mixers, which the tensors show better than the names of REPA's port of ATConv.
        vae: of the latents, by hub id or folder (None: sd-vae-ft-ema), or "identity" for models of pixels.
        ema: of a training file, the EMA weights where there are any, or those as trained.
        interpolant: None: that of the file's training arguments, or "linear".
        prediction: None: that of the file's training arguments, or "velocity".
        class_names: of labels 0, 1, ...; None: their numbers.
        num_classes: None: that of the file's training arguments; without any, all labels but the last, which is the
            null label, or the only one.

    Raises:
        ValueError: the file cannot be read, its model is unknown or another, or something given contradicts it.
    """
    published = read_published(path, ema)
    tensors = {name: tensor.float() for name, tensor in published.tensors.items()}
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{path} holds numbers that are not finite, in {broken[0]} first: its training had failed")
    try:
        shown = shown_options(tensors)
    except ValueError as error:
        raise ValueError(f"{path} holds {error}") from error
    form = FORMS["repa" if published.repa else "sit"]
    options = {
        **shown,
        **_preset_options(path, preset, published, shown),
        **_classes(path, len(tensors[LABELS]), published.args, num_classes),
        "kernel_act": form.kernel_act,
    }
    if POSITIONS in tensors:
        options["input_size"] = math.isqrt(tensors[POSITIONS].shape[1]) * options["patch_size"]
    _check_same(path, tensors, options, shown)
    names = [str(label) for label in range(options["num_classes"])] if class_names is None else class_names
    if len(names) != options["num_classes"]:
        raise ValueError(f"{path} knows {options['num_classes']} classes, and {len(names)} names are given")
    interpolant = interpolant or _ours(path, form.paths, published.args.get("path_type", "linear"), "--path")
    prediction = prediction or _ours(path, form.predictions, published.args.get("prediction", "velocity"),
                                     "--prediction")

    codec = IdentityCodec(options["in_channels"]) if vae == "identity" else VAECodec(vae or DEFAULT_VAE)
    if codec.channels != options["in_channels"]:
        raise ValueError(f"{path} takes {options['in_channels']} channels, and the VAE {codec.source} gives "
                         f"{codec.channels}: give the --vae it was trained with")
    if "input_size" not in options and isinstance(published.args.get("image_size"), int):
        options["input_size"] = codec.latent_size(published.args["image_size"])
    with torch.device("meta"):
        model = SiT(**options)
    model.load_state_dict(tensors, assign=True)
    decay = EMA_DECAY if published.ema else None
    recipe = Recipe(interpolant, prediction, codec.describe(), names, step=0, ema_decay=decay)  # the step is not said
    return Weights(model.eval().requires_grad_(False), recipe, path)


def _preset_options(path: Path, preset: str | None, published: Published, shown: dict) -> dict:
    """Depth, width, heads, patch and mixers."""
    if preset is not None:
        return preset_config(preset)
    named = str(published.args.get("model"))
    if named in PRESETS:
        return {**preset_config(named), "mixer": shown["mixer"]}
    fitting = fitting_preset(shown)
    if fitting:
        raise ValueError(f"{path} does not say which model its weights are of: give --model {fitting}, which has their "
                         "shapes")
    raise ValueError(f"{path} does not say which model its weights are of, and no --model has their {_spoken(shown)}")


def _classes(path: Path, num_rows: int, args: dict, given: int | None) -> dict:
    """How many of the label table's rows are classes; the one after them is the null label's."""
    num_classes = given if given is not None else args.get("num_classes")
    if num_classes is not None and type(num_classes) is not int:
        raise ValueError(f"{path} was trained with num_classes {num_classes!r}, which is no number: let python -m "
                         "sit_atconv.convert --num-classes say how many")
    if num_classes is None:
        num_classes = max(1, num_rows - 1)
    if num_rows - num_classes not in (0, 1):
        raise ValueError(f"{path} has a table of {num_rows} labels, which is not that of {num_classes} classes, with "
                         "or without a null label: let python -m sit_atconv.convert --num-classes say how many")
    return {"num_classes": num_classes, "has_null_label": num_rows > num_classes}


def _check_same(path: Path, tensors: dict[str, Tensor], options: dict, shown: dict) -> None:
    with torch.device("meta"):
        expected = SiT(**options).state_dict()
    if wrong := list_differences(tensors, expected):
        fitting = fitting_preset(shown)
        same = all(options[key] == shown[key] for key in ("depth", "hidden_size", "patch_size", "mixer"))
        remedy = "give a file of whole weights" if same else f"give --model {fitting}" if fitting else "no --model fits"
        raise ValueError(f"the weights of {path} are of another model: {wrong}. They have {_spoken(shown)}: {remedy}")


def _spoken(shown: dict) -> str:
    return (f"depth {shown['depth']}, width {shown['hidden_size']}, patch {shown['patch_size']} and mixers "
            f"{shown['mixer']}")


def _ours(path: Path, names: dict[str, str], theirs: object, option: str) -> str:
    """Our name of theirs, in whatever case."""
    known = {name.lower(): ours for name, ours in names.items()} | {ours: ours for ours in names.values()}
    if str(theirs).lower() not in known:
        raise ValueError(f"{path} was trained with {theirs!r}, which is none of {', '.join(names)}: let python -m "
                         f"sit_atconv.convert {option} say what it is")
    return known[str(theirs).lower()]


# -------------------------------------------------------------------------------------------------------- saving

def save_published(weights: Weights, path: Path, form: str) -> str:
    """Writes a file that SiT's or REPA's code, or `load_published`, reads: "model" and "ema" (the same), and "args".

    Args:
        weights: what `load_weights` returned.
        path: of the file.
        form: "sit" or "repa".

    Returns:
        The preset that the file names.

    Raises:
        ValueError: the form cannot hold the model or its recipe, so that who reads it would compute something else.
        OSError: the file cannot be written.
    """
    theirs, config, recipe, tensors = FORMS[form], weights.model.config, weights.recipe, weights.model.state_dict()
    shown = shown_options(tensors)
    heads = {} if shown["mixer"] == "atconv" else {"num_heads": config.num_heads}
    preset = fitting_preset(shown | heads)
    if not preset:
        raise ValueError(f"{theirs.owner}'s form names a preset, and none has {_spoken(shown)}"
                         + (f" with {config.num_heads} heads" if heads else ""))
    wanted = {"learn_sigma": False} if not theirs.learn_sigma else {}
    if shown["mixer"] != "attention":
        wanted |= {"kernel_act": theirs.kernel_act, "kernel_pool": "raster"}
    for name, value in wanted.items():
        if config[name] != value:
            raise ValueError(f"{theirs.owner}'s form has {name} {value} alone, and this model has {config[name]}")
    named = {}
    for name, names, ours in (("path_type", theirs.paths, recipe.interpolant),
                              ("prediction", theirs.predictions, recipe.prediction)):
        named[name] = next((key for key, value in names.items() if value == ours), None)
        if named[name] is None:
            raise ValueError(f"{theirs.owner}'s form has no {name} {ours}")
    args = argparse.Namespace(
        model=preset,
        num_classes=config.num_classes,
        image_size=config.input_size * recipe.codec["downsample"],
        **named,
    )
    if form == "repa":
        tensors = to_repa(tensors, (config.input_size // config.patch_size) ** 2)
    check_room(path, sum(tensor.nbytes for tensor in tensors.values()))
    write_aside(path, lambda partial: torch.save({"model": tensors, "ema": tensors, "args": args}, partial))
    return preset
