"""Conversion of AttNet's official training files to folders that timm loads, and back."""

import shlex
from pathlib import Path

import timm
import torch

from sit_atconv.classification.weights import (
    ClassifierRecipe,
    find_weights,
    load_initial,
    read_weights,
    save_classifier,
)
from sit_atconv.models.attnet import PRESETS, AttNet, checkpoint_filter_fn, official_state_dict
from sit_atconv.runtime.files import check_room, write_aside


def import_attnet(source: str, name: str, out: Path, class_names: list[str] | None = None) -> str:
    """Writes the trained weights of an official file, or other weights of AttNet, as a folder of timm.

    Args:
        source: an official training file, or whatever `find_weights` takes.
        name: name of the model, such as "attnet_t2".
        out: the folder to write, new or empty.
        class_names: names of the labels 0, 1, ...; None leaves them without names.

    Returns:
        Lines for the user.

    Raises:
        ValueError: there is no such model, or the weights are not its weights.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no AttNet {name!r}: give --model as one of {', '.join(PRESETS)}")
    file = find_weights(source)
    tensors = checkpoint_filter_fn(read_weights(file))
    if "head.fc.weight" not in tensors:
        raise ValueError(f"{file} holds no weights of AttNet: its classifier, head.weight, is missing")
    num_classes = len(tensors["head.fc.weight"])
    if class_names and len(class_names) != num_classes:
        raise ValueError(f"--class-names has {len(class_names)} names, but the weights have {num_classes} classes")
    model = timm.create_model(name, num_classes=num_classes)
    load_initial(model, file, tensors)
    save_classifier(model, ClassifierRecipe(class_names, 0), out)
    return (
        f"{out}: {name}, trained weights of {source}, {num_classes} classes\n"
        f'load: timm.create_model("local-dir:{out}", pretrained=True), after importing sit_atconv.models.attnet'
    )


def export_attnet(source: str, out: Path) -> str:
    """Writes the weights of a run or of a folder of timm as a file that the official code loads.

    Args:
        source: a run, of which the EMA weights of the newest checkpoint are taken, or a folder of timm.
        out: the file to write.

    Returns:
        Lines for the user.

    Raises:
        ValueError: there are no weights, or they are not AttNet's.
    """
    folder = find_weights(source).parent
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # whatever timm meets there
        raise ValueError(f"{folder} is no folder of a timm model ({str(error).partition(chr(10))[0]})") from error
    if not isinstance(model, AttNet):
        raise ValueError(f"--to attnet is for AttNet, and {source} holds a {type(model).__name__}")
    tensors = official_state_dict(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    check_room(out, sum(tensor.nbytes for tensor in tensors.values()))
    write_aside(out, lambda partial: torch.save({"model": tensors}, partial))
    name = model.pretrained_cfg["architecture"]  # type: ignore[index]
    return (
        f"{out}: {name}, weights of {source}, in the official form\n"
        f"read it back: python -m sit_atconv.convert {shlex.quote(str(out))} {shlex.quote(str(out.with_suffix('')))} "
        f"--model {name}"
    )
