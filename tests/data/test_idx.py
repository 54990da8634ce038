"""IDX files: reading, padding and damage. The images are scikit-learn's digits, written as MNIST's files are."""

import gzip
import struct

import numpy as np
import pytest

from sit_atconv.data.digits import load_digits
from sit_atconv.data.idx import IdxImages, read_idx
from sit_atconv.data.sources import DataConfig
from sit_atconv.evaluation.image_sets import open_image_set


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def write(tmp_path):
    """write(images, labels, split, gz) writes two files and returns their folder."""

    def write_files(images, labels, split="train", gz=False):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels.astype(np.uint8))):
            content = idx_bytes(array)
            path = tmp_path / f"{split}-{kind}-ubyte{'.gz' * gz}"
            path.write_bytes(gzip.compress(content) if gz else content)
        return tmp_path

    return write_files


@pytest.mark.parametrize("gz", [False, True])
def test_images_are_centred_on_black_squares_of_a_multiple_of_eight(write, gz):
    images, labels = load_digits()
    folder = write(np.pad(images, ((0, 0), (0, 1), (0, 2))), labels, gz=gz)  # 9x10 pixels
    data, codec = DataConfig(images=f"idx:{folder}").open()
    assert (len(data), data.image_size, data.channels, codec.channels) == (1797, 16, 1, 1)
    image, label = data[5, False]
    assert image.shape == (1, 16, 16) and label == labels[5] and data.class_names == tuple("0123456789")
    assert (image[0, 3:11, 3:11].numpy() == images[5]).all() and image.sum() == images[5].sum()
    assert (data[5, True][0] == image.flip(-1)).all()
    assert DataConfig(images=f"idx:{folder}", image_size=12).open()[0][0, False][0].shape == (1, 12, 12)


def test_another_split_is_named_by_its_file_and_serves_as_reference(write):
    images, labels = load_digits()
    folder = write(images[:100], labels[:100], "train")
    write(images[100:], labels[100:], "t10k", gz=True)
    reference = open_image_set(f"idx:{folder}/t10k-images-idx3-ubyte.gz")
    assert len(reference) == 1697 and reference.labels == labels[100:].tolist()
    assert (reference.read(0, 3).numpy() == images[100:103, None].repeat(3, 1)).all()


def test_what_is_in_the_files_identifies_the_data_whatever_their_place(write, tmp_path):
    images, labels = load_digits()
    first = IdxImages(write(images, labels)).describe()
    assert IdxImages(write(images, labels, gz=True)).describe() == first
    assert IdxImages(write(images, labels[::-1])).describe() != first or (labels == labels[::-1]).all()


def test_damaged_and_missing_files_are_named(write, tmp_path):
    images, labels = load_digits()
    with pytest.raises(ValueError, match=r"holds no train-images-idx3-ubyte\[.gz\]"):
        IdxImages(tmp_path)
    folder = write(images, labels)
    path = folder / "train-images-idx3-ubyte"
    with pytest.raises(ValueError, match="8 pixels, which do not fit into 4"):
        IdxImages(folder, 4)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="has 115023 bytes, and its header says 115024"):
        IdxImages(folder)
    with pytest.raises(ValueError, match="is not an IDX file of bytes in 1 dimensions"):
        read_idx(path, 1)
    path.unlink()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images))[:-20])
    with pytest.raises(ValueError, match="is damaged"):
        IdxImages(folder)
    write(images[:50], labels)
    with pytest.raises(ValueError, match="holds 50 images, and the file of labels 1797 labels"):
        IdxImages(folder)
    (folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="has no labels: put train-labels-idx1-ubyte beside it"):
        IdxImages(folder)
    write(images, np.where(labels == 3, 4, labels))
    with pytest.raises(ValueError, match="has no images of the labels 3: keep these classes with"):
        IdxImages(folder)
    assert IdxImages(folder, keep_empty_classes=True).class_counts[3] == 0


@pytest.mark.parametrize("name", ["digits:0", "idx"])
def test_a_kind_without_its_place_and_a_place_without_its_kind_are_folders(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"{name} is not a folder of images"):
        DataConfig(images=name).open()
