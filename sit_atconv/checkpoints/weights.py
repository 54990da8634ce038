"""Exported weights: a diffusers model folder and beside it a recipe, so that sampling needs no remembered flag.

    config.json  diffusion_pytorch_model.safetensors  recipe.json

Diffusers pipelines are read by `pipeline_folder.py`; files that others publish, and models without a recipe, by
`published_models.py`.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sit_atconv import __version__
from sit_atconv.runtime.files import check_room, hub_options, sha256_of, weights_variant, write_folder_aside

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
        ema_known: False where nobody says whether these weights are averaged; `ema_decay` is None then.
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
    ema_known: bool = True
    versions: dict[str, str] = field(default_factory=lambda: versions())

    def null_label_of(self, model) -> int | None:
        """The label that guidance takes for no class; None where there is none, or none that was trained."""
        return None if self.null_label_trained is False else model.null_label

    @property
    def average(self) -> str | None:
        """What the weights are called: "EMA", or "as trained"; None where that is not known."""
        if not self.ema_known:
            return None
        return "as trained" if self.ema_decay is None else "EMA"


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
        from sit_atconv.checkpoints.runs import newest_checkpoint

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
        ckpt: a run folder (its newest checkpoint), a checkpoint folder, an exported folder, a pipeline or its
            transformer/, a folder that `SiT.save_pretrained` wrote, a hub id of any of these, or a file.
        ema: the averaged weights of a run or checkpoint (of several averages the first), those as trained, or the
            average of this decay.
        model: of a file, the preset that its weights are of.
        vae: where the VAE of their latents is, or "identity".

    Raises:
        ValueError: nothing to load is there; the message says what was looked for. Or an option is of no use there.
    """
    from sit_atconv.checkpoints.runs import newest_checkpoint

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
        raise ValueError(
            f"{ckpt} holds no weights: neither checkpoints/step-* with ema/ (a run that has saved), "
            "nor config.json (exported weights), nor model_index.json (a pipeline)"
        )
    return _of_decay([path], ema, ckpt)


def load_weights(
    ckpt: str, ema: bool | float = True, *, model: str | None = None, vae: str | None = None
) -> Weights:
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
        weights = _load_exported(path)
    return weights if vae is None else dataclasses.replace(weights, recipe=_with_vae(weights.recipe, vae, ckpt))


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is that of a diffusers pipeline, whichever."""
    return (folder / "model_index.json").is_file()


def is_without_recipe(path: Path) -> bool:
    """Whether weights that `locate_weights` found do not say how to sample from them: files, and bare models.

    A checkpoint's folder that has lost its recipe is a damaged one.
    """
    if path.is_file():
        return True
    says = path / "recipe.json", path / "model_index.json", path.parent / "state.json"
    return not any(file.is_file() for file in says) and (path / "config.json").is_file()


def load_model(folder: Path) -> "SiT":
    """The model of a folder of config.json and weights, in float32 on the CPU.

    Raises:
        ValueError: it is of another class, incomplete or damaged.
    """
    import torch

    from sit_atconv.models import SiT

    with damage_named(folder):
        kind = json.loads((folder / "config.json").read_text()).get("_class_name", "SiT")
    if kind != "SiT":
        raise ValueError(f"{folder} holds an {kind}, and no SiT: give a folder of one")
    pickled = not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin"))
    if pickled and any(folder.glob("*-of-*.bin")):
        raise ValueError(f"the weights in {folder} are shards of .bin, which diffusers writes and does not read: save "
                         "them as .safetensors (safe_serialization)")
    with damage_named(folder):
        model, report = SiT.from_pretrained(
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
        raise ValueError(
            f"the weights in {folder} are incomplete or damaged ({reason}): copy or export them again"
        ) from error


def _load_exported(folder: Path) -> Weights:
    with damage_named(folder):
        recipe = Recipe(**json.loads((folder / "recipe.json").read_text()))
    if recipe.null_label_trained is None and _run_drops_no_labels(folder):
        recipe = dataclasses.replace(recipe, null_label_trained=False)
    model = load_model(folder)
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


def _check_vae(vae: str | None) -> None:
    """Raises ValueError where neither a folder nor a hub id is given; before anything is loaded."""
    if vae not in (None, "identity") and not Path(vae).exists():
        try:
            hub_options(vae)
        except ValueError as error:
            raise ValueError(f"--vae {vae}: {error}") from None


def _with_vae(recipe: Recipe, vae: str, ckpt: str) -> Recipe:
    """The recipe with its VAE at another place. Raises ValueError where it is not the one trained with."""
    from sit_atconv.data.codecs import VAECodec

    pixels = recipe.codec["kind"] == "identity"
    if pixels or vae == "identity":
        if pixels and vae == "identity":
            return recipe
        there = "on pixels, without a VAE" if pixels else f"on the latents of the VAE {recipe.codec['source']}"
        raise ValueError(f"{ckpt} was trained {there}, which --vae {vae} contradicts: give that, or nothing")
    codec = VAECodec(vae)
    codec.check(recipe.codec, f"{ckpt} was trained")
    return dataclasses.replace(recipe, codec=recipe.codec | {"source": codec.source})


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
