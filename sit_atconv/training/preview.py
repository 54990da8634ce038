"""Previews of a training run: a grid of samples by class, from the same noise every time."""

from pathlib import Path

import torch

from sit_atconv.checkpoints.exported import Weights
from sit_atconv.checkpoints.recipe import Recipe
from sit_atconv.data.codecs import Codec
from sit_atconv.data.pixels import to_uint8
from sit_atconv.flow import as_trained
from sit_atconv.runtime.plots import save_sample_grid
from sit_atconv.sampling import Sampler, SampleStream
from sit_atconv.training.config import PreviewConfig

AT_ONCE = 16


def draw_previews(model, codec: Codec, recipe: Recipe, preview: PreviewConfig, folder: Path) -> None:
    """Draws samples of the first classes into `folder`, a picture for each number of solver steps.

    Previews of a run use the same noise and can be compared.
    """
    traits = Weights(model, recipe, folder).traits
    for sampler in preview.samplers:
        settled = sampler.settled(recipe.interpolant, **traits)
        several = f"-{sampler.steps}-steps" if len(preview.samplers) > 1 else ""
        draw_preview(model, codec, recipe, preview, settled, folder / f"step-{recipe.step:07d}{several}.png")


@torch.inference_mode()
def draw_preview(model, codec: Codec, recipe: Recipe, preview: PreviewConfig, sampler: Sampler, path: Path) -> None:
    """Draws one picture with a settled sampler."""
    trained = [label for label in range(len(recipe.class_names)) if label not in recipe.empty_classes]
    y = torch.tensor(trained[: preview.num_classes]).repeat_interleave(preview.per_class)
    images = []
    for start in range(0, len(y), AT_ONCE):
        labels = y[start : start + AT_ONCE].to(model.device)
        stream = SampleStream(0, range(start, start + len(labels)))
        z = sampler(
            as_trained(model, recipe),
            stream.randn((codec.channels, *[model.config.input_size] * 2), model.device),
            labels,
            path=recipe.interpolant,
            prediction=recipe.prediction,
            randn=stream.randn_like,
        )
        images.append(to_uint8(codec.decode(z)).cpu())
    pixels = torch.cat(images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"step {recipe.step}, EMA weights, cfg {sampler.cfg:g}, {sampler.solver} {sampler.steps}"
    save_sample_grid([*pixels], y.tolist(), recipe.class_names, path, title, columns=preview.per_class)
