"""What `--ckpt` means: a run, a checkpoint, exported weights, a pipeline, a published file, or a hub id of these."""

import dataclasses
import json
from pathlib import Path

from sit_atconv.checkpoints.exported import Weights, is_pipeline, load_exported
from sit_atconv.checkpoints.recipe import Recipe
from sit_atconv.checkpoints.run_folder import newest_checkpoint
from sit_atconv.runtime.files import hub_options
from sit_atconv.runtime.names import is_object_path


def locate_weights(ckpt: str, ema: bool | float = True, *, model: str | None = None, vae: str | None = None) -> Path:
    """The folder of weights, or the published file, that `ckpt` stands for.

    Args:
        ckpt: a run folder (its newest checkpoint), a checkpoint folder, an exported folder, a pipeline or its
            transformer/, a folder that `SiT.save_pretrained` wrote, a hub id of any of these, or a file.
        ema: the averaged weights of a run or checkpoint (of several averages the first), those as trained, or the
            average of this decay.
        model: of a file, the preset that its weights are of.
        vae: where the VAE of their latents is, or "identity".

    Raises:
        ValueError: nothing to load is there; the message says what was looked for. Or an option is of no use there.
    """
    _check_vae(vae)
    path = Path(ckpt)
    if path.is_file():
        beside = "config.json" if path.name.startswith("diffusion_pytorch_model") else "recipe.json"
        if (path.parent / beside).is_file():
            raise ValueError(f"{ckpt} is a file of exported weights: give its folder, which says how to sample from it")
        if not isinstance(ema, bool):
            raise ValueError(f"{ckpt} is a file, which names no decay of its average: leave --ema {ema} out")
        return path
    if model is not None:
        raise ValueError(f"--model {model} is for files of published weights: leave it out, since {ckpt} is none, and "
                         "config.json beside its weights says this")
    if not path.exists():
        path = _download(ckpt)
    if not any(path.iterdir()):
        raise ValueError(f"{ckpt} is an empty folder: give a run, a checkpoint or exported weights")
    for folder in (newest_checkpoint(path), path):
        if folder and (folder / "ema").is_dir():
            if ema is False:
                return folder / "model"
            return _of_decay([folder / "ema", *sorted(folder.glob("ema-*"))], ema, ckpt)
    if path.resolve().name == "transformer" and is_pipeline(path.resolve().parent):
        path = path.resolve().parent
    if not is_pipeline(path) and not (path / "config.json").is_file():
        raise ValueError(f"{ckpt} holds no weights: neither checkpoints/step-* with ema/ (a run that has saved), "
                         "nor config.json (exported weights), nor model_index.json (a pipeline)")
    return _of_decay([path], ema, ckpt)


def load_weights(ckpt: str, ema: bool | float = True, *, model: str | None = None, vae: str | None = None) -> Weights:
    """Loads what `locate_weights` finds.

    Args:
        ckpt, ema, model: as there.
        vae: where the VAE of their latents is now; it must be the one they were trained with, where they say which.
            The latents of a file are those of sd-vae-ft-ema where neither it nor this says otherwise.

    Raises:
        ValueError: the folder is incomplete or damaged: a file is missing or unreadable, or tensors do not match. Or
            a published file says too little, or is of another model than `model`, or `vae` is another.
    """
    path = locate_weights(ckpt, ema, model=model, vae=vae)
    if is_without_recipe(path):
        from sit_atconv.checkpoints.published_models import load_published

        return load_published(path, model, vae=vae, ema=ema)
    if is_pipeline(path):
        from sit_atconv.checkpoints.pipeline_folder import load_pipeline

        weights = load_pipeline(path)
    else:
        weights = load_exported(path)
    return weights if vae is None else dataclasses.replace(weights, recipe=_with_vae(weights.recipe, vae, ckpt))


def is_without_recipe(path: Path) -> bool:
    """Whether weights that `locate_weights` found do not say how to sample from them: files, and bare models.

    A checkpoint's folder that has lost its recipe is a damaged one.
    """
    if path.is_file():
        return True
    says = path / "recipe.json", path / "model_index.json", path.parent / "state.json"
    return not any(file.is_file() for file in says) and (path / "config.json").is_file()


def _check_vae(vae: str | None) -> None:
    """Raises ValueError where neither a folder nor a hub id is given; before anything is loaded."""
    if vae not in (None, "identity") and not is_object_path(vae) and not Path(vae).exists():
        try:
            hub_options(vae)
        except ValueError as error:
            raise ValueError(f"--vae {vae}: {error}") from None


def _with_vae(recipe: Recipe, vae: str, ckpt: str) -> Recipe:
    """Returns the recipe with its VAE at another place. ValueError: it is not the codec trained with."""
    from sit_atconv.data.codecs import open_codec, typed_codec

    codec = open_codec(typed_codec(vae, recipe.codec["channels"]), f"--vae {vae} is given")
    codec.check(recipe.codec, f"{ckpt} was trained")
    return dataclasses.replace(recipe, codec=recipe.codec | codec.describe())


def _of_decay(folders: list[Path], ema: bool | float, ckpt: str) -> Path:
    """Returns the folder of the average of decay `ema`; the first one for True, and one that is no average for False.

    Raises:
        ValueError: there is none.
    """
    if ema is False and (decay := _ema_decay(folders[0])) is not None:
        raise ValueError(f"{ckpt} holds the EMA weights of decay {decay} alone: leave --no-ema out")
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
        file = folder / ("model_index.json" if is_pipeline(folder) else "recipe.json")
        return json.loads(file.read_text())["ema_decay"]
    except (OSError, ValueError, KeyError):
        return None


def _download(hub_id: str) -> Path:
    try:
        options = hub_options(hub_id)
    except ValueError:
        raise ValueError(f"{hub_id} is neither a folder here nor a hub id (owner/name)") from None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors"], **options))
    except Exception as error:  # no network, no such repository, no permission: all the same to the user
        where = "in the hub's cache, the only place to look while a folder of its owner's name is here" \
            if options["local_files_only"] else "to be had from the hub"
        raise ValueError(f"{hub_id} is neither a folder here nor {where} ({type(error).__name__})") from error
