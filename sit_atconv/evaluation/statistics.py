"""Gaussians fitted to features: moments that add and subtract, and the files that hold a reference's."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sit_atconv.data.image_npz import IMAGES, ImageNpz, write_npz
from sit_atconv.evaluation.image_sets import ImageSet, digest_of, open_image_set
from sit_atconv.files import write_aside

NAMES = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # of ADM's files
RECIPE = "recipe"       # what --make-reference adds to them
IMAGES_KEPT = 10_000    # as in ADM's files, for precision and recall


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D), float64."""

    mu: np.ndarray
    sigma: np.ndarray


class Moments:
    """Number, sum and scatter of features (N, D), in float64 about a fixed origin; those of parts add and subtract."""

    def __init__(self, origin: Tensor, num: int = 0, total: Tensor | float = 0.0, scatter: Tensor | float = 0.0):
        self.origin, self.num, self.total, self.scatter = origin.double(), num, total, scatter

    def add(self, features: Tensor) -> None:
        centred = features.double() - self.origin
        self.num += len(centred)
        self.total = self.total + centred.sum(0)
        self.scatter = self.scatter + centred.T @ centred

    def __sub__(self, part: "Moments") -> "Moments":
        return Moments(self.origin, self.num - part.num, self.total - part.total, self.scatter - part.scatter)

    def __add__(self, part: "Moments") -> "Moments":
        return Moments(self.origin, self.num + part.num, self.total + part.total, self.scatter + part.scatter)

    def gaussian(self) -> Gaussian:
        """With the unbiased covariance, as numpy's and ADM's."""
        mean = self.total / self.num
        sigma = (self.scatter - torch.outer(mean, self.total)) / (self.num - 1)
        return Gaussian((self.origin + mean).numpy(), sigma.numpy())


def fit_gaussian(features: Tensor) -> Gaussian:
    """To features (N, D), N at least 2."""
    moments = Moments(features.double().mean(0))
    moments.add(features)
    return moments.gaussian()


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Args:
        name: what the user called it.
        gaussians: "features" for FID and "spatial" for sFID, where the file holds them; {} where they are to be fitted
            to the images.
        images: for precision, recall and KID; None where there are none.
        recipe: what `--make-reference` wrote down; {} in others' files.
    """

    name: str
    gaussians: dict[str, Gaussian]
    images: ImageSet | None
    recipe: dict = field(default_factory=dict)

    def content(self) -> str | None:
        """Digest of the statistics; None where there are images alone."""
        if not self.gaussians:
            return None
        arrays = [array for gaussian in self.gaussians.values() for array in (gaussian.mu, gaussian.sigma)]
        return digest_of(*(hashlib.sha256(np.ascontiguousarray(array)).hexdigest() for array in arrays))


def open_reference(source: str, crop_to: int | None = None) -> Reference:
    """A reference: statistics as ADM publishes them, with images or without, or anything `open_image_set` takes.

    Args:
        source: an `.npz` with mu and sigma, for sFID mu_s and sigma_s, for precision, recall and KID images arr_0; or
            images.
        crop_to: side that the images of a folder are cropped to, by ADM's rule.

    Raises:
        ValueError: nothing of that kind is there, or the statistics are of impossible shapes or values.
    """
    path = Path(source)
    npz = ImageNpz(path) if path.is_file() and path.name != "manifest.json" else None
    if npz is None or "mu" not in npz.names:
        if npz is not None and IMAGES not in npz.names:
            raise ValueError(f"{source} holds {npz.names}: a reference has mu and sigma, or images as {IMAGES}")
        return Reference(source, {}, open_image_set(source, crop_to))
    if crop_to:
        raise ValueError(f"--image-size crops the images of a folder, and {source} holds statistics")
    gaussians = {output: Gaussian(*(npz.read(name).astype(np.float64) for name in names))
                 for output, names in NAMES.items() if names[0] in npz.names}
    for output, gaussian in gaussians.items():
        mu, sigma = gaussian.mu, gaussian.sigma
        is_finite = np.isfinite(mu).all() and np.isfinite(sigma).all()
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not is_finite:
            raise ValueError(f"{NAMES[output][0]} and {NAMES[output][1]} of {source} are {mu.shape} and {sigma.shape} "
                             "and must be (D,) and (D, D), all finite: the file is damaged, or no reference")
    return Reference(source, gaussians, open_image_set(source) if IMAGES in npz.names else None, _read_recipe(npz))


def _read_recipe(npz: ImageNpz) -> dict:
    try:
        return dict(json.loads(str(npz.read(RECIPE)))) if RECIPE in npz.names else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{RECIPE} of {npz.path} is not what --make-reference writes ({error})") from error


def save_reference(path: Path, gaussians: dict[str, Gaussian], images: ImageSet, recipe: dict) -> None:
    """Writes a file that `open_reference` and ADM's evaluator read; of the images, `IMAGES_KEPT` from all over."""
    chosen = np.linspace(0, len(images) - 1, min(IMAGES_KEPT, len(images))).astype(int).tolist()
    arrays = {name: array for output, gaussian in gaussians.items()
              for name, array in zip(NAMES[output], (gaussian.mu, gaussian.sigma), strict=True)}
    pixels = (images.read(i, i + 1)[0].permute(1, 2, 0).contiguous().numpy() for i in chosen)
    shape = (len(chosen), *images.size, 3)
    text = np.array(json.dumps({**recipe, "images_kept": len(chosen)}))
    write_aside(path, lambda partial: write_npz(partial, pixels, shape, **arrays, **{RECIPE: text}))
