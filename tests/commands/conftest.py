"""What tests of the encoding command share: a few images, and the command in this process."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image

from tests.conftest import encode_argv, load_command


def draw(path: Path, seed: int):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    Image.fromarray(np.kron(pixels, np.ones((8, 8, 1), np.uint8))).save(path)  # 48x48


@pytest.fixture
def images(tmp_path):
    """Two classes of four images."""
    folder = tmp_path / "images"
    for i in range(8):
        draw(folder / "bc"[i % 2] / f"{i}.png", i)
    return folder


@pytest.fixture
def argv(images, vae, tmp_path):
    """Shards of three images, batches of three."""
    return [*encode_argv(images, vae, tmp_path / "out"), "--batch-size", 3, "--shard-mib", 0.001]


@pytest.fixture
def encode(capsys):
    """encode(*argv) -> what the command printed, in this process."""
    threads = torch.get_num_threads()

    def run(*argv) -> str:
        load_command("sit_atconv/encode.py").main([*map(str, argv), "--num-workers", "0"])
        captured = capsys.readouterr()
        return captured.err + captured.out

    yield run
    torch.set_num_threads(threads)
    PartialState._reset_state()
