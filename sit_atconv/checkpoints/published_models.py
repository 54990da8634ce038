"""Models made of files that others publish, or of folders without a recipe, and such files made of our models."""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sit_atconv.checkpoints.class_names import changed_names
from sit_atconv.checkpoints.exported import Weights, load_model
from sit_atconv.checkpoints.published import REPA_OPTIONS, Published, read_published, to_repa
from sit_atconv.checkpoints.recipe import Recipe
from sit_atconv.checkpoints.tensors import LABELS, POSITIONS, fitting_preset, list_differences, shown_options
from sit_atconv.data import DEFAULT_VAE
from sit_atconv.data.codecs import open_codec, typed_codec
from sit_atconv.models.mixers import MIXERS, mixer_names
from sit_atconv.models.presets import PRESETS, preset_config
from sit_atconv.models.sit import SiT
from sit_atconv.runtime.files import check_room, write_aside

EMA_DECAY = 0.9999  # of SiT, REPA and ATConv's ports of both; no file of theirs says it
VAES = {"ema": DEFAULT_VAE, "mse": "stabilityai/sd-vae-ft-mse"}  # SiT's and DiT's names of them


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
    """Makes a model, in float32, of a file that `read_published` reads, or of a folder without a recipe.

    Args:
        path: of the file, or of the folder of `SiT.save_pretrained`, which says all of its model and nothing of its
            training.
        preset: gives depth, width, heads, patch and mixers. None: that of the file's training arguments, but for the
            mixers, which the tensors show better than the names of REPA's port of ATConv.
        vae: of the latents, by hub id or folder, or "identity" for models of pixels. None: that of the file's training
            arguments, or sd-vae-ft-ema.
        ema: of a training file, the EMA weights where there are any, or those as trained.
        interpolant: None: that of the file's training arguments, or "linear".
        prediction: None: that of the file's training arguments, or "velocity".
        class_names: of labels 0, 1, ...; None: those of the file's training arguments, or their numbers.
        num_classes: None: that of the file's training arguments; without any, all labels but the last, which is the
            null label, or the only one.

    Returns:
        The weights; what had to be assumed is in their notes.

    Raises:
        ValueError: the file cannot be read, its model is unknown or another, or something given contradicts it.
    """
    if path.is_dir():
        published, model = Published({}, None, repa=False), load_model(path)
        options = model.config
        if num_classes not in (None, options["num_classes"]):
            raise ValueError(f"{path} knows {options['num_classes']} classes by its config.json, which --num-classes "
                             f"{num_classes} contradicts: leave it out")
    else:
        published = read_published(path, ema)
        tensors = _finite(path, published.tensors)
        options = _file_options(path, tensors, published, preset, num_classes)
    args = published.args
    if not ema and _ema_decay(args) is not None and "ema_known" in args:
        raise ValueError(f"{path} holds the EMA weights of decay {_ema_decay(args)} alone: leave --no-ema out")
    form = FORMS["repa" if published.repa else "sit"]
    names, notes = _names(path, args, class_names, options["num_classes"])
    assumed = {}
    if interpolant is None and (interpolant := _said(path, form.paths, args, "path_type", "--path")) is None:
        interpolant = "linear"
        assumed["--path"] = "linear path"
    if prediction is None and (prediction := _said(path, form.predictions, args, "prediction", "--prediction")) is None:
        prediction = "velocity"
        assumed["--prediction"] = "velocity prediction"
    codec_there = _said_codec(args)
    if vae is None and not codec_there and (vae := VAES.get(str(args.get("vae")))) is None:
        vae = DEFAULT_VAE
        assumed["--vae"] = f"VAE {vae}"
    if assumed:
        notes.append(f"{path} does not say how it was trained: taken as {', '.join(assumed.values())}; say otherwise "
                     f"with python -m sit_atconv.convert {', '.join(assumed)}")

    codec = open_codec(
        typed_codec(vae, options["in_channels"]) if vae else codec_there, f"{path} was trained",
        remedy="Give the VAE it was trained with by --vae, a folder or a hub id that is cached")
    codec.check(codec_there, f"{path} was trained")
    if codec.channels != options["in_channels"]:
        raise ValueError(f"{path} takes {options['in_channels']} channels, and the VAE {codec.name} gives "
                         f"{codec.channels}: give the --vae it was trained with")
    if path.is_file():
        if "input_size" not in options and isinstance(args.get("image_size"), int):
            options["input_size"] = codec.latent_size(args["image_size"])
        with torch.device("meta"):
            model = SiT(**options)
        model.load_state_dict(tensors, assign=True)
    recipe = Recipe(
        interpolant,
        prediction,
        codec.describe(),
        names,
        step=args["step"] if isinstance(args.get("step"), int) else 0,  # SiT's and REPA's files do not say it
        ema_decay=_ema_decay(args) if published.ema else None,
        null_label_trained=null_label_trained(options["has_null_label"], args) if path.is_file() else None,
        empty_classes=[label for label in args.get("empty_classes") or [] if label in range(len(names))],
        ema_known=args.get("ema_known", published.ema is not None),
    )
    return Weights(model.eval().requires_grad_(False), recipe, path, tuple(notes))


