"""Pictures for people: labelled grids of samples and loss curves. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from sit_atconv.files import write_aside


def save_sample_grid(
    images: Sequence[np.ndarray],
    labels: Sequence[int],
    class_names: Sequence[str],
    path: Path,
    title: str,
    columns: int = 10,
) -> None:
    """One row for each class, its name at the left.

    Args:
        images: N of uint8 (H, W, 3), as a list or an array.
        labels: their N labels; a class shows its first `columns` images.
        class_names: names of labels 0, 1, ...
        path: where the PNG goes.
        title: what to say above.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    classes = np.unique(labels)
    _, height, width, _ = images.shape
    gap = max(1, height // 16)
    columns = min(columns, int(np.bincount(labels).max()))
    mosaic = np.full((len(classes) * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for row, label in enumerate(classes):
        for column, image in enumerate(images[labels == label][:columns]):
            top, left = row * (height + gap), column * (width + gap)
            mosaic[top : top + height, left : left + width] = image

    cell = max(0.6, min(2.0, height / 100))  # inches
    figure = Figure(figsize=(columns * cell + 1.6, len(classes) * cell + 0.7), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(mosaic, interpolation="nearest")
    axes.set_yticks([row * (height + gap) + height / 2 for row in range(len(classes))])
    axes.set_yticklabels([class_names[label] for label in classes])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=9)
    _save(figure, path)


def save_loss_curve(steps: Sequence[int], losses: Sequence[float], path: Path, title: str) -> None:
    """Training loss against optimizer steps."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#2a6f97", linewidth=1.5)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    write_aside(path, lambda partial: figure.savefig(partial, dpi=120))
