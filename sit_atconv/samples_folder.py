"""The folder that samples are written to; what is in it is always whole, and of one setting."""

import json
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sit_atconv.data.pixels import to_pil
from sit_atconv.files import PARTIAL, check_room, write_aside

READ_AT_ONCE = 64  # images, when they are gathered


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
        """{} where nothing has been begun."""
        return json.loads(self.manifest.read_text()) if self.manifest.exists() else {}

    def check(self, settings: dict) -> None:
        """Raises ValueError where the folder holds anything but samples of these settings."""
        if self.folder.is_file():
            raise ValueError(f"{self.folder} is a file: give another --out")
        if not self.manifest.exists() and self._holds_anything():
            raise ValueError(f"{self.folder} is not empty and has no manifest.json: give another --out")
        held = self.read_manifest().get("settings", settings)
        changed = [f"{key} {held.get(key)!r} -> {new!r}" for key, new in settings.items() if held.get(key) != new]
        if changed:
            raise ValueError(f"{self.folder} holds other samples ({', '.join(changed)}): give another --out")

    def _holds_anything(self) -> bool:
        """Beside the hidden files of a command that was killed while it began."""
        return self.folder.exists() and any(not path.name.startswith(".") for path in self.folder.iterdir())

    def begin(self, settings: dict, latents: bool = False) -> None:
        """Makes ready what `check` has found to be empty or of these settings."""
        if not self.manifest.exists():
            self.write_manifest({"complete": False, "settings": settings})
        for folder in [self.images, *([self.latents] if latents else [])]:
            folder.mkdir(exist_ok=True)
            for partial in folder.glob(PARTIAL + "*"):  # of a process that was killed while it wrote
                partial.unlink()

    def missing(self, num_samples: int, latents: bool = False) -> list[int]:
        """The indices not written yet."""
        written = _indices(self.images, ".png")
        if latents:
            written &= _indices(self.latents, ".npy")
        return [i for i in range(num_samples) if i not in written]

    def check_room(self, num_missing: int, num_samples: int, shape: tuple[int, int, int], latent_bytes: int) -> None:
        """Raises ValueError where the disk is too small for what is to come.

        Args:
            num_missing: images to be written; a PNG may be as large as its pixels.
            num_samples: images of the npz; 0 where it is not wanted or there.
            shape: (H, W, 3) of an image.
            latent_bytes: of one latent; 0 where they are not wanted.
        """
        pixels = int(np.prod(shape))
        check_room(self.folder, num_missing * (pixels + latent_bytes) + num_samples * pixels)

    def write_manifest(self, content: dict) -> None:
        write_aside(self.manifest, json.dumps(content, indent=1))

    def write_sample(self, index: int, image: Tensor, latent: Tensor | None = None) -> None:
        """An image, uint8 (C, H, W) of one or three channels, and before it the latent it was decoded from."""
        if latent is not None:
            path = self.latents / f"{index:06d}.npy"
            write_aside(path, lambda partial: _save_array(partial, latent.float().numpy()))
        write_aside(self._image(index), lambda path: to_pil(image).save(path, format="PNG"))

    def read_image(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3)"""
        with Image.open(self._image(index)) as file:
            return np.array(file)

    def write_npz(self, num_samples: int) -> None:
        """Gathers the images into arr_0, a few at a time: memory stays small whatever their number."""

        def write(path: Path) -> None:
            shape = (num_samples, *self.read_image(0).shape)
            with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for image in tqdm(self._read_all(num_samples), "gathering", num_samples, unit="image"):
                    file.write(image.tobytes())

        write_aside(self.npz, write)

    def _read_all(self, num_samples: int) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor() as pool:
            for start in range(0, num_samples, READ_AT_ONCE):
                yield from pool.map(self.read_image, range(start, min(start + READ_AT_ONCE, num_samples)))

    def _image(self, index: int) -> Path:
        return self.images / f"{index:06d}.png"


def _indices(folder: Path, suffix: str) -> set[int]:
    return {int(path.stem) for path in folder.glob(f"[0-9]*{suffix}")}


def _save_array(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:  # np.save adds a suffix to a name
        np.save(file, array)
