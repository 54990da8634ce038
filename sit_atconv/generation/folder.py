"""The folder of samples: complete files only, all drawn with the same settings."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sit_atconv.data.image_npz import write_npz
from sit_atconv.data.pixels import to_pil
from sit_atconv.runtime.files import PARTIAL, check_room, write_aside
from sit_atconv.runtime.settings import differences

READ_AT_ONCE = 64  # images in memory while samples.npz is written
OF_NO_SAMPLE = ["num_samples"]  # settings that do not change sample i


class SamplesFolder:
    """A folder of samples.

    manifest.json    settings, labels, identity of the weights, versions, speed
    images/*.png     one file for each sample, named by its index
    latents/*.npy    optional: what the codec decoded, float32 (C, h, w)
    samples.npz      all images as arr_0, uint8 (N, H, W, 3), which the ADM evaluator reads
    grid.png         a labelled picture of the first samples of each class
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = self.folder / "manifest.json"
        self.images = self.folder / "images"
        self.latents = self.folder / "latents"
        self.npz = self.folder / "samples.npz"
        self.grid = self.folder / "grid.png"

    def read_manifest(self) -> dict:
        """Returns the manifest, or {} if there is none. ValueError: it is damaged."""
        if not self.manifest.exists():
            return {}
        try:
            manifest = json.loads(self.manifest.read_text())
            return {**manifest, "settings": dict(manifest["settings"])}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.manifest} is damaged: delete {self.folder}, or give another --out") from error

    def check(self, settings: dict) -> None:
        """Raises ValueError if the folder holds other files, samples of other settings, or more samples."""
        if self.folder.is_file():
            raise ValueError(f"{self.folder} is a file: give another --out")
        entries = self.folder.iterdir() if self.folder.exists() else ()
        if not self.manifest.exists() and not all(path.name.startswith(".") for path in entries):
            raise ValueError(f"{self.folder} is not empty and has no manifest.json: give another --out")
        manifest = self.read_manifest()
        held = manifest.get("settings", settings)
        if changed := differences(held, settings, ignored=OF_NO_SAMPLE):
            raise ValueError(f"{self.folder} holds other samples ({'; '.join(changed)}): give another --out")
        num_held, num_samples = held.get("num_samples", 0), settings.get("num_samples", 0)
        if num_held > num_samples:
            remedy = (
                f"complete them with --num-samples {num_held}"
                if not manifest.get("complete")
                else "evaluate the first ones only (eval/fid.py --num-samples)"
            )
            raise ValueError(
                f"{self.folder} is a folder of {num_held} samples, more than --num-samples {num_samples}: "
                f"give another --out, or {remedy}"
            )

    def with_fewer(self, settings: dict) -> Path | None:
        """Returns a folder beside this one with fewer samples of the same settings, or None."""
        for path in sorted(self.folder.parent.glob("*/manifest.json")):
            with contextlib.suppress(ValueError, KeyError):  # skip damaged manifests and those of other programs
                held = SamplesFolder(path.parent).read_manifest()["settings"]
                has_fewer = held["num_samples"] < settings["num_samples"]
                if has_fewer and not differences(held, settings, ignored=OF_NO_SAMPLE):
                    return path.parent
        return None

    def begin(self, settings: dict, session: dict, latents: bool = False) -> None:
        """Prepares a checked folder for drawing; `session` records what draws how many missing samples."""
        manifest = self.read_manifest()
        if manifest and manifest["settings"] != settings:  # more samples will follow, and the npz lacks them
            self.npz.unlink(missing_ok=True)
        sessions = [*manifest.get("sessions", []), session]
        self.update_manifest({"complete": False, "settings": settings, "sessions": sessions})
        for folder in (self.folder, self.images, *([self.latents] if latents else [])):
            folder.mkdir(exist_ok=True)
            for partial in folder.glob(PARTIAL + "*"):
                partial.unlink()

    def update_manifest(self, changes: dict) -> dict:
        """Writes the manifest with these changes and returns it."""
        manifest = {**self.read_manifest(), **changes}
        write_aside(self.manifest, json.dumps(manifest, indent=1))
        return manifest

    def missing(self, num_samples: int, latents: bool = False) -> list[int]:
        """Returns the indices that lack a complete image or, with `latents`, a latent."""
        written = {i for i, path in _by_index(self.images, "png").items() if _is_whole_png(path)}
        if latents:
            written &= _by_index(self.latents, "npy").keys()
        return [i for i in range(num_samples) if i not in written]

    def check_room(self, num_samples: int, pixels: int, npz: bool, latent_bytes: int) -> None:
        """Raises ValueError if the disk has too little room for the missing files.

        An image has `pixels` bytes, and its PNG may be as large; `latent_bytes` is 0 without latents.
        """
        num_missing = max(0, num_samples - len(_by_index(self.images, "png")))
        npz_bytes = num_samples * pixels if npz and (num_missing or not self.npz.exists()) else 0
        check_room(self.folder, num_missing * (pixels + latent_bytes) + npz_bytes)

    def write_sample(self, index: int, image: Tensor, latent: Tensor | None = None) -> None:
        """Writes the latent, if given, and then the image, uint8 (1 or 3, H, W)."""
        if latent is not None:
            array = latent.float().numpy()
            write_aside(self.latents / f"{index:06d}.npy", lambda partial: np.save(partial, array))
        write_aside(self._image(index), lambda path: to_pil(image).save(path, format="PNG"))

    def read_image(self, index: int) -> np.ndarray:
        """Returns image `index`, uint8 (H, W, 3). ValueError: the file is damaged; the message names it."""
        path = self._image(index)
        try:
            with Image.open(path) as file:
                return np.array(file)
        except (OSError, SyntaxError) as error:  # Pillow raises these for a damaged PNG
            raise ValueError(f"{path} cannot be read as an image: delete it and run the same command again") from error

    def write_npz(self, num_samples: int) -> None:
        """Writes samples.npz, a few images at a time, so that memory does not grow with their number."""
        shape = (num_samples, *self.read_image(0).shape)
        write_aside(self.npz, lambda path: write_npz(path, self._images_of(shape), shape))

    def _images_of(self, shape: tuple[int, int, int, int]) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor() as pool, tqdm(desc="writing samples.npz", total=shape[0], unit="image") as progress:
            for start in range(0, shape[0], READ_AT_ONCE):
                indices = range(start, min(start + READ_AT_ONCE, shape[0]))
                for index, image in zip(indices, pool.map(self.read_image, indices), strict=True):
                    if image.shape != shape[1:]:
                        raise ValueError(
                            f"{self._image(index)} has another size: delete it and run the same command again"
                        )
                    yield image
                    progress.update()

    def _image(self, index: int) -> Path:
        return self.images / f"{index:06d}.png"


def _by_index(folder: Path, suffix: str) -> dict[int, Path]:
    """Returns the files of a folder whose names are an index and this suffix, by index."""
    if not folder.is_dir():
        return {}
    found = (re.fullmatch(rf"(\d{{6,}})\.{suffix}", name) for name in os.listdir(folder))
    return {int(match[1]): folder / match[0] for match in found if match}


def _is_whole_png(path: Path) -> bool:
    """True if the last chunk of the file is there."""
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(-min(12, file.tell()), os.SEEK_END)
        return file.read()[4:8] == b"IEND"
