import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from sit_atconv.data.images import DataConfig, Digits, ImageFolder, center_crop, load_digits, to_pil, to_uint8


@pytest.fixture
def photographs(tmp_path):
    """Two classes with crops of scikit-learn's photographs, one of them greyscale."""
    for name in ("china", "flower"):
        picture = Image.fromarray(load_sample_image(f"{name}.jpg"))
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "colour.png")
        picture.convert("L").resize((100, 80)).save(tmp_path / name / "grey.jpg")
    return tmp_path


def test_uint8_rule():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.5, 0.9999, 1.0, 2.0])
    assert to_uint8(x).tolist() == [0, 0, 128, 191, 255, 255, 255]
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)


def test_digits_are_scikit_learns():
    digits = Digits()
    image, label = digits[5]
    assert len(digits) == 1797 and image.shape == (1, 8, 8) and label == 5
    assert torch.equal(to_uint8(image)[0], torch.from_numpy(load_digits()[0][5]))
    assert digits.images.min() == -1 and digits.images.max() == 1


def test_folder_of_classes(photographs):
    images = ImageFolder(photographs, 64)
    assert images.class_names == ("china", "flower") and len(images) == 4
    image, label = images[3]
    assert image.shape == (3, 64, 64) and label == 1 and image.min() >= -1 and image.max() <= 1
    assert torch.equal(image[0], image[1])  # greyscale repeated
    expected = np.array(center_crop(Image.open(photographs / "china" / "colour.png"), 64))
    assert np.array_equal(np.array(to_pil(to_uint8(images[0][0]))), expected)


def test_flat_folder_is_one_class(photographs):
    images = ImageFolder(photographs / "china", 16)
    assert images.class_names == ("images",) and images[1][1] == 0


def test_crop_takes_the_middle():
    picture = Image.new("RGB", (300, 100))
    picture.paste((255, 0, 0), (100, 0, 200, 100))
    assert np.array(center_crop(picture, 100))[..., 0].min() == 255
    assert center_crop(Image.new("RGB", (31, 77)), 32).size == (32, 32)


def test_errors_name_the_place(photographs, tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        ImageFolder(tmp_path / "nowhere", 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no images"):
        DataConfig(images=str(tmp_path / "empty")).open_images()
    Image.new("RGB", (8, 8)).save(photographs / "stray.png")
    with pytest.raises(ValueError, match=r"stray\.png lies beside class folders"):
        ImageFolder(photographs, 8)
    (tmp_path / "empty" / "damaged.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"damaged\.png cannot be read as an image"):
        ImageFolder(tmp_path / "empty", 8)[0]
