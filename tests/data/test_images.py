"""Data sets of images: which files, in which order, with which labels."""

import json
import os
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from sit_atconv.data.digits import Digits, load_digits
from sit_atconv.data.images import ImageFolder, left_out_line, list_images
from sit_atconv.data.pixels import center_crop, to_pil


@pytest.fixture
def photographs(tmp_path):
    """Returns a folder of two classes with a colour and a greyscale crop of scikit-learn's photographs each."""
    for name in ("china", "flower"):
        picture = Image.fromarray(load_sample_image(f"{name}.jpg")).crop((200, 100, 460, 300))
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
    """Names may hold spaces, letters of any alphabet and upper-case suffixes; hidden files are not images."""
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


def test_linked_classes_are_read_and_circular_links_refused(photographs, tmp_path_factory):
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


def test_a_class_name_that_is_not_utf8_is_shown_with_replacement_characters(photographs):
    (photographs / "flower").rename(photographs / os.fsdecode(b"fl\xff"))
    images = ImageFolder(photographs, 8)
    assert images.class_names == ("china", "fl\ufffd") and images[3, False][1] == 1


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_classes_named_by_numbers_are_in_numerical_order(tmp_path):
    images = ImageFolder(touch(tmp_path, "10/a.png", "2/a.png", "02/a.png", "b/a.png", "²/a.png", "A/a.png"), 8)
    assert images.class_names == ("02", "2", "10", "A", "b", "²")
    assert labels_of(tmp_path)["10/a.png"] == "10" and images.describe()["rules"] == 2


def test_rules_1_keep_labels_and_digest_of_old_data_sets(tmp_path):
    """The digests are those stored in runs and latents of that time."""
    names = [
        "10/a.png",
        "2/b.JPG",
        "@eaDir/d.tif",
        "cafe\u0301/e.webp",
        os.fsdecode(b"fl\xff/g.bmp"),
        "n01440764/f.jpeg",
    ]
    touch(tmp_path, *names, "2/c.gif", "n01440764/notes.txt")
    images = ImageFolder(tmp_path, 8, rules=1)
    assert images.class_names == ("10", "2", "@eaDir", "cafe\u0301", "fl\ufffd", "n01440764")
    digest = "1584ceb80539ac38c95cbbc14e2650741a8b0a7157e83741920f87800285a300"
    assert images.describe()["files"] == digest and "rules" not in images.describe()
    write_labels(tmp_path, [[name, i % 3] for i, name in enumerate(names)] + [["c.gif", 7]])
    digest = "21898acef5755b50cd27b698a9921f5c2f275058d6301a3a6ddb3ea618e62b39"
    assert ImageFolder(tmp_path, 8, rules=1).describe()["files"] == digest
    with pytest.raises(ValueError, match=r"rules 3 .* are not known here"):
        ImageFolder(tmp_path, 8, rules=3)


def test_files_that_pillow_reads_are_images_and_the_others_are_counted(tmp_path):
    touch(
        tmp_path,
        "a/1.GIF",
        "a/2.jfif",
        "a/3.pgm",
        "b/4.jp2",
        "b/5.tga",
        "b/notes.txt",
        "b/2.TXT",
        "a/film.mp4",
        "README",
    )
    images = ImageFolder(tmp_path, 8)
    assert list(labels_of(tmp_path).values()) == ["a", "a", "a", "b", "b"]
    assert images.left_out == {".txt": 2, "(none)": 1, ".mp4": 1}
    assert left_out_line(images.left_out) == "left out: 2 .txt, 1 (none), 1 .mp4" and left_out_line({}) == ""


def test_litter_of_file_systems_is_ignored(tmp_path):
    touch(
        tmp_path,
        "a/1.png",
        "a/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg",
        "@eaDir/2.jpg",
        "__MACOSX/a/._1.png",
        "a/Thumbs.db",
        "lost+found/3.jpg",
        "Desktop.ini",
        ".DS_Store",
        "a/.hidden.txt",
    )
    assert labels_of(tmp_path) == {"a/1.png": "a"} and ImageFolder(tmp_path, 8).left_out == {}


def test_the_error_for_a_folder_without_images_counts_its_files_by_suffix(tmp_path):
    touch(tmp_path, "cats/1.heic", "cats/2.heic", "dogs/1.png", "cows/notes.txt")
    with pytest.raises(ValueError, match=r"cats holds no images, only 2 \.heic: convert them"):
        ImageFolder(tmp_path / "cats", 8)
    with pytest.raises(ValueError, match=r"without images: cats \(only 2 \.heic\), cows \(only 1 \.txt\): fill"):
        ImageFolder(tmp_path, 8)


def test_all_problems_of_subfolders_are_listed_at_once(tmp_path):
    cafe = ["caf\u00e9", "cafe\u0301"]
    touch(tmp_path, "1.png", "2.png", "a/1.png", *(f"{name}/1.png" for name in cafe), "b /1.png", "b/1.png")
    for number in range(12):
        (tmp_path / f"empty{number}").mkdir()
    with pytest.raises(ValueError) as error:
        ImageFolder(tmp_path, 8)
    first, stray, empty, blank, form = str(error.value).splitlines()
    assert first == f"{tmp_path} is wrong:" and "has images outside its class folders: 1.png and 1 more: move" in stray
    assert "without images: empty0, empty1, empty10, empty11, empty2" in empty and "empty7 and 2 more: fill" in empty
    assert "has two classes with the same name, b: rename 'b' or 'b '" in blank
    assert r"has two classes with the same name, café: rename 'cafe\u0301' or 'caf\xe9'" in form
    (tmp_path / "1.png").unlink(), (tmp_path / "2.png").unlink()
    assert len(ImageFolder(tmp_path, 8, rules=1, keep_empty_classes=True).class_names) == 17  # rules 1 accept them


