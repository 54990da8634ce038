"""Exported weights, which sampling needs no options for: a model and its recipe, or a pipeline.

config.json  diffusion_pytorch_model.safetensors  recipe.json
model_index.json  transformer/  vae/ (none in pixel space)  scheduler/
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sit_atconv.checkpoints.recipe import Recipe, check_fields
from sit_atconv.checkpoints.run_folder import newest_checkpoint, read_config
from sit_atconv.runtime.files import check_room, sha256_of, weights_variant, write_folder_aside

if TYPE_CHECKING:  # importing torch takes seconds: functions import it only when they load weights
    from sit_atconv.models import SiT

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Weights:
    """A loaded model and its origin.

    Args:
        model: the model, on the CPU in float32.
        recipe: settings for sampling from it.
        path: folder or published file that both come from.
        notes: lines for the user: what had to be assumed.
    """

    model: "SiT"
    recipe: Recipe
    path: Path
    notes: tuple[str, ...] = ()

    @property
    def null_label(self) -> int | None:
        """The label that guidance uses as "no class", or None."""
        return self.recipe.null_label_of(self.model)

    @property
    def traits(self) -> dict:
        """Arguments of `Sampler.settled` and `Sampler.check` that describe the model."""
        return {
            "null_label": self.null_label,
            "two_times": bool(self.model.config.get("two_times")),
            "trained_cfg": self.recipe.trained_cfg,
        }

    @property
    def home(self) -> Path:
        """Default folder for the results: the run, else the weights' folder, or a file's path without suffix."""
        if self.path.is_file():
            return self.path.with_suffix("")
        run = self.path.parent.parent.parent
        return run if newest_checkpoint(run) else self.path

    def identity(self) -> str:
        """Returns the sha256 of the weights, over all shards, or of the published file."""
        if self.path.is_file():
            return sha256_of(self.path)
        folder = self.path / "transformer" if is_pipeline(self.path) else self.path
        return sha256_of(*(sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))))


def save_weights(model: "SiT", recipe: Recipe, folder: Path) -> None:
    """Writes the model and its recipe into a folder, for `SiT.from_pretrained` and `load_weights`."""
    model.save_pretrained(folder)
    recipe.save(folder)


def export_weights(weights: Weights, folder: Path) -> None:
    """Writes loaded weights into a new folder, which is complete or not there.

    Raises:
        ValueError: the disk has too little room.
        OSError: the folder cannot be written.
    """
    check_room(folder, sum(p.nbytes for p in weights.model.parameters()))
    write_folder_aside(folder, lambda partial: save_weights(weights.model, weights.recipe, partial))


def load_model(folder: Path, backbone: str | None = None) -> "SiT":
    """Loads a model from a folder with config.json and weights, in float32 on the CPU.

    Args:
        folder: the folder.
        backbone: class path of a model other than `SiT`, as in `Recipe`.

    Raises:
        ValueError: the model has another class, is incomplete or damaged, or the module of its class is not imported.
    """
    import torch

    from sit_atconv.models.sit import BACKBONES

    model_class = BACKBONES.find(backbone or "SiT")
    with damage_named(folder):
        kind = json.loads((folder / "config.json").read_text()).get("_class_name", "SiT")
    if kind != model_class.__name__:
        raise ValueError(f"the model in {folder} is of class {kind}: give a folder with a {model_class.__name__}")
    pickled = not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin"))
    if pickled and any(folder.glob("*-of-*.bin")):
        raise ValueError(
            f"the weights in {folder} are .bin shards, which diffusers can write but not read: save them "
            "as .safetensors (safe_serialization=True)"
        )
    with damage_named(folder):
        model, report = model_class.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            variant=weights_variant(folder),
            output_loading_info=True,
            use_safetensors=False if pickled else None,
        )
    if wrong := {name: keys for name, keys in report.items() if keys}:
        raise ValueError(f"the weights in {folder} do not fit their config.json: {wrong}")
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def damage_named(folder: Path) -> Iterator[None]:
    """Turns any error from reading the files of `folder` into a ValueError that names the folder."""
    try:
        yield
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the weights in {folder} are incomplete or damaged ({reason}): copy or export them again"
        ) from error


def load_exported(folder: Path) -> Weights:
    """Loads a folder that `save_weights` wrote.

    Raises:
        ValueError: it is incomplete or damaged, its files do not fit each other, or a later version wrote it.
    """
    file = folder / "recipe.json"
    with damage_named(folder):
        content = dict(json.loads(file.read_text()))
    check_fields(content, [field.name for field in dataclasses.fields(Recipe)], file)
    with damage_named(folder):
        recipe = Recipe(**content)
    if recipe.null_label_trained is None and _run_drops_no_labels(folder):
        recipe = dataclasses.replace(recipe, null_label_trained=False)
    model = load_model(folder, recipe.backbone)
    if len(recipe.class_names) != model.config.num_classes:
        raise ValueError(
            f"recipe.json in {folder} names {len(recipe.class_names)} classes, but config.json has "
            f"{model.config.num_classes}: export the weights again"
        )
    return Weights(model, recipe, folder)


def _run_drops_no_labels(folder: Path) -> bool:
    """True if config.yaml of the run says so; recipes older than 2026-11-25 do not."""
    checkpoints = folder.resolve().parent.parent
    options = read_config(checkpoints.parent) if checkpoints.name == "checkpoints" else {}
    try:
        return options["flow"]["class_dropout_prob"] == 0 and options.get("init_from") is None
    except (KeyError, TypeError):
        return False


def load_pipeline(folder: Path) -> Weights:
    """Loads a pipeline that `convert --to pipeline` or `save_pretrained` wrote.

    Fields that pipelines of earlier versions lack (step, EMA decay, training of the null label) count as not known.

    Raises:
        ValueError: the folder is not a `SiTPipeline`, or is incomplete or damaged.
    """
    from sit_atconv.data.codecs import open_codec, typed_codec

    with damage_named(folder):
        index = json.loads((folder / "model_index.json").read_text())
        transformer, vae = index.get("transformer") or [None, None], index.get("vae") or [None, None]
        names, empty = index.get("id2label") or {}, index.get("empty_classes") or {}
        kind = index.get("_class_name")
    if transformer[1] != "SiT":
        raise ValueError(f"{folder} is a {kind}, not a SiTPipeline: give a pipeline with a SiT")
    model = load_model(folder / "transformer")
    described = typed_codec(str(folder / "vae") if vae[0] else "identity", model.config.in_channels)
    codec = open_codec(described)
    recipe = Recipe(
        index.get("interpolant", "linear"),
        index.get("prediction", "velocity"),
        codec.describe(),
        [names.get(str(label), str(label)) for label in range(model.config.num_classes)],
        step=index.get("step") or 0,
        ema_decay=index.get("ema_decay"),
        null_label_trained=index.get("null_label_trained"),
        empty_classes=sorted(map(int, empty)),
        ema_known=index.get("ema_known", False),
        trained_cfg=index.get("trained_cfg", 1.0),
    )
    notes = () if names else (f"{folder} does not name its classes: refer to them by number",)
    return Weights(model, recipe, folder, notes)


def is_pipeline(folder: Path) -> bool:
    """True if the folder is a diffusers pipeline of any kind."""
    return (folder / "model_index.json").is_file()
