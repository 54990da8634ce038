"""Exported weights: a diffusers model folder and its recipe, so that sampling needs no remembered flag.

    config.json  diffusion_pytorch_model.safetensors  recipe.json
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sit_atconv import __version__
from sit_atconv.checkpoints.recipe import Recipe
from sit_atconv.checkpoints.run_folder import newest_checkpoint
from sit_atconv.runtime.files import check_room, sha256_of, weights_variant, write_folder_aside

if TYPE_CHECKING:  # finding weights must not wait for torch: it is imported where it is used
    from sit_atconv.models import SiT

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Weights:
    """A loaded model and where it came from.

    Args:
        model: on the CPU, in float32.
        recipe: how it was trained, and so how to sample from it.
        path: the folder or the published file of both.
        notes: what the user must hear of them, a line each: what had to be assumed, dropped or reordered.
    """

    model: "SiT"
    recipe: Recipe
    path: Path
    notes: tuple[str, ...] = ()

    @property
    def null_label(self) -> int | None:
        """As `Recipe.null_label_of`."""
        return self.recipe.null_label_of(self.model)

    @property
    def home(self) -> Path:
        """Where what is made from these weights goes by default.

        Their run, or the folder itself; of a published file, its path without the suffix.
        """
        if self.path.is_file():
            return self.path.with_suffix("")
        run = self.path.parent.parent.parent
        return run if newest_checkpoint(run) else self.path

    def identity(self) -> str:
        """sha256 of the weights, over all shards, or of the published file."""
        if self.path.is_file():
            return sha256_of(self.path)
        folder = self.path / "transformer" if is_pipeline(self.path) else self.path
        return sha256_of(*(sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))))


def save_weights(model, recipe: Recipe, folder: Path) -> None:
    """Writes the model and its recipe into a folder that `SiT.from_pretrained` and `load_weights` read."""
    model.save_pretrained(folder)
    recipe.save(folder)


def export_weights(weights: Weights, folder: Path) -> None:
    """`save_weights` of what was loaded, whole or not at all.

    Raises:
        ValueError: the disk has too little room.
        OSError: the folder cannot be written.
    """
    check_room(folder, sum(p.nbytes for p in weights.model.parameters()))
    write_folder_aside(folder, lambda partial: save_weights(weights.model, weights.recipe, partial))


def load_model(folder: Path, backbone: str | None = None) -> "SiT":
    """The model of a folder of config.json and weights, in float32 on the CPU.

    Args:
        folder: of the weights.
        backbone: class path of a model other than `SiT`, as `Recipe` has it.

    Raises:
        ValueError: it is of another class, incomplete or damaged, or the module of its class is not imported.
    """
    import torch

    from sit_atconv.models.sit import BACKBONES

    model_class = BACKBONES.find(backbone or "SiT")
    with damage_named(folder):
        kind = json.loads((folder / "config.json").read_text()).get("_class_name", "SiT")
    if kind != model_class.__name__:
        raise ValueError(f"{folder} holds an {kind}, and no SiT: give a folder of one")
    pickled = not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin"))
    if pickled and any(folder.glob("*-of-*.bin")):
        raise ValueError(f"the weights in {folder} are shards of .bin, which diffusers writes and does not read: save "
                         "them as .safetensors (safe_serialization)")
    with damage_named(folder):
        model, report = model_class.from_pretrained(
            folder, torch_dtype=torch.float32, variant=weights_variant(folder), output_loading_info=True,
            use_safetensors=False if pickled else None)
    if wrong := {name: keys for name, keys in report.items() if keys}:
        raise ValueError(f"the weights in {folder} do not fit their config.json: {wrong}")
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def damage_named(folder: Path) -> Iterator[None]:
    """Turns whatever a reader raises for a missing or truncated file of `folder` into a ValueError."""
    try:
        yield
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the weights in {folder} are incomplete or damaged ({reason}): copy or export them "
                         "again") from error


def load_exported(folder: Path) -> Weights:
    """Loads a folder that `save_weights` wrote.

    Raises:
        ValueError: it is incomplete or damaged, its files do not fit each other, or a later version wrote it.
    """
    with damage_named(folder):
        content = json.loads((folder / "recipe.json").read_text())
        unknown = sorted(content.keys() - {field.name for field in dataclasses.fields(Recipe)})
    if unknown:
        wrote = dict(content.get("versions") or {}).get("sit_atconv", "a later one")
        raise ValueError(f"the recipe.json in {folder} has {', '.join(unknown)}, which sit_atconv {__version__} does "
                         f"not know: it was written by {wrote}; install that version or a later one")
    with damage_named(folder):
        recipe = Recipe(**content)
    if recipe.null_label_trained is None and _run_drops_no_labels(folder):
        recipe = dataclasses.replace(recipe, null_label_trained=False)
    model = load_model(folder, recipe.backbone)
    if len(recipe.class_names) != model.config.num_classes:
        raise ValueError(f"the recipe.json in {folder} names {len(recipe.class_names)} classes, and its config.json "
                         f"knows {model.config.num_classes}: export the weights again")
    return Weights(model, recipe, folder)


def _run_drops_no_labels(folder: Path) -> bool:
    """True for the checkpoints of a run that says so itself: their recipes did not before 2026-11-25."""
    folder = folder.resolve()
    config = folder.parent.parent.parent / "config.yaml"
    if folder.parent.parent.name != "checkpoints" or not config.is_file():
        return False
    import yaml

    try:
        options = yaml.safe_load(config.read_text())
        return options["flow"]["class_dropout_prob"] == 0 and options.get("init_from") is None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return False


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is that of a diffusers pipeline, whichever."""
    return (folder / "model_index.json").is_file()
