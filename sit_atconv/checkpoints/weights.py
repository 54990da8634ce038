"""Weights for `--ckpt`: a run, checkpoint, export, pipeline, published file, or a hub id of these."""

import dataclasses
import json
from pathlib import Path

from sit_atconv.checkpoints.exported import Weights, is_pipeline, load_exported, load_pipeline
from sit_atconv.checkpoints.recipe import Recipe
from sit_atconv.checkpoints.run_folder import newest_checkpoint
from sit_atconv.runtime.files import hub_options
from sit_atconv.runtime.names import is_object_path


def locate_weights(ckpt: str, ema: bool | float = True, *, model: str | None = None, vae: str | None = None) -> Path:
    """Returns the folder of weights, or the published file, that `ckpt` names.

    Args:
        ckpt: a run (its newest checkpoint is used), a checkpoint, an exported folder, a pipeline or its transformer/, a
            folder of `SiT.save_pretrained`, a hub id of any of these, or a file.
        ema: True for the first EMA of a run or checkpoint, False for the weights as trained, a number for the EMA with
            this decay.
        model: preset of the weights in a file.
        vae: hub id or folder of their VAE, or "identity".

    Raises:
        ValueError: no weights are found, and the message says what is missing; or an option does not apply to them.
    """
    _check_vae(vae)
    path = Path(ckpt)
    if path.is_file():
        beside = "config.json" if path.name.startswith("diffusion_pytorch_model") else "recipe.json"
        if (path.parent / beside).is_file():
            raise ValueError(f"{ckpt} is a file of exported weights: give its folder, which records how to sample")
        if not isinstance(ema, bool):
            raise ValueError(f"{ckpt} is a file without a choice of EMA decays: leave out --ema {ema}")
        return path
    if model is not None:
        raise ValueError(
            f"--model {model} is for files of published weights: leave it out, since {ckpt} has a config.json"
        )
    if not path.exists():
        path = _download(ckpt)
    if not any(path.iterdir()):
        raise ValueError(f"{ckpt} is an empty folder: give a run, a checkpoint or exported weights")
    for folder in (newest_checkpoint(path), path):
        if folder and (folder / "ema").is_dir():
            if ema is False:
                return folder / "model"
            return _choose_ema([folder / "ema", *sorted(folder.glob("ema-*"))], ema, ckpt)
    if path.resolve().name == "transformer" and is_pipeline(path.resolve().parent):
        path = path.resolve().parent
    if not is_pipeline(path) and not (path / "config.json").is_file():
        raise ValueError(
            f"{ckpt} holds no weights: it has neither checkpoints/step-* with ema/ (a run after its first "
            "checkpoint), nor config.json (exported weights), nor model_index.json (a pipeline)"
        )
    return _choose_ema([path], ema, ckpt)


def load_weights(ckpt: str, ema: bool | float = True, *, model: str | None = None, vae: str | None = None) -> Weights:
    """Loads the weights that `locate_weights` finds.

    Args:
        ckpt, ema, model: as in `locate_weights`.
        vae: hub id or folder of their VAE; it must be the one they were trained with, if they record it. The default
            for a file that does not is sd-vae-ft-ema.

    Raises:
        ValueError: a file is missing or damaged, or tensors do not match; a published file records too little, or
            contradicts `model`; or `vae` is another VAE.
    """
    path = locate_weights(ckpt, ema, model=model, vae=vae)
    if is_without_recipe(path):
        from sit_atconv.checkpoints.published_models import load_published

        return load_published(path, model, vae=vae, ema=ema is not False)
    weights = load_pipeline(path) if is_pipeline(path) else load_exported(path)
    return weights if vae is None else dataclasses.replace(weights, recipe=_with_vae(weights.recipe, vae, ckpt))


def is_without_recipe(path: Path) -> bool:
    """True if weights that `locate_weights` found do not record how to sample: files, and bare models.

    It is False for a checkpoint without its recipe, which is damaged.
    """
    recipes = path / "recipe.json", path / "model_index.json", path.parent / "state.json"
    return path.is_file() or ((path / "config.json").is_file() and not any(file.is_file() for file in recipes))


def _check_vae(vae: str | None) -> None:
    """Raises ValueError, before anything is loaded, if `vae` can be neither a folder nor a hub id."""
    if vae not in (None, "identity") and not is_object_path(vae) and not Path(vae).exists():
        try:
            hub_options(vae)
        except ValueError as error:
            raise ValueError(f"--vae {vae}: {error}") from None


def _with_vae(recipe: Recipe, vae: str, ckpt: str) -> Recipe:
    """Returns the recipe with another path of its VAE. ValueError: the VAE is another one."""
    from sit_atconv.data.codecs import open_codec, typed_codec

    codec = open_codec(typed_codec(vae, recipe.codec["channels"]), f"--vae {vae} is given")
    codec.check(recipe.codec, f"{ckpt} was trained")
    return dataclasses.replace(recipe, codec=recipe.codec | codec.describe())


def _choose_ema(folders: list[Path], ema: bool | float, ckpt: str) -> Path:
    """Returns the EMA folder whose decay is `ema`, or the first one if `ema` is a bool.

    Raises:
        ValueError: there is none, or `ema` is False and the folder holds EMA weights.
    """
    decays = {_ema_decay(folder): folder for folder in folders}
    known = ", ".join(str(decay) for decay in decays if decay is not None)
    if ema is False and known:
        raise ValueError(f"{ckpt} holds only EMA weights, of decay {known}: leave out --no-ema")
    if isinstance(ema, bool):
        return folders[0]
    if ema not in decays:
        raise ValueError(f"{ckpt} has no EMA of decay {ema}: {f'give one of {known}' if known else 'it has none'}")
    return decays[ema]


def _ema_decay(folder: Path) -> float | None:
    """Returns the EMA decay in the recipe, or None; a damaged recipe is reported later, when it is loaded."""
    try:
        file = folder / ("model_index.json" if is_pipeline(folder) else "recipe.json")
        return json.loads(file.read_text())["ema_decay"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _download(hub_id: str) -> Path:
    try:
        options = hub_options(hub_id)
    except ValueError:
        raise ValueError(f"{hub_id} is neither a folder here nor a hub id (owner/name)") from None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors"], **options))
    except Exception as error:  # no network, no such repository, no permission
        where = (
            "in the hub's cache (the hub is not asked if a folder with the owner's name exists here)"
            if options["local_files_only"]
            else "available from the hub"
        )
        raise ValueError(f"{hub_id} is neither a folder here nor {where}: {type(error).__name__}") from error
