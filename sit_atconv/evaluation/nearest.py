"""Check for copies of training images: distances of samples to their nearest reference images."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sit_atconv.evaluation.image_sets import ImageSet
from sit_atconv.evaluation.metric_functions import GROUPS
from sit_atconv.evaluation.scores import Score, jackknife_error
from sit_atconv.runtime.plots import save_sample_grid

SHOWN = 10  # pairs in the picture


def nearest(
    queries: Tensor, blocks: Iterable[Tensor], device: torch.device | str = "cpu", own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the distance (N,) of each query to its nearest feature, and the place (N,) of that.

    Args:
        queries: features (N, D).
        blocks: features of all images, some at a time, each (M, D).
        own: place of each query among the images, which does not count as its neighbour.
    """
    x = queries.to(device)
    best = torch.full((len(x),), torch.inf, device=device)
    where = torch.zeros(len(x), dtype=torch.int64, device=device)
    rows, start = torch.arange(len(x), device=device), 0
    for block in blocks:
        distance = torch.cdist(x, block.to(device))  # (N, M)
        if own is not None:
            here = (own >= start) & (own < start + len(block))
            distance[rows[here], (own[here] - start).to(device)] = torch.inf
        least, place = distance.min(1)
        closer = least < best
        best, where = torch.where(closer, least, best), torch.where(closer, place + start, where)
        start += len(block)
    return best.cpu(), where.cpu()


def nearest_ratio(
    generated: Tensor,
    blocks: Sequence[Tensor],
    baseline: Tensor,
    own: Tensor | None,
    group: Tensor,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[Score, list[list[float]]]:
    """Returns how near samples are to the training images, relative to real images, and the closest pairs.

    The ratio is of median distances to the nearest training image.

    About 1 if samples are as far from the training images as real images are that were not trained on; copies are
    nearer.

    Args:
        generated: features (N, D) of the samples.
        blocks: features of all training images.
        baseline: features of the real images: held-out ones, or some of the training images.
        own: place of each of the latter among the training images, None for held-out ones.
        group: group of each sample (N,), for the error by the jackknife.

    Returns:
        The ratio, and for the samples nearest to an image [sample, image, distance], nearest first.
    """
    bar = tqdm(blocks, "nearest images", unit="block", disable=not progress, leave=False)
    usual = nearest(baseline, blocks, device, own)[0].median().item()
    distance, where = nearest(generated, bar, device)
    if usual == 0:
        raise ValueError("half of the real images are equal to others in these features, so that there is no ratio")
    closest = distance.argsort(stable=True)[:SHOWN].tolist()
    pairs = [[i, int(where[i]), float(distance[i])] for i in closest]
    value = distance.median().item() / usual
    if len(generated) < 2 * GROUPS:
        return Score(value), pairs
    without = [distance[group != g].median().item() / usual for g in range(GROUPS)]
    return Score(value, jackknife_error(without), without), pairs


def draw_nearest(pairs: Sequence[Sequence[float]], samples: ImageSet, images: ImageSet, path: Path) -> None:
    """Saves a picture of samples above the images that they are nearest to."""
    shown = [int(sample) for sample, *_ in pairs], [int(image) for _, image, _ in pairs]
    tiles = [
        source.read(i, i + 1)[0].permute(1, 2, 0).contiguous().numpy()
        for source, places in zip((samples, images), shown, strict=True)
        for i in places
    ]
    labels = np.repeat([0, 1], len(pairs)).tolist()
    title = f"samples nearest to an image of {Path(images.name).name}, and that image"
    save_sample_grid(tiles, labels, ["sample", "image"], path, title, columns=SHOWN)
