"""Quality of generated digits: legible, of the right distribution, diverse, and no copies of training images.

They are read by an independent classifier and compared with two halves of the real digits.
"""

from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist, pdist
from sklearn.svm import SVC

from sit_atconv.data.digits import load_digits
from sit_atconv.evaluation.extractors import open_extractor
from sit_atconv.evaluation.features import extract_features
from sit_atconv.evaluation.gaussians import fit_gaussian
from sit_atconv.evaluation.image_sets import ImageSet
from sit_atconv.evaluation.metric_functions import frechet_distance


@dataclass(frozen=True)
class Quality:
    """Measurements of a set of digits, most of them relative to the same measurement of real digits."""

    accuracy: float  # share that the classifier reads as their label
    worst_class_accuracy: float
    frechet_to_half: float  # Frechet distance to all real digits, over the distance between two real halves
    frechet_to_noise: float  # the same distance, over that from noise to real digits
    spread: float  # mean distance between two digits of one class, over the same of real digits
    nearest: float  # median distance to the nearest real digit, over that from one real half to the other

    def failures(self) -> list[str]:
        bounds = {
            "accuracy": self.accuracy >= 0.95,
            "worst_class_accuracy": self.worst_class_accuracy >= 0.85,
            "frechet_to_half": self.frechet_to_half <= 5,
            "frechet_to_noise": self.frechet_to_noise < 0.1,
            "spread": self.spread >= 0.8,
            "nearest": self.nearest >= 0.7,
        }
        return [name for name, holds in bounds.items() if not holds]


def measure_quality(images: np.ndarray, labels: np.ndarray) -> Quality:
    """Measures images uint8 (N, 8, 8) with labels (N,)."""
    real, real_labels = load_digits()
    order = np.random.default_rng(0).permutation(len(real))
    half, other = real[order[::2]], real[order[1::2]]
    noise = np.random.default_rng(1).normal(128, 127.5, (1000, 8, 8)).clip(0, 255).astype(np.uint8)

    correct = SVC().fit(_vectors(real), real_labels).predict(_vectors(images)) == labels
    return Quality(
        accuracy=correct.mean(),
        worst_class_accuracy=min(correct[labels == c].mean() for c in range(10)),
        frechet_to_half=_frechet(images, real) / _frechet(half, other),
        frechet_to_noise=_frechet(images, real) / _frechet(noise, real),
        spread=_spread(images, labels) / _spread(real, real_labels),
        nearest=_nearest(images, real) / _nearest(half, other),
    )


def _vectors(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 127.5 - 1


def _spread(images: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean([pdist(_vectors(images[labels == c])).mean() for c in range(10)]))


def _nearest(images: np.ndarray, training: np.ndarray) -> float:
    return float(np.median(cdist(_vectors(images), _vectors(training)).min(1)))


def _frechet(images: np.ndarray, reference: np.ndarray) -> float:
    network = open_extractor("digits")
    sets = [ImageSet("digits", np.repeat(part[..., None], 3, axis=-1)) for part in (images, reference)]
    return frechet_distance(*[fit_gaussian(extract_features(network, part, 512)["features"]) for part in sets])