def null_label_trained(has_null_label: bool, args: dict) -> bool:
    """Whether a published file's null label was trained: SiT and REPA have its row only where labels are dropped."""
    return has_null_label and args.get("class_dropout_prob", args.get("cfg_prob")) != 0


def _ema_decay(args: dict) -> float | None:
    """None where our own file says that what it calls "ema" is not averaged."""
    decay = args.get("ema_decay", EMA_DECAY)
    return decay if decay is None or isinstance(decay, float) else EMA_DECAY


def _said_codec(args: dict) -> dict:
    """What `Codec.describe()` returned, in files that `save_published` wrote; {} in others."""
    try:
        return dict(json.loads(args["codec"]))
    except (KeyError, TypeError, ValueError):
        return {}


def said_names(args: dict, num_classes: int) -> list[str] | None:
    """The class names in a file's training arguments, where there is one for each class."""
    names = args.get("class_names")
    is_whole = isinstance(names, list | tuple) and len(names) == num_classes
    return list(names) if is_whole and all(isinstance(name, str) for name in names) else None


def said_flow(path: Path, published: Published) -> dict[str, str]:
    """Interpolant and prediction by our names, as far as a file's training arguments have them."""
    form = FORMS["repa" if published.repa else "sit"]
    said = {"interpolant": _said(path, form.paths, published.args, "path_type", "--path"),
            "prediction": _said(path, form.predictions, published.args, "prediction", "--prediction")}
    return {name: value for name, value in said.items() if value is not None}


def _names(path: Path, args: dict, given: list[str] | None, num_classes: int) -> tuple[list[str], list[str]]:
    """The names of labels 0, 1, ..., and what is to be said of them."""
    theirs = said_names(args, num_classes)
    if given is None:
        names = theirs or [str(label) for label in range(num_classes)]
        return names, [] if theirs else [f"{path} does not name its classes: refer to them by number"]
    if len(given) != num_classes:
        raise ValueError(f"{path} knows {num_classes} classes, and {len(given)} names are given")
    changed = changed_names(theirs or given, given)
    return given, [f"the names given are not those of {path}: {changed}"] if changed else []


def _finite(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """In float32."""
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{path} holds numbers that are not finite, in {broken[0]} first: its training had failed")
    return tensors


def _file_options(
    path: Path, tensors: dict[str, Tensor], published: Published, preset: str | None, num_classes: int | None
) -> dict:
    """The options of the model that a file's tensors are of; `input_size` only where the tensors show it."""
    try:
        shown = shown_options(tensors)
    except ValueError as error:
        raise ValueError(f"{path} holds {error}") from error
    options = {
        **shown,
        **_preset_options(path, preset, published, shown),
        **_classes(path, len(tensors[LABELS]), published.args, num_classes),
        "kernel_act": FORMS["repa" if published.repa else "sit"].kernel_act,
    }
    if POSITIONS in tensors:
        options["input_size"] = math.isqrt(tensors[POSITIONS].shape[1]) * options["patch_size"]
    _check_same(path, tensors, options, shown)
    return options


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


def _said(path: Path, names: dict[str, str], args: dict, name: str, option: str) -> str | None:
    """Our name of what the training arguments call it, in whatever case; None where they do not say it."""
    if (theirs := args.get(name)) is None:
        return None
    known = {name.lower(): ours for name, ours in names.items()} | {ours: ours for ours in names.values()}
    if str(theirs).lower() not in known:
        raise ValueError(f"{path} was trained with {theirs!r}, which is none of {', '.join(names)}: let python -m "
                         f"sit_atconv.convert {option} say what it is")
    return known[str(theirs).lower()]


# -------------------------------------------------------------------------------------------------------- saving

def save_published(weights: Weights, path: Path, form: str) -> str:
    """Writes a file that SiT's or REPA's code, or `load_published`, reads: "model" and "ema" (the same), and "args".

    The VAE is not in it, but where it is and its digest are, as all else that the recipe holds.

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
    silent = {option for name in mixer_names(config.mixer, config.depth) for option in MIXERS.find(name).silent}
    heads = {"num_heads": config.num_heads} if "num_heads" in silent else {}
    preset = fitting_preset(shown | heads)
    if not preset:
        raise ValueError(f"{theirs.owner}'s form names a preset, and none has {_spoken(shown)}"
                         + (f" with {config.num_heads} heads" if heads else ""))
    wanted = {"learn_sigma": False} if not theirs.learn_sigma else {}
    published = {"kernel_act": theirs.kernel_act, "kernel_pool": "raster"}
    wanted |= {name: value for name, value in published.items() if name in silent}
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
        class_names=list(recipe.class_names),
        step=recipe.step,
        ema_decay=recipe.ema_decay,
        ema_known=recipe.ema_known,
        empty_classes=list(recipe.empty_classes),
        codec=json.dumps(recipe.codec),
        **({"class_dropout_prob": 0.0} if recipe.null_label_trained is False else {}),
    )
    if form == "repa":
        tensors = to_repa(tensors, (config.input_size // config.patch_size) ** 2)
    check_room(path, sum(tensor.nbytes for tensor in tensors.values()))
    write_aside(path, lambda partial: torch.save({"model": tensors, "ema": tensors, "args": args}, partial))
    return preset
