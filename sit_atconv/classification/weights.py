"""A classifier's weights: building a model, saving it in timm's form, loading initial weights.

config.json  model.safetensors        timm.create_model("local-dir:FOLDER", pretrained=True) loads them
"""

import difflib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import timm
import timm.models
import torch
import torch.nn as nn
from torch import Tensor

from sit_atconv import __version__
from sit_atconv.checkpoints.run_folder import newest_checkpoint
from sit_atconv.checkpoints.tensors import LABELS, PATCHES, list_differences
from sit_atconv.classification.config import Config
from sit_atconv.models.attnet import AttNet, checkpoint_filter_fn  # the import registers the models

WEIGHTS_FILE = "model.safetensors"


def versions() -> dict[str, str]:
    return {"sit_atconv": __version__, "torch": torch.__version__, "timm": timm.__version__}


@dataclass(frozen=True)
class ClassifierRecipe:
    """Settings that are saved with a classifier's weights.

    Args:
        class_names: names of labels 0, 1, ..., or None.
        step: optimizer steps that these weights were trained for.
        ema_decay: EMA decay of these weights; None for the weights as trained.
        versions: versions of the libraries that wrote the weights.
    """

    class_names: list[str] | None
    step: int
    ema_decay: float | None = None
    versions: dict[str, str] = field(default_factory=versions)


def build_model(config: Config, num_classes: int) -> nn.Module:
    """Builds the model with random weights; its `pretrained_cfg` holds the preprocessing of evaluation.

    Raises:
        ValueError: there is no such model, or it does not take the image size or the drop path rate.
    """
    name, data = config.model, config.data
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 3) or timm.list_models("attnet*")
        raise ValueError(f"there is no model {name}: give one that timm or AttNet has, such as {', '.join(close)}")
    usual = timm.models.get_pretrained_cfg(name)
    usual = usual.to_dict() if usual is not None else {"mean": [0.5] * 3, "std": [0.5] * 3}
    options = {"img_size": data.image_size} if usual.get("fixed_input_size") else {}
    try:
        return timm.create_model(
            name,
            num_classes=num_classes,
            in_chans=data.channels,
            drop_path_rate=config.drop_path_rate or None,
            pretrained_cfg_overlay={
                "input_size": (data.channels, data.image_size, data.image_size),
                "crop_pct": data.crop_ratio,
                "interpolation": data.interpolation,
                **data.normalisation(usual),
            },
            **options,
        )
    except (TypeError, RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the model {name} cannot be built with these options ({reason})") from error


def settings_of(net: nn.Module) -> dict[str, Any]:
    """Returns timm's record of the model: its architecture, preprocessing and names of layers."""
    return cast(dict, net.pretrained_cfg)


def normalisation_of(net: nn.Module) -> dict[str, list[float]]:
    """Returns mean and standard deviation by which the model's images are normalised."""
    return {name: list(settings_of(net)[name]) for name in ("mean", "std")}


def save_classifier(model: nn.Module, recipe: ClassifierRecipe, folder: Path) -> None:
    """Writes the model into a folder in timm's form."""
    names = {"label_names": recipe.class_names} if recipe.class_names else {}
    timm.models.save_for_hf(model, str(folder), model_config=names, safe_serialization=True)


def find_weights(origin: str) -> Path:
    """Returns the file that `--init-from` means: itself, a folder's, or the newest EMA of a run.

    Raises:
        ValueError: there is no such file.
    """
    path = Path(origin)
    checkpoint = newest_checkpoint(path)
    file = next(
        (
            place
            for place in (
                checkpoint and checkpoint / "ema" / WEIGHTS_FILE,
                path / "ema" / WEIGHTS_FILE,
                path / WEIGHTS_FILE,
                path,
            )
            if place and place.is_file()
        ),
        None,
    )
    if file is not None:
        return file
    if checkpoint or [*path.glob("diffusion_pytorch_model*")] or (path / "model_index.json").exists():
        raise ValueError(f"{origin} holds a generator of images, not a classifier: give weights of a classifier")
    if not path.exists():
        raise ValueError(f"{origin} does not exist: give a run, a folder that timm saved, or a file of weights")
    raise ValueError(f"{origin} holds no {WEIGHTS_FILE}: give a run, a folder that timm saved, or a file of weights")


def class_names_of(file: Path) -> list[str] | None:
    """Returns the names of the labels 0, 1, ... that stand beside a file of weights, or None."""
    try:
        names = json.loads((file.parent / "config.json").read_text()).get("label_names")
    except (OSError, ValueError, AttributeError):
        return None
    return names if isinstance(names, list) else None


def other_classes(file: Path, class_names: list[str] | None) -> str:
    """Describes the first label that has another name beside the weights; "" if none has."""
    there = class_names_of(file)
    if not there or not class_names or there == class_names:
        return ""
    pairs = itertools.zip_longest(there, class_names, fillvalue="missing")
    label, (old, new) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    return f"{file} was trained on other classes: label {label} is {old} there and {new} in the data"


def read_weights(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file, without unpickling anything else.

    Of an official training file, which has an EMA, too, it returns the weights as trained.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        tensors = timm.models.load_state_dict(str(file), use_ema=False, weights_only=True)
    except Exception as error:  # a damaged file raises errors of many types
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if "weights_only" in reason:  # torch would advise to run the file's code
            reason = "it holds other things than tensors, or is no such file"
        raise ValueError(f"{file} cannot be read as weights ({reason})") from error
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def load_initial(net: nn.Module, file: Path, tensors: dict[str, Tensor], reset_head: bool = False) -> None:
    """Loads the weights of a file into the model.

    Args:
        net: the model.
        file: the file, for errors.
        tensors: its weights, from `read_weights`.
        reset_head: leave the classifier as it is.

    Raises:
        ValueError: the weights are of another model or another number of classes.
    """
    if {PATCHES, LABELS} <= tensors.keys():
        raise ValueError(f"{file} holds a generator of images (SiT), not a classifier: give weights of a classifier")
    if isinstance(net, AttNet):
        tensors = checkpoint_filter_fn(tensors)
    own, head = net.state_dict(), f"{settings_of(net)['classifier']}.weight"
    if reset_head:
        tensors |= {name: own[name] for name in own if name.rpartition(".")[0] == head.rpartition(".")[0]}
    check_classes(file, tensors, own, head)
    if wrong := list_differences(tensors, own):
        raise ValueError(f"{file} does not fit {settings_of(net)['architecture']}: {wrong}")
    net.load_state_dict(tensors)


def check_classes(file: Path, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], head: str) -> None:
    """Raises ValueError if the weights are for another number of classes than the model."""
    there, here = tensors.get(head), own.get(head)
    if there is not None and here is not None and there.shape[1:] == here.shape[1:] and len(there) != len(here):
        raise ValueError(
            f"{file} has {len(there)} classes and the data {len(here)}: give --reset-head true to train a new "
            "classifier on these weights"
        )
