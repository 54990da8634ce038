"""What encoding says of the images."""

import dataclasses

import pytest

from sit_atconv.data.images import ImageFolder
from sit_atconv.data.latent_folder import read_index
from sit_atconv.data.latent_summary import describe_classes, describe_images, describe_latents
from tests.data.test_latent_folder import settings


@pytest.fixture
def described(tmp_path):
    """described(names, **settings) -> what is said of an image folder with one image of each name."""

    def run(names: list[str], **options) -> str:
        for name in names:
            path = tmp_path / "my images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        images = ImageFolder(tmp_path / "my images", 8)
        images.left_out = {".txt": 2}
        of_latents = settings(rules=images.rules, codec={"downsample": 1}, **options)
        return "\n".join(describe_images(images, of_latents, [2, 4, 8]))

    return run


def test_classes_are_counted(described):
    assert "2 images, 2 classes: 'cat' 1, 'dog ' 1\nleft out: 2 .txt" in described(["cat/a.png", "dog /a.png"])
    assert describe_classes(["a", "b"], [3, 1]) == "2 classes: 'a' 3, 'b' 1"
    names = [f"n{i:02d}" for i in range(11)]
    assert describe_classes(names, [5, 9, *[6] * 9]) == "11 classes of 5 ('n00') to 9 ('n01')"


def test_splits_that_became_classes_are_warned_of(described):
    names = ["train/cat/a.png", "Val/cat/b.png"]
    said = described(names)
    assert "warning: the classes 'Val' and 'train' are named like the splits of a data set" in said
    assert "give --images '" in said and "my images/train'" in said
    assert "warning" not in described([*names, "zebra/a.png"])


def test_one_split_alone_is_a_class(described):
    assert "warning" not in described(["train/a.png"])


def test_latents_that_no_patch_divides_are_warned_of(described):
    said = described(["a.png"], image_size=3)
    assert "no preset's patch size (2, 4, 8) divides the latents' size 3x3" in said
    assert "warning" not in described(["a.png"], image_size=6)


def test_older_rules_are_named(tmp_path):
    (tmp_path / "a.png").touch()
    said = describe_images(ImageFolder(tmp_path, 8, rules=1), settings(rules=1, codec={"downsample": 1}))
    assert said[1] == "the rules of the first shards stay (version 1 of 2): class folders in text order, fewer suffixes"


def test_images_that_were_enlarged_are_counted(latents):
    index = read_index(latents)
    assert describe_latents(index)[-1] == "120 of 120 images are smaller than 32 px and were enlarged"
    assert len(describe_latents(dataclasses.replace(index, enlarged=None))) == 1
