"""The folder of cached latents: the place of each image, missing and damaged shards, the index."""

import dataclasses
import hashlib
import json
import resource
import shutil

import pytest
import torch

from sit_atconv import __version__
from sit_atconv.data.latent_folder import (
    LatentFolder,
    LatentIndex,
    LatentSettings,
    inspect_shard,
    newest_settings,
    open_shard,
    read_index,
    verify,
    write_index,
)
from sit_atconv.runtime.files import sha256_of


def settings(**options) -> LatentSettings:
    """Returns the settings of small shards with made-up values."""
    values = dict(
        num_images=4,
        files="",
        image_size=2,
        crop="",
        codec={},
        precision="fp32",
        slicing=False,
        tiling=False,
        mirrored=False,
        dtype="float32",
        moments_shape=[2, 2, 2],
        batch_size=4,
        images_per_shard=4,
    )
    return LatentSettings(**values | options)


def moments(count: int) -> dict[str, torch.Tensor]:
    values = torch.arange(count * 8.0).reshape(count, 2, 2, 2)
    return {"moments": values, "labels": torch.zeros(count, dtype=torch.int64)}


@pytest.fixture
def copy(latents, tmp_path):
    return shutil.copytree(latents, tmp_path / "copy")


@pytest.fixture
def shard(copy):
    return copy / "shard-00001.safetensors"


def test_images_belong_to_shards_and_batches_by_their_index(tmp_path):
    folder = LatentFolder(tmp_path, settings(num_images=103, images_per_shard=20, batch_size=8))
    assert folder.num_shards == 6 and folder.missing() == list(range(6))
    batches = [list(map(list, folder.batches(number))) for number in range(6)]
    assert [[len(batch) for batch in shard] for shard in batches] == [[8, 8, 4]] * 5 + [[3]]
    assert [i for shard in batches for batch in shard for i in batch] == list(range(103))


def test_parts_follow_each_other_and_start_new_shards_and_batches(tmp_path):
    first = settings(num_images=5, files="first", images_per_shard=4, batch_size=2)
    second = first.extended(3, "second", ["a", "b"])
    third = second.extended(1, "third", ["a", "b", "c"])
    assert third.parts == [first, second, third]
    assert [part["class_names"] for part in third.extends] == [["a", "b"], ["c"]]
    folder = LatentFolder(tmp_path, third)
    assert [list(folder.images(number)) for number in range(4)] == [[0, 1, 2, 3], [4], [5, 6, 7], [8]]
    assert [list(map(list, folder.batches(number))) for number in (2, 3)] == [[[5, 6], [7]], [[8]]]
    for number, part in enumerate((first, first, second, third)):
        folder.write(number, moments(len(folder.images(number))), list("abcd")[: len(folder.images(number))], {})
        assert newest_settings(tmp_path) == part
    assert folder.missing() == [] and LatentFolder(tmp_path, second).places == folder.places[:3]
    folder.write_index("vae", ["a"], [inspect_shard(folder.shard(number), third, 1) for number in range(4)])
    assert verify(tmp_path) == [] and read_index(tmp_path).settings == third
    folder.shard(3).write_bytes(folder.shard(3).read_bytes()[:-1])
    assert newest_settings(tmp_path) == second


def test_settings_without_rules_and_parts_are_written_as_before_these_fields_existed(tmp_path):
    """The expected digests come from the code of that time."""
    entry = {"file": "f", "bytes": 1, "sha256": "0", "num_images": 4}
    index = LatentIndex(4, "vae", settings(), ["x"], [4], {}, [entry], {})
    write_index(tmp_path, index)
    assert index.identity() == "02154d2e33d1f95a874b6025b013b260f63676a8daca38b294323dcb820a222c"
    written = (tmp_path / "index.json").read_bytes()
    assert hashlib.sha256(written).hexdigest() == "276b253d1f09895316679b66d2caf49f3bb7d3f398bd3c2a3bb61904a5bdb8b5"
    assert read_index(tmp_path) == index
    folder = LatentFolder(tmp_path, settings())
    folder.write(0, moments(4), list("abcd"), {})
    assert not {"rules", "extends"} & open_shard(folder.shard(0)).settings.keys()
    assert b"enlarged" not in folder.shard(0).read_bytes() and open_shard(folder.shard(0)).enlarged is None


@pytest.mark.parametrize(
    "later",
    [
        {"enlarged": 0},
        {"keep_empty_classes": True},
        {"settings": settings(rules=2)},
        {"settings": settings().extended(1, "", ["x"])},
    ],
)
def test_an_index_that_older_code_cannot_read_has_another_format(tmp_path, later):
    index = dataclasses.replace(LatentIndex(4, "vae", settings(), ["x"], [4], {}, [], {}), **later)
    write_index(tmp_path, index)
    assert '"format": 2' in (tmp_path / "index.json").read_text() and read_index(tmp_path) == index


