"""Exported weights: a diffusers model folder and beside it a recipe, so that sampling needs no remembered flag.

    config.json  diffusion_pytorch_model.safetensors  recipe.json

Files that others publish become such weights by `published_models.py`.
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sit_atconv import __version__
from sit_atconv.files import check_room, sha256_of, write_folder_aside

if TYPE_CHECKING:  # finding weights must not wait for torch: it is imported where it is used
    from sit_atconv.models import SiT

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Recipe:
    """All that sampling must know beside the model itself.

    Args:
        interpolant: "linear", "gvp" or "vp".
        prediction: what the model's output stands for.
        codec: what `Codec.describe()` returned.
        class_names: names of labels 0, 1, ...
        step: optimizer steps behind these weights.
        ema_decay: decay of the average that these weights are; None for the weights as trained.
        null_label_trained: whether labels were ever dropped, so that guidance has something to guide with; None where
            that is not known (weights older than this field), which is taken for yes.
        empty_classes: labels of which no image was trained on; they are drawn only where they are asked for.
        versions: of what wrote them.
    """

    interpolant: str
    prediction: str
    codec: dict
    class_names: list[str]
    step: int
    ema_decay: float | None = None
    null_label_trained: bool | None = None
    empty_classes: list[int] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: versions())

    def null_label_of(self, model) -> int | None:
        """The label that guidance takes for no class; None where there is none, or none that was trained."""
        return None if self.null_label_trained is False else model.null_label


@dataclass(frozen=True)
class Weights:
    """A loaded model and where it came from.

    Args:
        model: on the CPU, in float32.
        recipe: how it was trained, and so how to sample from it.
        path: the exported folder or the published file of both.
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

        Their run, or the exported folder itself; of a published file, its path without the suffix.
        """
        from sit_atconv.checkpointing.runs import newest_checkpoint

        if self.path.is_file():
            return self.path.with_suffix("")
        run = self.path.parent.parent.parent
        return run if newest_checkpoint(run) else self.path

    def identity(self) -> str:
        """sha256 of the weights, over all shards, or of the published file."""
        return sha256_of(*([self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))))


def versions() -> dict[str, str]:
    import diffusers
    import torch

    return {"sit_atconv": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}


def save_weights(model, recipe: Recipe, folder: Path) -> None:
    """Writes the model and its recipe into a folder that `SiT.from_pretrained` and `load_weights` read."""
    model.save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe), indent=1))


def export_weights(weights: Weights, folder: Path) -> None:
    """`save_weights` of what was loaded, whole or not at all.

    Raises:
        ValueError: the disk has too little room.
        OSError: the folder cannot be written.
    """
    check_room(folder, sum(p.nbytes for p in weights.model.parameters()))
    write_folder_aside(folder, lambda partial: save_weights(weights.model, weights.recipe, partial))


def locate_weights(
    ckpt: str, ema: bool | float = True, *, model: str | None = None, vae: str | None = None
) -> Path:
    """The folder of weights, or the published file, that `ckpt` stands for.

    Args:
        ckpt: a run folder (its newest checkpoint), a checkpoint folder, an exported folder, a hub id, or a file.
        ema: the averaged weights of a run or checkpoint (of several averages the first), those as trained, or the
            average of this decay.
        model: of a file, the preset that its weights are of.
        vae: of a file, the VAE of its latents.

    Raises:
        ValueError: nothing to load is there; the message says what was looked for. Or an option is of no use there.
    """
    from sit_atconv.checkpointing.runs import newest_checkpoint

    path = Path(ckpt)
    if path.is_file():
        if (path.parent / "recipe.json").is_file():
            raise ValueError(f"{ckpt} is a file of exported weights: give its folder, which says how to sample from it")
        if not isinstance(ema, bool):
            raise ValueError(f"{ckpt} is a file, which names no decay of its average: leave --ema {ema} out")
        return path
    for option, value, home in (("--model", model, "config.json"), ("--vae", vae, "recipe.json")):
        if value is not None:
            raise ValueError(f"{option} {value} is for files of published weights: leave it out, since {ckpt} is none, "
                             f"and {home} beside its weights says this")
    if not path.exists():
        return _of_decay([_download(ckpt)], ema, ckpt)
    if not any(path.iterdir()):
        raise ValueError(f"{ckpt} is an empty folder: give a run, a checkpoint or exported weights")
    for folder in (newest_checkpoint(path), path):
        if folder and (folder / "ema").is_dir():
            if ema is False:
                return folder / "model"
            return _of_decay([folder / "ema", *sorted(folder.glob("ema-*"))], ema, ckpt)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{ckpt} holds no weights: neither checkpoints/step-* with ema/ (a run that has saved), "
            "nor config.json (exported weights)"
        )
    return _of_decay([path], ema, ckpt)


def load_weights(
    ckpt: str, ema: bool | float = True, *, model: str | None = None, vae: str | None = None
) -> Weights:
    """Loads what `locate_weights` finds. A file's latents are those of the VAE sd-vae-ft-ema unless `vae` is given.

    Raises:
        ValueError: the folder is incomplete or damaged: a file is missing or unreadable, or tensors do not match. Or
            a published file says too little, or is of another model than `model`.
    """
    path = locate_weights(ckpt, ema, model=model, vae=vae)
    if path.is_file():
        from sit_atconv.checkpointing.published_models import load_published

        return load_published(path, model, vae=vae, ema=ema)
    return _load_exported(path)


def _load_exported(folder: Path) -> Weights:
    from sit_atconv.models import SiT

    try:
        recipe = Recipe(**json.loads((folder / "recipe.json").read_text()))
        model, report = SiT.from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # a truncated file raises whatever its reader raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the weights in {folder} are incomplete or damaged ({reason}): copy or export them again"
        ) from error
    wrong = {name: keys for name, keys in report.items() if keys}
    if wrong:
        raise ValueError(f"the weights in {folder} do not fit their config.json: {wrong}")
    if len(recipe.class_names) != model.config.num_classes:
        raise ValueError(f"the recipe.json in {folder} names {len(recipe.class_names)} classes, and its config.json "
                         f"knows {model.config.num_classes}: export the weights again")
    return Weights(model.eval().requires_grad_(False), recipe, folder)


def _of_decay(folders: list[Path], ema: bool | float, ckpt: str) -> Path:
    """Of folders of averages, the one of the decay `ema`; the first where that is no number."""
    if isinstance(ema, bool):
        return folders[0]
    decays = {_ema_decay(folder): folder for folder in folders}
    if ema not in decays:
        known = ", ".join(str(decay) for decay in decays if decay is not None)
        raise ValueError(f"{ckpt} has no average of decay {ema}: {f'give one of {known}' if known else 'it has none'}")
    return decays[ema]


def _ema_decay(folder: Path) -> float | None:
    """What the recipe says; None also where it is damaged, of which loading tells."""
    try:
        return json.loads((folder / "recipe.json").read_text())["ema_decay"]
    except (OSError, ValueError, KeyError):
        return None


def _download(hub_id: str) -> Path:
    missing = f"{hub_id} is neither a folder here nor"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise ValueError(f"{missing} a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # no network, no such repository, no permission: all the same to the user
        raise ValueError(f"{missing} to be had from the hub ({type(error).__name__})") from error
