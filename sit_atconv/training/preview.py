"""Previews of a training run: a grid of samples by class, from the same noise every time."""

from pathlib import Path

import torch

from sit_atconv.checkpoints.recipe import Recipe
from sit_atconv.data.codecs import Codec
from sit_atconv.data.pixels import to_uint8
from sit_atconv.flow import as_trained
from sit_atconv.runtime.plots import save_sample_grid
from sit_atconv.sampling import SampleStream
from sit_atconv.training.config import PreviewConfig

AT_ONCE = 16


@torch.inference_mode()
def draw_preview(model, codec: Codec, recipe: Recipe, preview: PreviewConfig, path: Path) -> None:
    """Draws samples of the first classes; previews of a run use the same noise and can be compared."""
    trained = [label for label in range(len(recipe.class_names)) if label not in recipe.empty_classes]
    y = torch.tensor(trained[: preview.num_classes]).repeat_interleave(preview.per_class)
    sampler = preview.sampler.settled(recipe.interpolant, recipe.null_label_of(model))
    noise = SampleStream(0, range(len(y))).randn((codec.channels, *[model.config.input_size] * 2))
    images = []
    for z, labels in zip(noise.split(AT_ONCE), y.split(AT_ONCE), strict=True):
        z = sampler(
            as_trained(model, recipe),
            z.to(model.device),
            labels.to(model.device),
            path=recipe.interpolant,
            prediction=recipe.prediction,
        )
        images.append(to_uint8(codec.decode(z)).cpu())
    pixels = torch.cat(images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"step {recipe.step}, EMA weights, cfg {sampler.cfg:g}, {preview.solver} {preview.num_steps}"
    save_sample_grid([*pixels], y.tolist(), recipe.class_names, path, title, columns=preview.per_class)