def test_classes_without_images_are_a_fault_unless_the_user_kept_them(copy):
    index = read_index(copy)
    names, counts = [*index.class_names, "moth", " "], [*index.class_counts, 0, 0]
    more = dataclasses.replace(index, class_names=names, class_counts=counts)
    write_index(copy, more)
    assert verify(copy) == [
        f"{copy} has 2 classes without images: 10 ('moth'), 11 (' '): encode with --keep-empty-classes to keep them"
    ]
    write_index(copy, dataclasses.replace(more, keep_empty_classes=True))
    assert verify(copy) == []


def test_the_index_describes_the_folder(latents, digit_folder, vae):
    index = read_index(latents)
    assert index.num_images == 120 == sum(index.class_counts) and index.vae == str(vae)
    assert index.class_names == [f"digit {i}" for i in range(10)] and index.skipped == {}
    assert index.class_counts == [len(list((digit_folder / name).iterdir())) for name in index.class_names]
    assert index.settings.moments_shape == [8, 16, 16] and index.settings.codec["scale"] == 0.5
    for entry in index.shards:
        path = latents / entry["file"]
        assert (path.stat().st_size, sha256_of(path)) == (entry["bytes"], entry["sha256"])
        assert path.stat().st_size <= 0.35 * 2**20 and len(open_shard(path).names) == entry["num_images"]
    assert len(index.shards) == 6
    assert all(str(latents.parent) not in path.read_bytes().decode(errors="ignore") for path in latents.iterdir())


def test_verify_finds_no_fault_in_an_intact_folder(latents):
    read = []
    assert verify(latents, read.append) == []
    assert sum(read) == sum(path.stat().st_size for path in latents.glob("shard*"))


def flip_a_byte(path, position=-100):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_verify_finds_a_flipped_byte(copy, shard):
    flip_a_byte(shard)
    assert verify(copy) == [f"{shard} is damaged: its content does not match its checksum"]


def test_a_flipped_bit_anywhere_raises_an_error_that_names_the_shard(copy, shard):
    """This includes the header: no other error is raised, and no flipped bit is missed."""
    whole = shard.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for position in [*range(0, header, 7), *range(header, len(whole), 20011)]:
        for bit in (0, 5):
            content = bytearray(whole)
            content[position] ^= 1 << bit
            shard.write_bytes(content)
            try:
                opened = open_shard(shard, check=True)
            except ValueError as error:
                assert str(error).startswith(f"{shard} is damaged: "), position
            else:
                assert position < header and opened.settings, position  # padding, or fields that verify compares
    assert any("the index says" in fault or "is damaged" in fault for fault in verify(copy))


def test_verify_finds_a_truncated_shard(copy, shard):
    shard.write_bytes(shard.read_bytes()[:-1])
    (fault,) = verify(copy)
    assert f"{shard} is damaged: it has" in fault and "its header says" in fault
    shard.write_bytes(shard.read_bytes()[:100])
    (fault,) = verify(copy)
    assert f"{shard} is damaged: its header cannot be read" in fault
    shard.write_bytes(b"")
    assert f"{shard} is damaged" in verify(copy)[0]


def test_verify_finds_a_missing_shard_and_an_extra_one(copy, shard):
    shard.rename(copy / "shard-00009.safetensors")
    assert verify(copy) == [f"{shard} is missing", f"{copy / 'shard-00009.safetensors'} is not in the index"]


def rewrite(copy, shard, change) -> list[str]:
    """Applies `change` to the tensors of a shard and updates all checksums; returns its file names."""
    opened = open_shard(shard)
    tensors = {name: tensor.clone() for name, tensor in opened.tensors.items()}
    change(tensors)
    LatentFolder(copy, LatentSettings(**opened.settings)).write(1, tensors, opened.names, {})
    index = read_index(copy)
    index.shards[1].update(sha256=sha256_of(shard), bytes=shard.stat().st_size)
    write_index(copy, index)
    return opened.names


def test_verify_finds_values_that_are_not_finite(copy, shard):
    names = rewrite(copy, shard, lambda tensors: tensors["mirrored"][3, 2, 0, 0].fill_(float("nan")))
    assert verify(copy) == [f"{shard} holds values that are not finite, of {names[3]}"]


def test_verify_finds_labels_out_of_range(copy, shard):
    for wrong in (10, -1):
        rewrite(copy, shard, lambda tensors, wrong=wrong: tensors["labels"][:1].fill_(wrong))
        assert verify(copy) == [f"{shard} must hold one label from 0 to 9 for each image"]


def test_verify_finds_moments_of_another_dtype(copy, shard):
    rewrite(copy, shard, lambda tensors: tensors.update(moments=tensors["moments"].half()))
    (fault,) = verify(copy)
    assert f"{shard} holds moments (20, 8, 16, 16) torch.float16" in fault


