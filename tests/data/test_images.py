"""Data sets of images: which files, in which order, with which labels."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from sit_atconv.data.images import Digits, ImageFolder, list_images, load_digits
from sit_atconv.data.pixels import center_crop, to_pil


@pytest.fixture
def photographs(tmp_path):
    """Two classes with crops of scikit-learn's photographs, one of them greyscale."""
    for name in ("china", "flower"):
        picture = Image.fromarray(load_sample_image(f"{name}.jpg"))
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "colour.png")
        picture.convert("L").resize((100, 80)).save(tmp_path / name / "grey.jpg")
    return tmp_path


def labels_of(folder) -> dict[str, str]:
    images = ImageFolder(folder, 8)
    return {images.name(i): images.class_names[images.labels[i]] for i in range(len(images))}


def test_digits_are_scikit_learns():
    digits = Digits()
    image, label = digits[5, False]
    assert len(digits) == 1797 and image.shape == (1, 8, 8) and image.dtype == torch.uint8 and label == 5
    assert torch.equal(image[0], torch.from_numpy(load_digits()[0][5]))
    assert digits.images.min() == 0 and digits.images.max() == 255
    assert torch.equal(digits[5, True][0], image.flip(-1)) and not torch.equal(image, image.flip(-1))


def test_folder_of_classes(photographs):
    images = ImageFolder(photographs, 64)
    assert images.class_names == ("china", "flower") and len(images) == 4
    image, label = images[3, False]
    assert image.shape == (3, 64, 64) and label == 1 and image.dtype == torch.uint8
    assert torch.equal(image[0], image[1])  # greyscale repeated
    assert torch.equal(images[3, True][0], image.flip(-1))
    expected = np.array(center_crop(Image.open(photographs / "china" / "colour.png"), 64))
    assert np.array_equal(np.array(to_pil(images[0, False][0])), expected)


def test_flat_folder_is_one_class(photographs):
    assert labels_of(photographs / "china") == {"colour.png": "images", "grey.jpg": "images"}
    (photographs / "flower").rename(photographs / ".hidden")
    assert set(labels_of(photographs).values()) == {"china"}  # one subfolder is one class


def test_names_and_their_order(photographs):
    """Spaces, letters of any alphabet, suffixes in capitals; hidden files and other files are none."""
    for name in ("a b.PNG", "ä.png", "日本.png", "Z.jpeg", ".hidden.png", "notes.txt"):
        (photographs / "flower" / "grey.jpg").with_name(name).write_bytes(b"")
    (photographs / ".ipynb_checkpoints").mkdir()
    (photographs / ".ipynb_checkpoints" / "copy.png").write_bytes(b"")
    names = list_images(photographs)
    expected = ["Z.jpeg", "a b.PNG", "colour.png", "grey.jpg", "ä.png", "日本.png"]
    assert names == ["china/colour.png", "china/grey.jpg", *(f"flower/{name}" for name in expected)]
    assert [ImageFolder(photographs, 8).name(i) for i in range(8)] == names
    with pytest.raises(ValueError, match=r"flower/日本\.png cannot be read as an image"):
        ImageFolder(photographs, 8)[7, False]


def test_linked_classes_count_and_circles_are_found(photographs, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "one").symlink_to(photographs / "china")
    (elsewhere / "two").symlink_to(photographs / "flower")
    assert list(labels_of(elsewhere).values()) == ["one", "one", "two", "two"]
    (photographs / "flower" / "circle").symlink_to(photographs)
    with pytest.raises(ValueError, match="circle is a link to a folder that holds it"):
        ImageFolder(photographs, 8)
    (photographs / "flower" / "circle").unlink()
    (photographs / "flower" / "to china").symlink_to("../china")
    (photographs / "china" / "to flower").symlink_to("../flower")
    with pytest.raises(ValueError, match=r"to .* is a link to a folder that holds it"):
        ImageFolder(photographs, 8)


def test_a_class_name_that_is_no_text_is_shown_as_one(photographs):
    (photographs / "flower").rename(photographs / os.fsdecode(b"fl\xff"))
    images = ImageFolder(photographs, 8)
    assert images.class_names == ("china", "fl\ufffd") and images[3, False][1] == 1


def write_labels(folder, labels):
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


def test_labels_of_dataset_json(photographs):
    """As StyleGAN, EDM2 and REPA write them: subfolders are no classes then."""
    names = list_images(photographs)
    write_labels(photographs, [[name, label] for name, label in zip(names, (2, 0, 1, 2), strict=True)] + [["x.npy", 7]])
    assert ImageFolder(photographs, 8).class_names == ("0", "1", "2")
    assert list(labels_of(photographs).values()) == ["2", "0", "1", "2"]
    write_labels(photographs, None)
    assert set(labels_of(photographs).values()) == {"images"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"labels": [["china/colour.png", 0]]}', r"dataset.json gives no label to china/grey.jpg and 2 more"),
        ('{"labels": [["china/colour.png", 0], ["gone.png", 1]]}', "gives no label to"),
        ('{"labels": [["china/colour.png", 0.5]]}', r"gives china/colour.png the label 0.5"),
        ('{"labels": [["china/colour.png", -1]]}', "the label -1"),
        ('{"labels": [["china/colour.png", true]]}', "the label True"),
        ('{"labels": [["china/colour.png", 2000000]]}', "whole numbers from 0 to 999999"),
        ('{"labels": [["china/colour.png", 1], ["./china/colour.png", 2]]}', "colour.png 2 different labels"),
        ('{"labels": {"china/colour.png": 1}}', r'is not \{"labels": \[\["folder/name.png", 3\]'),
        ("{}", "dataset.json is not"),
        ("[", "dataset.json is not"),
    ],
)
def test_a_dataset_json_that_does_not_fit(photographs, content, message):
    (photographs / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        ImageFolder(photographs, 8)


def test_labels_of_images_that_are_not_there(photographs):
    write_labels(photographs, [[name, 0] for name in [*list_images(photographs), "gone.png"]])
    with pytest.raises(ValueError, match=r"labels images that are not there: gone\.png"):
        ImageFolder(photographs, 8)


def test_errors_name_the_place(photographs, tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        ImageFolder(tmp_path / "nowhere", 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no images"):
        ImageFolder(tmp_path / "empty", 8)
    with pytest.raises(ValueError, match="has classes without images: empty: fill"):
        ImageFolder(tmp_path, 8)
    Image.new("RGB", (8, 8)).save(photographs / "stray.png")
    with pytest.raises(ValueError, match=r"has images beside its class folders: stray\.png: move"):
        ImageFolder(photographs, 8)


def test_a_description_changes_with_names_labels_and_size(photographs):
    before = ImageFolder(photographs, 8).describe()
    assert ImageFolder(photographs, 8).describe() == before != ImageFolder(photographs, 16).describe()
    write_labels(photographs, [[name, 0] for name in list_images(photographs)])
    assert ImageFolder(photographs, 8).describe()["files"] != before["files"]
    (photographs / "dataset.json").unlink()
    (photographs / "china" / "grey.jpg").rename(photographs / "china" / "gray.jpg")
    assert ImageFolder(photographs, 8).describe()["files"] != before["files"]
