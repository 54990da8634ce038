"""Weights in a diffusers pipeline folder, written by `convert --to pipeline` or `save_pretrained`.

    model_index.json  transformer/  vae/ (none in pixel space)  scheduler/
"""

import json
from pathlib import Path

from sit_atconv.checkpoints.exported import Weights, damage_named, load_model
from sit_atconv.checkpoints.recipe import Recipe
from sit_atconv.data.codecs import IdentityCodec, VAECodec


def load_pipeline(folder: Path) -> Weights:
    """Loads the model, its recipe and its VAE.

    Fields that pipelines of earlier versions lack (step, EMA decay, training of the null label) count as not known.

    Raises:
        ValueError: the folder is not a `SiTPipeline`, or is incomplete or damaged.
    """
    with damage_named(folder):
        index = json.loads((folder / "model_index.json").read_text())
        transformer, vae = index.get("transformer") or [None, None], index.get("vae") or [None, None]
        names, empty = index.get("id2label") or {}, index.get("empty_classes") or {}
        kind = index.get("_class_name")
    if transformer[1] != "SiT":
        raise ValueError(f"{folder} is a {kind}, not a SiTPipeline: give a pipeline with a SiT")
    model = load_model(folder / "transformer")
    codec = VAECodec(str(folder / "vae")) if vae[0] else IdentityCodec(model.config.in_channels)
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
    )
    notes = () if names else (f"{folder} does not name its classes: refer to them by number",)
    return Weights(model, recipe, folder, notes)
