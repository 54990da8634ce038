"""Accuracy of classifiers, counted once for each image over all processes, and its record."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from accelerate import Accelerator

from sit_atconv.classification.loading import Examples
from sit_atconv.runtime.files import write_aside


@dataclass(frozen=True)
class Accuracy:
    """Shares of images whose label is the model's first guess, or among its first five."""

    top1: float
    top5: float
    num_images: int

    def error(self, share: float) -> float:
        """Returns the binomial standard error of a share."""
        return math.sqrt(share * (1 - share) / self.num_images)

    def describe(self) -> dict[str, float]:
        """Returns the shares and their standard errors, for a record."""
        return {
            "top1": self.top1,
            "top1_error": self.error(self.top1),
            "top5": self.top5,
            "top5_error": self.error(self.top5),
        }

    def __str__(self) -> str:
        return (
            f"top-1 {self.top1:.2%} +- {self.error(self.top1):.2%}, top-5 {self.top5:.2%} +- "
            f"{self.error(self.top5):.2%}"
        )


@torch.inference_mode()
def evaluate(
    models: Mapping[str, nn.Module], batches: Iterable[Examples], accelerator: Accelerator
) -> dict[str, Accuracy]:
    """Returns the accuracy of each model on the images of all processes, which must all call it.

    Args:
        models: models by name, on the device; each returns to the mode that it was in.
        batches: the images of this process.
        accelerator: autocast of the forward passes, and the processes.
    """
    modes = {name: model.training for name, model in models.items()}
    counts = {name: torch.zeros(2, dtype=torch.int64, device=accelerator.device) for name in models}
    total = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    for model in models.values():
        model.eval()
    for x, y in batches:
        total += len(y)
        for name, model in models.items():
            with accelerator.autocast():
                logits = model(x)
            guesses = logits.topk(min(5, logits.shape[1])).indices
            hits = guesses == y[:, None]
            counts[name] += torch.stack([hits[:, 0].sum(), hits.sum()])
    for name, model in models.items():
        model.train(modes[name])
    num_images = int(accelerator.reduce(total, "sum"))
    hits_of = {name: accelerator.reduce(count, "sum").tolist() for name, count in counts.items()}
    return {
        name: Accuracy(first / num_images, five / num_images, num_images) for name, (first, five) in hits_of.items()
    }


def save_record(path: Path, accuracies: Mapping[str, Accuracy], about: dict) -> None:
    """Writes a JSON record: what was evaluated, and the accuracy of each kind of weights."""
    num_images = next(iter(accuracies.values())).num_images
    results = {name: accuracy.describe() for name, accuracy in accuracies.items()}
    write_aside(path, json.dumps({**about, "num_images": num_images, "accuracy": results}, indent=1))
