"""The folder of latents: what belongs where, what is whole, what is damaged."""

import json
import shutil

import numpy as np
import pytest
import torch

from sit_atconv.data.latent_folder import Layout, open_shard, read_index, verify
from sit_atconv.files import sha256_of


@pytest.fixture
def copy(latents, tmp_path):
    return shutil.copytree(latents, tmp_path / "copy")


@pytest.fixture
def shard(copy):
    return copy / "shard-00001.safetensors"


def test_images_belong_to_shards_and_batches_by_their_index(tmp_path):
    layout = Layout(tmp_path, {"images": 103, "images_per_shard": 20, "batch_size": 8})
    assert layout.num_shards == 6 and layout.missing() == list(range(6))
    batches = [list(map(list, layout.batches(shard))) for shard in range(6)]
    assert [[len(batch) for batch in shard] for shard in batches] == [[8, 8, 4]] * 5 + [[3]]
    assert [i for shard in batches for batch in shard for i in batch] == list(range(103))


def test_what_the_index_says(latents, digit_folder, vae):
    index = read_index(latents)
    assert index["images"] == 120 == sum(index["class_counts"]) and index["vae"] == str(vae)
    assert index["class_names"] == [f"digit {i}" for i in range(10)] and index["skipped"] == {}
    counts = [len(list((digit_folder / name).iterdir())) for name in index["class_names"]]
    assert index["class_counts"] == counts
    assert index["settings"]["moments_shape"] == [8, 16, 16] and index["settings"]["codec"]["scale"] == 0.5
    for entry in index["shards"]:
        path = latents / entry["file"]
        assert (path.stat().st_size, sha256_of(path)) == (entry["bytes"], entry["sha256"])
        assert path.stat().st_size <= 0.35 * 2**20 and len(open_shard(path).names) == entry["images"]
    assert len(index["shards"]) == 6


def test_a_whole_folder_is_whole(latents):
    read = []
    assert verify(latents, read.append) == []
    assert sum(read) == sum(path.stat().st_size for path in latents.glob("shard*"))


def flip_a_byte(path, position=-100):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte(copy, shard):
    flip_a_byte(shard)
    (fault,) = verify(copy)
    assert f"{shard} has sha256" in fault and "by the index" in fault


def test_a_truncated_shard(copy, shard):
    shard.write_bytes(shard.read_bytes()[:-1])
    (fault,) = verify(copy)
    assert f"{shard} is damaged: it has" in fault
    shard.write_bytes(shard.read_bytes()[:100])
    (fault,) = verify(copy)
    assert f"{shard} is damaged: its header cannot be read" in fault
    shard.write_bytes(b"")
    assert f"{shard} is damaged" in verify(copy)[0]


def test_a_missing_shard_and_one_too_many(copy, shard):
    shard.rename(copy / "shard-00009.safetensors")
    assert verify(copy) == [f"{shard} is missing", f"{copy / 'shard-00009.safetensors'} is not in the index"]


def test_values_that_are_not_finite(copy, shard):
    """Written like that, with a checksum that fits."""
    settings = open_shard(shard).settings
    tensors = {name: torch.from_numpy(array.copy()) for name, array in open_shard(shard).arrays.items()}
    tensors["mirrored"][3, 2, 0, 0] = float("nan")
    names = open_shard(shard).names
    Layout(copy, settings).write(1, tensors, names, {})
    index = read_index(copy)
    index["shards"][1] |= {"sha256": sha256_of(shard), "bytes": shard.stat().st_size}
    write_index(copy, index)
    assert verify(copy) == [f"{shard} holds values that are not finite, of {names[3]}"]


def write_index(folder, index):
    from sit_atconv.data.latent_folder import _checksum

    index["checksum"] = _checksum(index)
    (folder / "index.json").write_text(json.dumps(index))


def test_counts_that_do_not_add_up(copy):
    index = read_index(copy)
    index["class_counts"][3] += 1
    write_index(copy, index)
    assert verify(copy) == [f"class digit 3 has {index['class_counts'][3] - 1} images, and "
                            f"{index['class_counts'][3]} by the index"]


def test_labels_out_of_range(copy, shard):
    opened = open_shard(shard)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in opened.arrays.items()}
    tensors["labels"][0] = 10
    Layout(copy, opened.settings).write(1, tensors, opened.names, {})
    faults = verify(copy)
    assert f"{shard} holds labels that are not 0 ... 9, one for each image" in faults


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "holds no index.json"),
        (lambda path: path.write_text(path.read_text()[:-30]), "is damaged"),
        (lambda path: path.write_text(path.read_text().replace("digit 3", "digit 8")), "is not as it was written"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "is damaged"),
        (lambda path: path.write_text("[]"), "is damaged"),
        (lambda path: path.write_text(path.read_text().replace('"format": 1', '"format": 9')), "has format 9, not 1"),
    ],
)
def test_a_damaged_index(copy, spoil, message):
    spoil(copy / "index.json")
    with pytest.raises(ValueError, match=message):
        read_index(copy)


def test_nothing_is_left_of_a_shard_that_could_not_be_written(tmp_path, monkeypatch):
    """As on a full disk."""
    layout = Layout(tmp_path, {"images": 4, "images_per_shard": 4, "batch_size": 4})
    tensors = {"moments": torch.zeros(4, 2, 2, 2), "labels": torch.zeros(4, dtype=torch.int64)}

    def full(path, content):
        with open(path, "wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match=r"shard-00000\.safetensors cannot be written \(No space left on device\)"):
        layout.write(0, tensors, list("abcd"), {})
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    layout.write(0, tensors, list("abcd"), {"e": "why"})
    assert open_shard(layout.path(0)).names == list("abcd") and open_shard(layout.path(0)).skipped == {"e": "why"}
    assert layout.missing() == [] and [path.name for path in tmp_path.iterdir()] == ["shard-00000.safetensors"]


def test_an_empty_shard(tmp_path):
    layout = Layout(tmp_path, {"images": 2, "images_per_shard": 2, "batch_size": 2})
    layout.write(0, {"moments": torch.zeros(0, 2, 2, 2), "labels": torch.zeros(0, dtype=torch.int64)}, [], {"a": "x"})
    assert open_shard(layout.path(0)).arrays["moments"].shape == (0, 2, 2, 2) and layout.missing() == []


def test_shards_of_other_settings_are_an_error_that_shows_them(copy, shard):
    settings = open_shard(shard).settings
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors was encoded with image_size 32, now it is 64"):
        Layout(copy, settings | {"image_size": 64}).missing()


def test_the_same_content_is_the_same_bytes(tmp_path):
    """Whatever the order in which tensors and metadata come."""
    values = torch.from_numpy(np.arange(16, dtype=np.float32).reshape(2, 2, 2, 2))
    tensors = {"moments": values, "labels": torch.tensor([0, 1]), "mirrored": values.flip(-1)}
    content = []
    for turn in range(4):
        layout = Layout(tmp_path / str(turn), {"images": 2, "images_per_shard": 2, "batch_size": 2})
        layout.folder.mkdir()
        layout.write(0, dict(reversed(tensors.items())) if turn % 2 else tensors, ["a", "b"], {})
        content.append(layout.path(0).read_bytes())
    assert len(set(content)) == 1
