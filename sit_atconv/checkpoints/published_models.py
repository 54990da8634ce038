"""Models from published files or from folders without a recipe, and published files from our models."""

import argparse
import json
import math
from collections.abc import Iterable
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

EMA_DECAY = 0.9999  # of SiT, REPA and ATConv's ports of both; their files do not record it
VAES = {"ema": DEFAULT_VAE, "mse": "stabilityai/sd-vae-ft-mse"}  # SiT's and DiT's names
FLOW = {
    "interpolant": ("path_type", "--path", "linear"),  # training argument, our option, default
    "prediction": ("prediction", "--prediction", "velocity"),
}


@dataclass(frozen=True)
class Form:
    """Settings that the training code behind a published form supports.

    Args:
        owner: name of the project, for messages.
        names: "interpolant" and "prediction" -> its names -> ours.
        kernel_act: ATConv's activation.
        learn_sigma: True if its models can have it.
    """

    owner: str
    names: dict[str, dict[str, str]]
    kernel_act: str = "gelu_tanh"
    learn_sigma: bool = True


FORMS = {
    "sit": Form(
        "SiT",
        {
            "interpolant": {"Linear": "linear", "GVP": "gvp", "VP": "vp"},
            "prediction": {"velocity": "velocity", "noise": "noise", "score": "score"},
        },
    ),
    "repa": Form(
        "REPA",
        {"interpolant": {"linear": "linear", "cosine": "gvp"}, "prediction": {"v": "velocity"}},
        **REPA_OPTIONS,
        learn_sigma=False,
    ),
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
    """Loads a model in float32 from a file that `read_published` reads or a folder without a recipe.

    An option that is None comes from the file's training arguments. The defaults below apply if these lack it too.

    Args:
        path: the file, or a folder of `SiT.save_pretrained`, which records the model but not its training.
        preset: preset with depth, width, heads, patch and mixers; there is no default. (Mixers are never taken from
            the training arguments: in REPA's port of ATConv they are wrong, and the tensors show them.)
        vae: hub id or folder of the VAE, or "identity" for models of pixels (default: sd-vae-ft-ema).
        ema: True takes the EMA weights of a training file if it has any, False those as trained.
        interpolant: "linear", "gvp" or "vp" (default: "linear").
        prediction: "velocity", "noise", "score" or "data" (default: "velocity").
        class_names: names of labels 0, 1, ... (default: their numbers).
        num_classes: number of classes (default: all labels but the last, which is the null label, or the only one).

    Returns:
        The weights; their notes list what had to be assumed.

    Raises:
        ValueError: the file cannot be read, its model is not known, or an option contradicts it.
    """
    if path.is_dir():
        published, model = Published({}, None, repa=False), load_model(path)
        options = model.config
        if num_classes not in (None, options["num_classes"]):
            raise ValueError(
                f"config.json in {path} has {options['num_classes']} classes, which contradicts "
                f"--num-classes {num_classes}: leave that out"
            )
    else:
        published = read_published(path, ema)
        tensors = {name: tensor.float() for name, tensor in published.tensors.items()}
        if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{path} holds numbers that are not finite, first in {broken[0]}: its training has failed")
        options = _file_options(path, tensors, published, preset, num_classes)
    args = published.args
    if not ema and _ema_decay(args) is not None and "ema_known" in args:
        raise ValueError(f"{path} holds only EMA weights, of decay {_ema_decay(args)}: leave out --no-ema")

    # Find the settings of the training.
    names, notes = _names(path, args, class_names, options["num_classes"])
    given = {name: value for name, value in (("interpolant", interpolant), ("prediction", prediction)) if value}
    known = said_flow(path, published, FLOW.keys() - given.keys()) | given
    assumed = [f"{option} {default}" for name, (_, option, default) in FLOW.items() if name not in known]
    codec_there = _said_codec(args)
    if vae is None and not codec_there and (vae := VAES.get(str(args.get("vae")))) is None:
        vae = DEFAULT_VAE
        assumed.append(f"--vae {vae}")
    if assumed:
        notes.append(
            f"{path} does not say how it was trained: assuming {', '.join(assumed)}; to change this, use "
            "these options of python -m sit_atconv.convert"
        )

    # Open the codec.
    codec = open_codec(
        typed_codec(vae, options["in_channels"]) if vae else codec_there,
        f"{path} was trained",
        remedy="Give the VAE it was trained with by --vae, a folder or a hub id that is cached",
    )
    codec.check(codec_there, f"{path} was trained")
    if codec.channels != options["in_channels"]:
        raise ValueError(
            f"{path} takes {options['in_channels']} channels, but the VAE {codec.name} gives "
            f"{codec.channels}: give the --vae it was trained with"
        )

    # Build the model.
    if path.is_file():
        if "input_size" not in options and isinstance(args.get("image_size"), int):
            options["input_size"] = codec.latent_size(args["image_size"])
        with torch.device("meta"):
            model = SiT(**options)
        model.load_state_dict(tensors, assign=True)
    recipe = Recipe(
        known.get("interpolant", "linear"),
        known.get("prediction", "velocity"),
        codec.describe(),
        names,
        step=args["step"] if isinstance(args.get("step"), int) else 0,  # SiT's and REPA's files do not record it
        ema_decay=_ema_decay(args) if published.ema else None,
        null_label_trained=null_label_trained(options["has_null_label"], args) if path.is_file() else None,
        empty_classes=[label for label in args.get("empty_classes") or [] if label in range(len(names))],
        ema_known=args.get("ema_known", published.ema is not None),
    )
    return Weights(model.eval().requires_grad_(False), recipe, path, tuple(notes))


def null_label_trained(has_null_label: bool, args: dict) -> bool:
    """True if a published file's null label was trained: SiT and REPA have one only if labels are dropped."""
    return has_null_label and args.get("class_dropout_prob", args.get("cfg_prob")) != 0


def _ema_decay(args: dict) -> float | None:
    """Returns the EMA decay of a file; None if a file of ours says that its weights are not averaged."""
    decay = args.get("ema_decay", EMA_DECAY)
    return decay if decay is None or isinstance(decay, float) else EMA_DECAY


def _said_codec(args: dict) -> dict:
    """Returns the description of the codec in a file that `save_published` wrote; {} for other files."""
    try:
        return dict(json.loads(args["codec"]))
    except (KeyError, TypeError, ValueError):
        return {}


def said_names(args: dict, num_classes: int) -> list[str] | None:
    """Returns the class names in a file's training arguments if there is one for each class, else None."""
    names = args.get("class_names")
    if isinstance(names, list | tuple) and len(names) == num_classes and all(isinstance(name, str) for name in names):
        return list(names)
    return None


def said_flow(path: Path, published: Published, wanted: Iterable[str] = tuple(FLOW)) -> dict[str, str]:
    """Returns our names of interpolant and prediction, as far as a file's training arguments have them.

    Raises:
        ValueError: the file has a value that is not known here.
    """
    flow, form = {}, FORMS["repa" if published.repa else "sit"]
    for name in wanted:
        argument, option, _ = FLOW[name]
        if (theirs := published.args.get(argument)) is None:
            continue
        names = form.names[name]
        known = {their.lower(): our for their, our in names.items()} | {our: our for our in names.values()}
        if str(theirs).lower() not in known:
            raise ValueError(
                f"{path} was trained with {argument} {theirs!r}, which is none of {', '.join(names)}: use "
                f"python -m sit_atconv.convert with {option}"
            )
        flow[name] = known[str(theirs).lower()]
    return flow


def _names(path: Path, args: dict, given: list[str] | None, num_classes: int) -> tuple[list[str], list[str]]:
    """Returns the names of labels 0, 1, ..., and notes on them."""
    theirs = said_names(args, num_classes)
    if given is None:
        names = theirs or [str(label) for label in range(num_classes)]
        return names, [] if theirs else [f"{path} does not name its classes: refer to them by number"]
    if len(given) != num_classes:
        raise ValueError(f"{path} has {num_classes} classes, but {len(given)} names are given")
    changed = changed_names(theirs or given, given)
    return given, [f"the given class names are not those of {path}: {changed}"] if changed else []


def _file_options(
    path: Path, tensors: dict[str, Tensor], published: Published, preset: str | None, num_classes: int | None
) -> dict:
    """Returns the options of a file's model; `input_size` only if the tensors show it."""
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
    with torch.device("meta"):
        expected = SiT(**options).state_dict()
    if wrong := list_differences(tensors, expected):
        fitting = fitting_preset(shown)
        same = all(options[key] == shown[key] for key in ("depth", "hidden_size", "patch_size", "mixer"))
        remedy = "give a file with all weights" if same else f"give --model {fitting}" if fitting else "no preset fits"
        raise ValueError(f"the weights of {path} are of another model: {wrong}. They have {_spoken(shown)}: {remedy}")
    return options


def _preset_options(path: Path, preset: str | None, published: Published, shown: dict) -> dict:
    """Returns depth, width, heads, patch and mixers, from the preset or the file."""
    if preset is not None:
        return preset_config(preset)
    named = str(published.args.get("model"))
    if named in PRESETS:
        return {**preset_config(named), "mixer": shown["mixer"]}
    fitting = fitting_preset(shown)
    remedy = f": give --model {fitting}, which fits" if fitting else f", and no preset has their {_spoken(shown)}"
    raise ValueError(f"{path} does not say which preset its weights are of{remedy}")


def _classes(path: Path, num_rows: int, args: dict, given: int | None) -> dict:
    """Returns the number of classes and whether the label table has one more row, for the null label."""
    num_classes = next(n for n in (given, args.get("num_classes"), max(1, num_rows - 1)) if n is not None)
    if type(num_classes) is not int:
        raise ValueError(
            f"{path} was trained with num_classes {num_classes!r}, which is not a whole number: use "
            "python -m sit_atconv.convert with --num-classes"
        )
    if num_rows - num_classes not in (0, 1):
        raise ValueError(
            f"{path} has a table of {num_rows} labels, which does not fit {num_classes} classes with or "
            "without a null label: use python -m sit_atconv.convert with --num-classes"
        )
    return {"num_classes": num_classes, "has_null_label": num_rows > num_classes}


def _spoken(shown: dict) -> str:
    return (
        f"depth {shown['depth']}, width {shown['hidden_size']}, patch {shown['patch_size']} and mixers {shown['mixer']}"
    )


# -------------------------------------------------------------------------------------------------------- saving


def save_published(weights: Weights, path: Path, form: str) -> str:
    """Writes a file that SiT's or REPA's code and `load_published` can read.

    Its keys are "model", "ema" (the same weights) and "args". These hold the whole recipe, but of the VAE only its path
    and checksum.

    Args:
        weights: returned by `load_weights`.
        path: the file to write.
        form: "sit" or "repa".

    Returns:
        The preset that the file names.

    Raises:
        ValueError: the form cannot express the model or its recipe, so that a reader would compute something else.
        OSError: the file cannot be written.
    """
    theirs, config, recipe, tensors = FORMS[form], weights.model.config, weights.recipe, weights.model.state_dict()
    shown = shown_options(tensors)
    silent = {option for name in mixer_names(config.mixer, config.depth) for option in MIXERS.find(name).silent}
    heads = {"num_heads": config.num_heads} if "num_heads" in silent else {}
    preset = fitting_preset(shown | heads)
    if not preset:
        raise ValueError(
            f"{theirs.owner}'s form names a preset, but none has {_spoken(shown)}"
            + (f" with {config.num_heads} heads" if heads else "")
        )
    required: dict[str, object] = {
        "kernel_act": theirs.kernel_act,
        "kernel_pool": "raster",
        "kernel_inhibition": "learned",
        "kernels": "dynamic",
    }
    required = {name: value for name, value in required.items() if name in silent | shown.keys()}
    required |= {"two_times": False} if theirs.learn_sigma else {"two_times": False, "learn_sigma": False}
    for name, value in required.items():
        if config[name] != value:
            raise ValueError(f"{theirs.owner}'s form needs {name} {value}, but this model has {config[name]}")
    named = {}
    for name, (argument, *_) in FLOW.items():
        ours = getattr(recipe, name)
        if ours not in theirs.names[name].values():
            raise ValueError(f"{theirs.owner}'s form has no {name} {ours}")
        named[argument] = next(their for their, our in theirs.names[name].items() if our == ours)
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
