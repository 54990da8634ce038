"""The folder that samples are written to; what is in it is always whole, and of one setting."""

import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from sit_atconv.data.pixels import to_pil
from sit_atconv.files import write_aside


class SamplesFolder:
    """Samples, and what they are of.

        manifest.json    settings, labels, identity of the weights, versions, speed
        images/*.png     one file for each sample, named by its index
        samples.npz      all of them: arr_0, uint8 (N, H, W, 3), as the ADM evaluator reads
        grid.png         a labelled picture of the first of each class
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = self.folder / "manifest.json"
        self.images = self.folder / "images"
        self.npz = self.folder / "samples.npz"
        self.grid = self.folder / "grid.png"

    def read_manifest(self) -> dict:
        """{} where nothing has been begun."""
        return json.loads(self.manifest.read_text()) if self.manifest.exists() else {}

    def check(self, settings: dict) -> None:
        """Raises ValueError where the folder holds anything but samples of these settings."""
        if self.folder.is_file():
            raise ValueError(f"{self.folder} is a file: give another --out")
        if not self.manifest.exists() and self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty and has no manifest.json: give another --out")
        held = self.read_manifest().get("settings", settings)
        changed = [f"{key} {held.get(key)!r} -> {new!r}" for key, new in settings.items() if held.get(key) != new]
        if changed:
            raise ValueError(f"{self.folder} holds other samples ({', '.join(changed)}): give another --out")

    def begin(self, settings: dict) -> None:
        self.images.mkdir(parents=True, exist_ok=True)
        if not self.manifest.exists():
            self.write_manifest({"complete": False, "settings": settings})

    def missing(self, num_samples: int) -> list[int]:
        """The indices not written yet."""
        return [i for i in range(num_samples) if not self._image(i).exists()]

    def write_manifest(self, content: dict) -> None:
        write_aside(self.manifest, json.dumps(content, indent=1))

    def write_image(self, index: int, image: Tensor) -> None:
        """uint8 (C, H, W), one or three channels."""
        write_aside(self._image(index), lambda path: to_pil(image).save(path, format="PNG"))

    def read_image(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3)"""
        with Image.open(self._image(index)) as file:
            return np.array(file)

    def write_npz(self, num_samples: int) -> None:
        """Gathers the images into arr_0, one after another: memory stays small whatever their number."""

        def write(path: Path) -> None:
            shape = (num_samples, *self.read_image(0).shape)
            with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for index in range(num_samples):
                    file.write(self.read_image(index).tobytes())

        write_aside(self.npz, write)

    def _image(self, index: int) -> Path:
        return self.images / f"{index:06d}.png"
