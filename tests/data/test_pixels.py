"""Tests of reading image files as upright RGB, of the crop and of the conversion to uint8."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from sit_atconv.data.image_rules import SUFFIXES
from sit_atconv.data.pixels import center_crop, read_image, read_picture, to_float, to_uint8


@pytest.fixture
def photograph():
    return Image.fromarray(load_sample_image("china.jpg")).crop((0, 0, 200, 120))


def test_uint8_rule():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.5, 0.9999, 1.0, 2.0])
    assert to_uint8(x).tolist() == [0, 0, 128, 191, 255, 255, 255]
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)


def test_crop_takes_the_centre():
    picture = Image.new("RGB", (300, 100))
    picture.paste((255, 0, 0), (100, 0, 200, 100))
    assert np.array(center_crop(picture, 100))[..., 0].min() == 255
    assert center_crop(Image.new("RGB", (31, 77)), 32).size == (32, 32)


def adm_crop(picture: Image.Image, size: int) -> Image.Image:
    """ADM's crop as published: enlarges the whole picture first."""
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def random_picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    levels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(np.where(levels > 127, 255, 0).astype(np.uint8) if rng.random() < 0.3 else levels)


def test_the_crop_equals_adms_for_every_shape():
    """Bitwise, for pictures that are enlarged whole and for those that are cut first."""
    rng = np.random.default_rng(0)
    shapes = [(30000, 4, 16), (4, 30000, 16), (999, 1, 7), (1, 999, 7), (577, 36, 36), (16 * 31 + 1, 31, 32)]
    while len(shapes) < 150:
        size = int(rng.integers(1, 40))
        short = int(rng.integers(1, 3 * size))
        sides = (short, min(int(short * 10 ** rng.uniform(0, 2.5)), 3000))
        shapes.append((*rng.permutation(sides).tolist(), size))
    for width, height, size in shapes:
        picture = random_picture(rng, width, height)
        found, expected = np.array(center_crop(picture, size)), np.array(adm_crop(picture, size))
        assert np.array_equal(found, expected), (width, height, size)


@pytest.mark.parametrize("sides", [(30000, 4), (4, 30000), (300000, 1)])
def test_an_extreme_shape_is_never_enlarged_whole(tmp_path, monkeypatch, sides):
    """Otherwise a file of a few hundred bytes takes gigabytes of memory."""
    Image.new("RGB", sides, (200, 100, 50)).save(tmp_path / "image.png")
    resize, made = Image.Image.resize, []
    monkeypatch.setattr(Image.Image, "resize", lambda *args, **kw: made.append(args[1]) or resize(*args, **kw))
    image = read_image(tmp_path / "image.png", 256)
    assert image.flatten(1).unique(dim=1).flatten().tolist() == [200, 100, 50]
    assert max((width * height for width, height in made), default=0) <= 16 * 256**2


def pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).int()


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", "png"),
        ("RGBA", "png"),
        ("P", "png"),
        ("L", "png"),
        ("LA", "png"),
        ("1", "png"),
        ("CMYK", "tif"),
        ("I;16", "png"),
        ("I;16", "tif"),
    ],
)
def test_every_pixel_format_is_read_correctly(photograph, tmp_path, mode, suffix):
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


def test_a_picture_is_turned_upright_by_its_exif_data(photograph, tmp_path):
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
        ("pipe.png", lambda path: os.mkfifo(path), "it is not a regular file"),
        ("broken.png", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40)), ""),
    ],
)
def test_an_unreadable_file_is_an_error_with_its_reason(tmp_path, name, write, reason):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=f"cannot be read as an image: .*{reason}") as error:
        read_image(tmp_path / name, 8)
    assert str(tmp_path) not in str(error.value)  # the caller adds the place


def test_a_missing_file_or_a_failing_disk_is_an_os_error(tmp_path, monkeypatch):
    """Such images are never skipped, since they may be readable the next time."""
    (tmp_path / "link.png").symlink_to("nowhere")
    with pytest.raises(OSError, match=r"link\.png cannot be read: No such file"):
        read_image(tmp_path / "link.png", 8)

    def fails(path):
        raise OSError(5, "Input/output error")

    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(OSError, match=r"image\.png cannot be read: Input/output error"):
        read_image(tmp_path / "image.png", 8)


def test_too_little_memory_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")

    def fails(path):
        raise MemoryError

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(OSError, match=r"image\.png cannot be read: out of memory .*fewer workers"):
        read_image(tmp_path / "image.png", 8)


def test_the_size_before_the_crop_is_that_of_the_upright_picture(photograph, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph.save(tmp_path / "turned.png", exif=exif)  # 200 wide, 120 high, shown turned
    image, size = read_picture(tmp_path / "turned.png", 60)
    assert image.shape == (3, 60, 60) and size == (200, 120)
    assert torch.equal(image, read_image(tmp_path / "turned.png", 60))


def test_the_error_for_a_large_scan_names_the_option_that_reads_it(tmp_path):
    Image.new("1", (1000, 451)).save(tmp_path / "scan.png")
    with pytest.raises(
        ValueError,
        match=r"it has 0\.5 megapixels, more than --max-megapixels 0\.4 allows \(training: "
        r"--data\.max_megapixels\)",
    ):
        read_image(tmp_path / "scan.png", 8, max_megapixels=0.4)
    assert read_image(tmp_path / "scan.png", 8, max_megapixels=0.5).shape == (3, 8, 8)


def test_pillows_own_limit_is_lifted_while_threads_read_and_restored_afterwards(tmp_path, monkeypatch):
    """Other code in the process may rely on the limit."""
    Image.new("RGB", (60, 40)).save(tmp_path / "image.gif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings(), ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("error")
        images = list(pool.map(read_image, [tmp_path / "image.gif"] * 20, [None] * 20))
    assert all(image.shape == (3, 40, 60) for image in images)
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(ValueError, match="megapixels"):
        read_image(tmp_path / "image.gif", 8, max_megapixels=0.001)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_pillow_decodes_every_suffix(photograph, tmp_path):
    """A file of each format that Pillow can write is read."""
    suffixes = SUFFIXES
    assert suffixes >= {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}  # the suffixes of rules 1
    assert suffixes >= {".jfif", ".jpe", ".gif", ".jp2", ".tga", ".pgm", ".pnm", ".apng", ".dib", ".mpo", ".psd"}
    assert not suffixes & {".pdf", ".eps", ".wmf", ".mpg", ".h5", ".grib", ".bufr", ".fits", ".pfm", ".mp4", ".txt"}
    kinds = {suffix: kind for suffix, kind in Image.registered_extensions().items() if suffix in suffixes}
    written = [suffix for suffix, kind in kinds.items() if kind in Image.SAVE]
    assert len(written) > 25
    for suffix in written:
        shown = photograph.convert("1" if kinds[suffix] in ("XBM", "MSP") else "RGB").resize((64, 64))
        shown = shown.quantize() if kinds[suffix] == "BLP" else shown
        shown.save(tmp_path / f"image{suffix}")
        assert read_image(tmp_path / f"image{suffix}", 60).float().std() > 20, suffix
