"""References that samples are compared with: statistics in ADM's format, images, or both."""

import hashlib
import json
import operator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sit_atconv.data import MAX_MEGAPIXELS
from sit_atconv.data.image_npz import IMAGES, ImageNpz, write_npz
from sit_atconv.data.pixels import Colour
from sit_atconv.evaluation.gaussians import Gaussian
from sit_atconv.evaluation.image_sets import (
    ImageSet,
    check_is_images,
    digest_of,
    evenly_spaced,
    folder_of,
    open_image_set,
)
from sit_atconv.runtime.files import write_aside

NAMES = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # in ADM's files
RECIPE = "recipe"  # added by --make-reference
COMPARED = 10_000  # images for precision, recall and KID, evenly spaced over the set; as many as in ADM's files


@dataclass(frozen=True)
class Reference:
    """Reference that samples are compared with.

    Args:
        name: path or word that the user gave.
        gaussians: "features" for FID and "spatial" for sFID, if the file has them; {} means to fit them to the images.
        images: images for precision, recall and KID, or None.
        recipe: recipe that `--make-reference` stored, {} in files of others.
    """

    name: str
    gaussians: dict[str, Gaussian]
    images: ImageSet | None
    recipe: dict = field(default_factory=dict)

    @property
    def num_fitted(self) -> int | None:
        """Number of images that the statistics are fitted to; None if the file does not say."""
        return self.recipe.get("num") if self.gaussians or self.images is None else len(self.images)

    def content(self) -> str | None:
        """Returns the digest of the statistics, or None if there are only images."""
        if not self.gaussians:
            return None
        arrays = [array for gaussian in self.gaussians.values() for array in (gaussian.mu, gaussian.sigma)]
        return digest_of(*(hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() for array in arrays))


def open_reference(
    source: str,
    crop_to: int | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
    background: Colour | None = None,
) -> Reference:
    """Opens statistics in ADM's format, with or without images, or anything that `open_image_set` accepts.

    Args:
        source: an `.npz` with mu and sigma, for sFID mu_s and sigma_s, and for precision, recall and KID images arr_0;
            or images.
        crop_to: side in pixels to crop the images of a folder to, by ADM's rule.
        max_megapixels: largest accepted file, in millions of pixels.
        background: as in `ImageSet`.

    Raises:
        ValueError: there is no reference, or the statistics have impossible shapes or values.
    """
    check_is_images(source)
    path = Path(source)
    npz = ImageNpz(path) if path.is_file() and folder_of(path) == path else None
    if npz is None or "mu" not in npz.names:
        if npz is not None and IMAGES not in npz.names:
            raise ValueError(f"{source} contains {npz.names}: give a file with mu and sigma, or images as {IMAGES}")
        return Reference(source, {}, open_image_set(source, crop_to, max_megapixels, background))
    if crop_to:
        raise ValueError(f"--image-size crops the images of a folder, and {source} holds statistics: leave it out")
    gaussians = {output: _read_gaussian(npz, *names) for output, names in NAMES.items() if names[0] in npz.names}
    return Reference(source, gaussians, open_image_set(source) if IMAGES in npz.names else None, _read_recipe(npz))


def _read_gaussian(npz: ImageNpz, mu_name: str, sigma_name: str) -> Gaussian:
    mu, sigma = npz.read(mu_name), npz.read(sigma_name)
    fault = None
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f":
        fault = f"are {mu.dtype} and {sigma.dtype}, not floating point"
    elif mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        fault = f"are of shapes {mu.shape} and {sigma.shape}, not (D,) and (D, D)"
    elif not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        fault = "are not finite"
    else:
        mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
        scale = np.abs(np.diagonal(sigma)).max(initial=0)
        if max(scale, np.abs(mu).max(initial=0)) > 1e12:
            fault = "have values above 1e12, unlike any features"
        elif np.abs(sigma - sigma.T).max(initial=0) > 1e-3 * scale:
            fault = "are not a mean and a covariance, which is symmetric"
        elif np.linalg.eigvalsh(sigma).min(initial=0) < -1e-3 * scale:
            fault = "are not a mean and a covariance, which has no negative eigenvalues"
    if fault:
        raise ValueError(
            f"{mu_name} and {sigma_name} of {npz.path} {fault}: the file is damaged or not a reference, "
            "give another --reference"
        )
    return Gaussian(mu, sigma)


def _read_recipe(npz: ImageNpz) -> dict:
    try:
        recipe = json.loads(str(npz.read(RECIPE))) if RECIPE in npz.names else {}
        dict(recipe.get("extractor", {}))
        operator.index(recipe.get("num", 0))
        return recipe
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{RECIPE} of {npz.path} is not one that --make-reference writes ({error}): give another --reference"
        ) from error


def save_reference(path: Path, gaussians: dict[str, Gaussian], images: ImageSet, recipe: dict) -> None:
    """Writes a file for `open_reference` and ADM's evaluator, with up to `COMPARED` of the images."""
    chosen = evenly_spaced(len(images), COMPARED)
    arrays = {
        name: array
        for output, gaussian in gaussians.items()
        for name, array in zip(NAMES[output], (gaussian.mu, gaussian.sigma), strict=True)
    }
    pixels = (images.read(i, i + 1)[0].permute(1, 2, 0).contiguous().numpy() for i in chosen)
    shape = (len(chosen), *images.size, 3)
    text = np.array(json.dumps({**recipe, "images_kept": len(chosen)}))
    write_aside(path, lambda partial: write_npz(partial, pixels, shape, **arrays, **{RECIPE: text}))
