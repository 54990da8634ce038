"""Training command that `encode` suggests for the latents it has written."""

import itertools
import shlex
from pathlib import Path

import numpy as np
import yaml

from sit_atconv.data.latent_folder import LatentIndex
from sit_atconv.data.order import hold_out
from sit_atconv.models.presets import PATCHES
from sit_atconv.runtime.installation import command, shipped_configs
from sit_atconv.runtime.names import is_object_path
from sit_atconv.training.config import TrainConfig

SMALL_PRESET = "SiT-ATConv-S/2"  # for sizes without a configuration of their own


def training_command(index: LatentIndex, labels: np.ndarray, out: Path) -> str:
    """Returns a complete command: a shipped configuration with the options that the latents in `out` need."""
    settings = index.settings
    options: dict[str, object] = {"data.latents": out}
    config, shipped = f"imagenet{settings.image_size}", shipped_configs()
    if config not in shipped:
        config = "imagenet256"
        options |= {"preset": SMALL_PRESET, "data.image_size": settings.image_size}
    if all(settings.latent_size % patch for patch in PATCHES):
        options["model.patch_size"] = 1
    if not settings.mirrored:
        options["data.mirror"] = "false"
    if is_object_path(kind := settings.codec["kind"]):
        options["data.codec"] = kind  # so that training imports the user's module
    if len(index.class_names) == 1:  # unconditional
        options |= {"model.has_null_label": "false", "flow.class_dropout_prob": 0, "preview.cfg": 1}
    recipe = yaml.safe_load(shipped[config].read_text())
    if (held_out := recipe["data"]["held_out"]) > index.num_images // 10:
        options["data.held_out"] = held_out = index.num_images // 10
    if len(np.unique(np.delete(labels, hold_out(len(labels), held_out)))) < len(np.unique(labels)):
        options["data.held_out"] = held_out = 0  # some class would lose all its images
    if recipe["train"].get("batch_size", TrainConfig.batch_size) > (rest := index.num_images - held_out):
        options["train.batch_size"] = 1 << (rest.bit_length() - 1)  # a power of two, as most numbers of processes are
    names = (out.resolve().name + (f"-{number}" if number > 1 else "") for number in itertools.count(1))
    options["out"] = next(path for path in (Path("runs", name) for name in names) if not path.exists())
    given = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in options.items())
    return f"{command('train')} --config {config} {given}"
