"""Training of the shipped extractors, `digits` and `fashion`.

    python -m sit_atconv.evaluation.train_features digits
    python -m sit_atconv.evaluation.train_features fashion --data idx:/usr/share/datasets/fashion-mnist

Trains a small classifier with a fixed seed and prints its accuracy on images that it has not seen: 360 of
scikit-learn's 1,797 digits, or the last 10,000 of Fashion-MNIST's 60,000. The metadata of the file name the versions
it was made with.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from sit_atconv.data.pixels import to_float
from sit_atconv.data.sources import DataConfig
from sit_atconv.encoders.shipped_features import ShippedFeatures
from sit_atconv.evaluation.extractors import SHIPPED
from sit_atconv.runtime.commands import user_errors

SEED = 0


@dataclass(frozen=True)
class Recipe:
    """Recipe of one extractor: AdamW with a cosine schedule, and a little noise added to the images."""

    images: str  # default of --data
    held_out: int
    epochs: int
    batch_size: int
    shuffled: bool  # before the held-out images are taken from the end


RECIPES = {
    "digits": Recipe("digits", held_out=360, epochs=40, batch_size=64, shuffled=True),
    "fashion": Recipe(
        "idx:/usr/share/datasets/fashion-mnist", held_out=10_000, epochs=8, batch_size=128, shuffled=False
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extractor", choices=RECIPES, help="extractor to train")
    parser.add_argument("--data", help="its images, as for --data.images (default: digits, or Debian's Fashion-MNIST)")
    parser.add_argument("--out", type=Path, help="file for the weights (default: the shipped file)")
    options = parser.parse_args()
    recipe, kind = RECIPES[options.extractor], SHIPPED[options.extractor]
    out = options.out or kind.weights
    with user_errors():
        data = DataConfig(images=options.data or recipe.images).open()[0]
    report = {"extractor": options.extractor, **train(kind, recipe, data), "torch": torch.__version__}
    state = report.pop("state")
    save_file(state, out, metadata={key: str(value) for key, value in report.items()})
    print(json.dumps(report | {"file": str(out), "bytes": out.stat().st_size}))


def train(kind: type[ShippedFeatures], recipe: Recipe, data) -> dict:
    """Returns the classifier's state dict, and its accuracy on the held-out images."""
    torch.manual_seed(SEED)
    images, labels = to_float(data.images), torch.from_numpy(data.labels)
    order = torch.arange(len(images))
    if recipe.shuffled:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
        held_out, used = order[: recipe.held_out], order[recipe.held_out :]
    else:
        held_out, used = order[-recipe.held_out :], order[: -recipe.held_out]
    classifier = kind.classifier_class()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    for epoch in range(recipe.epochs):
        batches = used[torch.randperm(len(used))].split(recipe.batch_size)
        for batch in tqdm(batches, desc=f"epoch {epoch + 1} of {recipe.epochs}", leave=False):
            noisy = images[batch] + 0.1 * torch.randn(len(batch), *images.shape[1:])
            loss = F.cross_entropy(classifier(noisy)[1], labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    with torch.inference_mode():
        guessed = torch.cat([classifier(images[part])[1].argmax(1) for part in held_out.split(1000)])
    accuracy = (guessed == labels[held_out]).float().mean().item()
    return {
        "state": classifier.state_dict(),
        "seed": SEED,
        "held_out_accuracy": round(accuracy, 4),
        "held_out_images": recipe.held_out,
    }


if __name__ == "__main__":
    main()
