"""Training of the extractor `digits`.

    python -m sit_atconv.evaluation.train_digit_features [--out FILE.safetensors]

Trains `DigitClassifier` with a fixed seed on 1,437 of scikit-learn's 1,797 digits, in half a minute, and prints its
accuracy on the other 360. The metadata of the shipped file name the versions it was made with.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import trange

from sit_atconv.data.images import load_digits
from sit_atconv.data.pixels import to_float
from sit_atconv.encoders.digit_features import WEIGHTS, DigitClassifier

SEED, EPOCHS, BATCH_SIZE, HELD_OUT = 0, 40, 64, 360


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="file for the weights (default: the shipped file)")
    out = parser.parse_args().out

    torch.manual_seed(SEED)
    pixels, labels = map(torch.from_numpy, load_digits())
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(SEED))
    held_out, train = order[:HELD_OUT], order[HELD_OUT:]
    images = to_float(pixels)[:, None]
    classifier = DigitClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in trange(EPOCHS, unit="epoch"):
        for batch in train[torch.randperm(len(train))].split(BATCH_SIZE):
            noisy = images[batch] + 0.1 * torch.randn(len(batch), 1, 8, 8)
            loss = F.cross_entropy(classifier(noisy)[1], labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()

    with torch.inference_mode():
        correct = classifier(images[held_out])[1].argmax(1) == labels[held_out]
    report = {
        "command": "python -m sit_atconv.evaluation.train_digit_features",
        "seed": SEED,
        "held_out_accuracy": round(correct.float().mean().item(), 4),
        "held_out_images": HELD_OUT,
        "torch": torch.__version__,
    }
    save_file(classifier.state_dict(), out, metadata={key: str(value) for key, value in report.items()})
    print(json.dumps(report | {"file": str(out), "bytes": out.stat().st_size}))


if __name__ == "__main__":
    main()
