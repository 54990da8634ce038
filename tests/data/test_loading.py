import shutil
from itertools import islice

import pytest
import torch

from sit_atconv.data.digits import Digits
from sit_atconv.data.images import ImageFolder
from sit_atconv.data.latents import CachedLatents
from sit_atconv.data.loading import BatchReader, load_batches
from sit_atconv.data.order import BatchOrder

CPU = torch.device("cpu")


@pytest.fixture
def damaged(digit_folder, tmp_path):
    """Returns a folder of 120 images whose image 50 is truncated."""
    folder = shutil.copytree(digit_folder, tmp_path / "images")
    victim = folder / ImageFolder(folder, 16).name(50)
    victim.write_bytes(victim.read_bytes()[:60])
    return ImageFolder(folder, 16)


def load(data, workers, **options):
    batches = load_batches(data, BatchOrder(len(data), 40, seed=0, mirror=True), workers, CPU, **options)
    try:
        return list(islice(batches, 3))
    finally:
        batches.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_becomes_zeros_and_the_others_are_unchanged(damaged, digit_folder, workers):
    whole, part = load(ImageFolder(digit_folder, 16), 0), load(damaged, workers, skip_unreadable=True)
    assert all(batch.readable.all() and not batch.unreadable for batch in whole)
    readable = torch.cat([batch.readable for batch in part])
    assert readable.sum() == 119 and {name for batch in part for name in batch.unreadable} == {damaged.name(50)}
    for one, two in zip(whole, part, strict=True):
        assert torch.equal(one.y, two.y) and torch.equal(one.inputs[two.readable], two.inputs[two.readable])
        assert not two.inputs[~two.readable].any()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_an_error_with_both_remedies_unless_skipped(damaged, workers):
    with pytest.raises(ValueError, match=rf"{damaged.name(50)}.*fix the file.*--data.skip_unreadable true") as error:
        load(damaged, workers)
    assert len(str(error.value).splitlines()) == 1


def test_a_damaged_shard_is_never_skipped(latents, tmp_path):
    data = CachedLatents(shutil.copytree(latents, tmp_path / "latents"))
    shard = data.folder / "shard-00002.safetensors"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(ValueError, match=r"shard-00002.safetensors is damaged"):
        BatchReader(data, skip_unreadable=True)[[(i, False) for i in range(len(data))]]


def test_a_batch_holds_the_images_and_labels_of_the_data_source():
    data, items = Digits(), [(3, False), (9, True)]
    batch = BatchReader(data)[items]
    assert batch.y.tolist() == data.labels[[3, 9]].tolist() and batch.readable.tolist() == [True, True]
    assert all(torch.equal(image, data[item][0]) for image, item in zip(batch.inputs, items, strict=True))