def test_empty_class_folders_are_kept_if_asked_for(photographs):
    (photographs / "empty").mkdir()
    images = ImageFolder(photographs, 8, keep_empty_classes=True)
    assert images.class_names == ("china", "empty", "flower") and images.class_counts == [2, 0, 2]
    assert images[3, False][1] == 2


def write_labels(folder, labels):
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


def test_labels_of_dataset_json(photographs):
    """With a dataset.json in the format of StyleGAN, EDM2 and REPA, subfolders are not classes."""
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
        ('{"labels": [["china/colour.png", [1]]]}', r"the label \[1\]"),
        ('{"labels": {"china/colour.png": 1}}', r'is not \{"labels": \[\["folder/name.png", 3\]'),
        ("{}", "dataset.json is not"),
        ("[", "dataset.json is not"),
    ],
)
def test_a_dataset_json_that_does_not_fit_is_refused(photographs, content, message):
    (photographs / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        ImageFolder(photographs, 8)


def test_labels_of_missing_images_are_refused(photographs):
    write_labels(photographs, [[name, 0] for name in [*list_images(photographs), "gone.png"]])
    with pytest.raises(ValueError, match=r"labels images that do not exist: gone\.png"):
        ImageFolder(photographs, 8)


def test_dataset_json_and_files_are_compared_in_one_unicode_form(photographs):
    """macOS names files in NFD, but the dataset.json may be in NFC, or the other way round."""
    names = list_images(photographs)
    for folder in ("china", "flower"):
        (photographs / folder).rename(photographs / unicodedata.normalize("NFD", f"{folder} zoë"))
    renamed = [name.replace("/", " zoë/") for name in names]
    for form in ("NFC", "NFD"):
        write_labels(photographs, [[unicodedata.normalize(form, name), i % 2] for i, name in enumerate(renamed)])
        assert list(labels_of(photographs).values()) == ["0", "1", "0", "1"]
    touch(photographs, "zo\u00eb.png", "zoe\u0308.png")
    with pytest.raises(ValueError, match=r"matches two files named zoë\.png in different Unicode forms: rename"):
        ImageFolder(photographs, 8)


@pytest.mark.parametrize("rules", [1, 2])
def test_labels_without_images_are_refused_unless_kept(photographs, rules):
    """Otherwise they would be sampled as if they had been trained."""
    names = list_images(photographs)
    write_labels(photographs, [[name, 1] for name in names])
    with pytest.raises(ValueError, match=r"\.json begins its labels at 1 and gives no image the labels 0: renumber"):
        ImageFolder(photographs, 8, rules=rules)
    write_labels(photographs, [[name, 7 * i] for i, name in enumerate(names)])
    message = (
        r"gives no image the labels 1, 2, 3, 4, 5, 6, 8, 9, 10, 11 and 8 more: renumber the labels, or keep "
        r"these classes empty with --keep-empty-classes \(training: --data\.keep_empty_classes true\)"
    )
    with pytest.raises(ValueError, match=message):
        ImageFolder(photographs, 8, rules=rules)
    images = ImageFolder(photographs, 8, rules=rules, keep_empty_classes=True)
    assert len(images.class_names) == 22 and [i for i, n in enumerate(images.class_counts) if n] == [0, 7, 14, 21]


def test_all_problems_of_a_dataset_json_are_listed_at_once(photographs):
    """An image whose entry is wrong is not reported a second time."""
    colour, grey, *others = list_images(photographs)
    write_labels(photographs, [[colour, 4], [colour, 2], [grey, "1"], [others[0], -1], ["gone.png", 0]])
    with pytest.raises(ValueError) as error:
        ImageFolder(photographs, 8)
    first, *faults = str(error.value).splitlines()
    assert first == f"{photographs / 'dataset.json'} is wrong:"
    for fault, expected in zip(
        faults,
        (
            f"gives {grey} the label '1' and 1 more: labels are whole",
            f"gives {colour} 2 different labels",
            f"gives no label to {others[1]}",
            "labels images that do not exist: gone.png",
            "gives no image the labels 0, 1, 2, 3: renumber",
        ),
        strict=True,
    ):
        assert expected in fault


def test_errors_name_the_place(photographs, tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        ImageFolder(tmp_path / "nowhere", 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no images"):
        ImageFolder(tmp_path / "empty", 8)
    with pytest.raises(ValueError, match="has classes without images: empty: fill"):
        ImageFolder(tmp_path, 8)
    Image.new("RGB", (8, 8)).save(photographs / "stray.png")
    with pytest.raises(ValueError, match=r"has images outside its class folders: stray\.png: move"):
        ImageFolder(photographs, 8)


def test_a_description_changes_with_names_labels_and_size(photographs):
    before = ImageFolder(photographs, 8).describe()
    assert ImageFolder(photographs, 8).describe() == before != ImageFolder(photographs, 16).describe()
    write_labels(photographs, [[name, 0] for name in list_images(photographs)])
    assert ImageFolder(photographs, 8).describe()["files"] != before["files"]
    (photographs / "dataset.json").unlink()
    (photographs / "china" / "grey.jpg").rename(photographs / "china" / "gray.jpg")
    assert ImageFolder(photographs, 8).describe()["files"] != before["files"]
