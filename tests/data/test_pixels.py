"""Image files of every kind become upright RGB, and pixels become uint8 by one rule."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from sit_atconv.data.pixels import center_crop, read_image, to_float, to_uint8


@pytest.fixture
def photograph():
    return Image.fromarray(load_sample_image("china.jpg")).crop((0, 0, 200, 120))


def test_uint8_rule():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.5, 0.9999, 1.0, 2.0])
    assert to_uint8(x).tolist() == [0, 0, 128, 191, 255, 255, 255]
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)


def test_crop_takes_the_middle():
    picture = Image.new("RGB", (300, 100))
    picture.paste((255, 0, 0), (100, 0, 200, 100))
    assert np.array(center_crop(picture, 100))[..., 0].min() == 255
    assert center_crop(Image.new("RGB", (31, 77)), 32).size == (32, 32)


def pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).int()


@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGB", "png"), ("RGBA", "png"), ("P", "png"), ("L", "png"), ("LA", "png"), ("1", "png"),
                         ("CMYK", "tif"), ("I;16", "png"), ("I;16", "tif")],
)
def test_every_kind_of_image_is_read_as_what_it_shows(photograph, tmp_path, mode, suffix):
    grey = photograph.convert("L")
    if mode == "I;16":
        shown, stored = grey.convert("RGB"), Image.fromarray(np.array(grey).astype(np.uint16) * 257)
    else:
        shown = stored = photograph.convert(mode)
    stored.save(tmp_path / f"image.{suffix}")
    read = read_image(tmp_path / f"image.{suffix}", 60)
    assert read.dtype == torch.uint8 and read.shape == (3, 60, 60)
    assert (read.int() - pixels(center_crop(shown.convert("RGB"), 60))).abs().max() <= 1
    assert read.float().std() > 20  # neither black nor white


def test_a_cmyk_jpeg_is_not_inverted(photograph, tmp_path):
    photograph.convert("CMYK").save(tmp_path / "image.jpg", quality=95)
    assert (read_image(tmp_path / "image.jpg", 60).int() - pixels(center_crop(photograph, 60))).abs().float().mean() < 4


def test_exif_turns_it_upright(photograph, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 270 degrees
    photograph.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "turned.png", 60).int(), pixels(center_crop(photograph, 60)))


def save_float(path):
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(path)


def save_32_bit(path):
    Image.fromarray(np.full((8, 8), 10**6, np.int32)).save(path)


def save_cut(path):
    Image.fromarray(load_sample_image("flower.jpg")).save(path, format="jpeg")
    path.write_bytes(path.read_bytes()[:20000])


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("empty.png", lambda path: path.write_bytes(b""), "cannot identify image file"),
        ("text.jpg", lambda path: path.write_text("no picture"), "cannot identify image file"),
        ("cut.jpg", save_cut, "truncated"),
        ("float.tif", save_float, "floating point"),
        ("large.tif", save_32_bit, "1000000"),
        ("pipe.png", lambda path: os.mkfifo(path), "it is no regular file"),
        ("broken.png", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40)), ""),
    ],
)
def test_what_cannot_be_read_is_an_error_with_its_reason(tmp_path, name, write, reason):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=f"cannot be read as an image: .*{reason}") as error:
        read_image(tmp_path / name, 8)
    assert str(tmp_path) not in str(error.value)  # the caller says where


def test_a_file_that_the_disk_does_not_give_is_another_error(tmp_path, monkeypatch):
    """Which nobody may skip: it may be there the next time."""
    (tmp_path / "link.png").symlink_to("nowhere")
    with pytest.raises(OSError, match=r"link\.png cannot be read: No such file"):
        read_image(tmp_path / "link.png", 8)

    def fails(path):
        raise OSError(5, "Input/output error")

    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(OSError, match=r"image\.png cannot be read: Input/output error"):
        read_image(tmp_path / "image.png", 8)
