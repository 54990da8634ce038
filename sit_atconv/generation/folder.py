"""The folder that samples are written to; what is in it is always whole, and of one setting."""

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

READ_AT_ONCE = 64  # images, when they are gathered
OF_NO_SAMPLE = ["num_samples"]  # the settings on which sample i does not depend


class SamplesFolder:
    """Samples, and what they are of.

        manifest.json    settings, labels, identity of the weights, versions, speed
        images/*.png     one file for each sample, named by its index
        latents/*.npy    if asked for: float32 (C, h, w), what the codec decoded
        samples.npz      all of them: arr_0, uint8 (N, H, W, 3), as the ADM evaluator reads
        grid.png         a labelled picture of the first of each class
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = self.folder / "manifest.json"
        self.images = self.folder / "images"
        self.latents = self.folder / "latents"
        self.npz = self.folder / "samples.npz"
        self.grid = self.folder / "grid.png"

    def read_manifest(self) -> dict:
        """{} where nothing has been begun. ValueError: what is there is no manifest."""
        if not self.manifest.exists():
            return {}
        try:
            manifest = json.loads(self.manifest.read_text())
            return {**manifest, "settings": dict(manifest["settings"])}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.manifest} is damaged: delete {self.folder}, or give another --out") from error

    def check(self, settings: dict) -> None:
        """Raises ValueError where the folder holds anything but samples of these settings, as many or fewer."""
        if self.folder.is_file():
            raise ValueError(f"{self.folder} is a file: give another --out")
        entries = self.folder.iterdir() if self.folder.exists() else ()
        if not self.manifest.exists() and not all(path.name.startswith(".") for path in entries):
            raise ValueError(f"{self.folder} is not empty and has no manifest.json: give another --out")
        manifest = self.read_manifest()
        held = manifest.get("settings", settings)
        num_held, num_samples = held.get("num_samples", 0), settings.get("num_samples", 0)
        changed = differences(held, settings, ignored=OF_NO_SAMPLE)
        if not changed and num_held > num_samples:
            use = "use the first of them (eval/fid.py --num-samples)" if manifest.get("complete") else \
                f"complete them with --num-samples {num_held}"
            raise ValueError(f"{self.folder} is of {num_held} samples, and {num_samples} are asked for: give another "
                             f"--out, or {use}")
        if changed:
            raise ValueError(f"{self.folder} holds other samples ({'; '.join(changed)}): give another --out")

    def with_fewer(self, settings: dict) -> Path | None:
        """A neighbour of this folder that holds fewer samples of the same settings, or None."""
        for path in sorted(self.folder.parent.glob("*/manifest.json")):
            with contextlib.suppress(ValueError, KeyError):  # a damaged or foreign one helps nobody
                held = SamplesFolder(path.parent).read_manifest()["settings"]
                has_fewer = held["num_samples"] < settings["num_samples"]
                if has_fewer and not differences(held, settings, ignored=OF_NO_SAMPLE):
                    return path.parent
        return None

    def begin(self, settings: dict, where: dict, num_missing: int, latents: bool = False) -> None:
        """Makes ready what `check` has found to be empty or of these settings.

        Args:
            settings: what the images depend on.
            where: device, processes and versions that will draw what is missing.
            num_missing: how many that are.
            latents: whether they are wanted too.
        """
        manifest = self.read_manifest()
        sessions = manifest.get("sessions", [])
        if manifest and manifest["settings"] != settings:  # there will be more: what was gathered is not all of them
            self.npz.unlink(missing_ok=True)
        self.update_manifest({"complete": False, "settings": settings,
                              "sessions": [*sessions, {"missing": num_missing, **where}]})
        for folder in (self.folder, self.images, *([self.latents] if latents else [])):
            folder.mkdir(exist_ok=True)
            for partial in folder.glob(PARTIAL + "*"):
                partial.unlink()

    def update_manifest(self, changes: dict) -> dict:
        """Writes the manifest with these changes, and returns it."""
        manifest = {**self.read_manifest(), **changes}
        write_aside(self.manifest, json.dumps(manifest, indent=1))
        return manifest

    def missing(self, num_samples: int, latents: bool = False) -> list[int]:
        """The indices without an image that is whole, or without a latent."""
        written = {i for i, path in _by_index(self.images, "png").items() if _is_whole_png(path)}
        if latents:
            written &= _by_index(self.latents, "npy").keys()
        return [i for i in range(num_samples) if i not in written]

    def check_room(self, num_samples: int, pixels: int, npz: bool, latent_bytes: int) -> None:
        """Raises ValueError where the disk is too small for what is to come.

        Args:
            num_samples: how many images there will be; a PNG may be as large as its pixels.
            pixels: bytes of one image without compression.
            npz: whether it is wanted.
            latent_bytes: of one latent; 0 where they are not wanted.
        """
        num_missing = max(0, num_samples - len(_by_index(self.images, "png")))
        gathered = num_samples * pixels if npz and (num_missing or not self.npz.exists()) else 0
        check_room(self.folder, num_missing * (pixels + latent_bytes) + gathered)

    def write_sample(self, index: int, image: Tensor, latent: Tensor | None = None) -> None:
        """An image, uint8 (C, H, W) of one or three channels, and before it the latent it was decoded from."""
        if latent is not None:
            array = latent.float().numpy()
            write_aside(self.latents / f"{index:06d}.npy", lambda partial: np.save(partial, array))
        write_aside(self._image(index), lambda path: to_pil(image).save(path, format="PNG"))

    def read_image(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3). ValueError: the file is damaged; the message names it."""
        path = self._image(index)
        try:
            with Image.open(path) as file:
                return np.array(file)
        except (OSError, SyntaxError) as error:  # what Pillow raises for a damaged PNG
            raise ValueError(f"{path} cannot be read as an image: delete it and run the same command again") from error

    def write_npz(self, num_samples: int) -> None:
        """Gathers the images into arr_0, a few at a time: memory stays small whatever their number."""
        shape = (num_samples, *self.read_image(0).shape)
        write_aside(self.npz, lambda path: write_npz(path, self._images_of(shape), shape))

    def _images_of(self, shape: tuple[int, int, int, int]) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor() as pool, tqdm(desc="gathering", total=shape[0], unit="image") as progress:
            for start in range(0, shape[0], READ_AT_ONCE):
                indices = range(start, min(start + READ_AT_ONCE, shape[0]))
                for index, image in zip(indices, pool.map(self.read_image, indices), strict=True):
                    if image.shape != shape[1:]:
                        raise ValueError(f"{self._image(index)} is of another size: delete it and run the same command "
                                         "again")
                    yield image
                    progress.update()

    def _image(self, index: int) -> Path:
        return self.images / f"{index:06d}.png"


def _by_index(folder: Path, suffix: str) -> dict[int, Path]:
    """Index -> file, of files named as ours."""
    if not folder.is_dir():
        return {}
    found = (re.fullmatch(rf"(\d{{6,}})\.{suffix}", name) for name in os.listdir(folder))
    return {int(match[1]): folder / match[0] for match in found if match}


def _is_whole_png(path: Path) -> bool:
    """Whether its last chunk is there."""
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(-min(12, file.tell()), os.SEEK_END)
        return file.read()[4:8] == b"IEND"
