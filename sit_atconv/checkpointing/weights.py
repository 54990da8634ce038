"""Exported weights: a diffusers model folder and beside it a recipe, so that sampling needs no remembered flag.

    config.json  diffusion_pytorch_model.safetensors  recipe.json
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sit_atconv import __version__
from sit_atconv.files import sha256_of

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
        versions: of what wrote them.
    """

    interpolant: str
    prediction: str
    codec: dict
    class_names: list[str]
    step: int
    ema_decay: float | None = None
    versions: dict[str, str] = field(default_factory=lambda: versions())


@dataclass(frozen=True)
class Weights:
    """A loaded model, its recipe and the folder both came from."""

    model: "SiT"
    recipe: Recipe
    folder: Path

    @property
    def home(self) -> Path:
        """Where what is made from these weights goes by default: their run, or the exported folder itself."""
        from sit_atconv.checkpointing.runs import newest_checkpoint

        run = self.folder.parent.parent.parent
        return run if newest_checkpoint(run) else self.folder

    def identity(self) -> str:
        """sha256 of the weights, over all shards."""
        return sha256_of(*sorted(self.folder.glob("*.safetensors")))


def versions() -> dict[str, str]:
    import diffusers
    import torch

    return {"sit_atconv": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}


def save_weights(model, recipe: Recipe, folder: Path) -> None:
    """Writes the model and its recipe into a folder that `SiT.from_pretrained` and `load_weights` read."""
    model.save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe), indent=1))


def locate_weights(ckpt: str, ema: bool = True) -> Path:
    """The folder of weights that `ckpt` stands for.

    Args:
        ckpt: a run folder (its newest checkpoint), a checkpoint folder, an exported folder or a hub id.
        ema: the averaged weights of a run or checkpoint, or those as trained.

    Raises:
        ValueError: nothing to load is there; the message says what was looked for.
    """
    from sit_atconv.checkpointing.runs import newest_checkpoint

    path = Path(ckpt)
    if path.is_file():
        raise ValueError(f"{ckpt} is a file: give the run folder, or an exported folder, that holds it")
    if not path.exists():
        return _download(ckpt)
    if not any(path.iterdir()):
        raise ValueError(f"{ckpt} is an empty folder")
    for folder in (newest_checkpoint(path), path):
        if folder and (folder / "ema").is_dir():
            return folder / ("ema" if ema else "model")
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{ckpt} holds no weights: neither checkpoints/step-* with ema/ (a run that has saved), "
            "nor config.json (exported weights)"
        )
    return path


def load_weights(ckpt: str, ema: bool = True) -> Weights:
    """Loads what `locate_weights` finds.

    Raises:
        ValueError: the folder is incomplete or damaged: a file is missing or unreadable, or tensors do not match.
    """
    from sit_atconv.models import SiT

    folder = locate_weights(ckpt, ema)
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
    return Weights(model.eval().requires_grad_(False), recipe, folder)


def _download(hub_id: str) -> Path:
    missing = f"{hub_id} is neither a folder here nor"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise ValueError(f"{missing} a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # no network, no such repository, no permission: all the same to the user
        raise ValueError(f"{missing} to be had from the hub ({type(error).__name__})") from error