def test_verify_finds_wrong_class_counts(copy):
    index = read_index(copy)
    index.class_counts[3] += 1
    write_index(copy, index)
    assert verify(copy) == [
        f"class digit 3 has {index.class_counts[3] - 1} images, and the index says {index.class_counts[3]}"
    ]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "holds no index.json"),
        (lambda path: path.write_text(path.read_text()[:-30]), "is damaged"),
        (lambda path: path.write_text(path.read_text().replace("digit 3", "digit 8")), "does not match its checksum"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "is damaged"),
        (lambda path: path.write_text("[]"), "is damaged"),
    ],
)
def test_a_damaged_index_is_refused(copy, spoil, message):
    spoil(copy / "index.json")
    with pytest.raises(ValueError, match=message):
        read_index(copy)


@pytest.mark.parametrize(
    ("versions", "writer"),
    [
        ({"sit_atconv": "7.1.0", "torch": "3.0"}, "sit_atconv 7.1.0"),
        ({"torch": "3.0"}, "a later version"),
        (None, "a later version"),
    ],
)
def test_an_index_of_a_later_version_is_refused_with_that_version_and_the_remedy(copy, versions, writer):
    path = copy / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 9, "versions": versions, "new_field": 1}))
    with pytest.raises(ValueError) as caught:
        read_index(copy)
    assert str(caught.value) == (
        f"{path} has format 9, and sit_atconv {__version__} reads formats 1 to 3: it was written by {writer}; install "
        "that version or a later one, or encode the images again into another folder"
    )


def test_the_index_records_the_version_that_wrote_it(latents):
    assert read_index(latents).versions["sit_atconv"] == __version__


def test_a_shard_that_cannot_be_written_leaves_no_file(tmp_path, monkeypatch):
    """The disk is full."""
    folder = LatentFolder(tmp_path, settings())

    def full(path, content):
        with open(path, "wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(OSError, match=r"shard-00000\.safetensors cannot be written \(No space left on device\)"):
            folder.write(0, moments(4), list("abcd"), {})
    assert list(tmp_path.iterdir()) == []
    folder.write(0, moments(4), list("abcd"), {})
    assert open_shard(folder.shard(0)).names == list("abcd")
    assert folder.missing() == [] and [path.name for path in tmp_path.iterdir()] == ["shard-00000.safetensors"]


def test_a_shard_with_skipped_images_is_missing_unless_skipping_is_allowed(tmp_path):
    folder = LatentFolder(tmp_path, settings(num_images=2))
    folder.write(0, moments(0), [], {"a": "why", "b": "why"})
    assert open_shard(folder.shard(0)).tensors["moments"].shape == (0, 2, 2, 2)
    assert folder.missing() == [0] and folder.missing(may_skip=True) == []


def test_shards_of_other_settings_raise_an_error_with_the_difference(copy, shard):
    other = dataclasses.replace(read_index(copy).settings, image_size=64)
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors was encoded with .*\(image_size 32 -> 64\)"):
        LatentFolder(copy, other).missing()


def test_an_extra_shard_is_an_error(copy, shard):
    shutil.copy(shard, copy / "shard-00006.safetensors")
    with pytest.raises(ValueError, match=r"shard-00006\.safetensors is not one of the 6 shards of this folder"):
        LatentFolder(copy, read_index(copy).settings).missing()


def test_a_damaged_header_is_not_mistaken_for_other_settings(copy, shard):
    whole = shard.read_bytes()
    shard.write_bytes(whole.replace(b'image_size\\": 32', b'image_size\\": 33', 1))
    assert shard.read_bytes() != whole and open_shard(shard).settings["image_size"] == 33
    assert LatentFolder(copy, read_index(copy).settings).missing() == [1]


def test_the_same_content_gives_the_same_bytes(tmp_path):
    """The order of the tensors does not matter."""
    content = []
    for turn in range(4):
        folder = LatentFolder(tmp_path / str(turn), settings())
        folder.path.mkdir()
        tensors = moments(4) | {"mirrored": moments(4)["moments"].flip(-1)}
        folder.write(0, dict(reversed(tensors.items())) if turn % 2 else tensors, list("abcd"), {})
        content.append(folder.shard(0).read_bytes())
    assert len(set(content)) == 1


def test_more_shards_can_be_open_than_file_descriptors(tmp_path):
    """The limit on open files is lowered to 64; 100 shards are opened."""
    folder = LatentFolder(tmp_path, settings(num_images=100, batch_size=1, images_per_shard=1))
    for number in range(100):
        folder.write(number, moments(1), ["a"], {})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    try:
        shards = [open_shard(folder.shard(number)) for number in range(100)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(shards) == 100 and shards[99].tensors["moments"][0, 1, 1, 1] == 7
