"""The same images in a folder, in archives and in a Hugging Face data set, and what is said if these are damaged."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sit_atconv.data.digits import Digits
from sit_atconv.data.images import ImageFolder
from sit_atconv.data.stores import open_store
from sit_atconv.evaluation.image_sets import open_image_set

NUM = 6  # digits in each archive


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIT_ATCONV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "archives"


@pytest.fixture(scope="session")
def numbered(digit_folder, tmp_path_factory):
    return write_numbered(digit_folder, tmp_path_factory.mktemp("numbered") / "images")


def write_numbered(digit_folder: Path, folder: Path) -> Path:
    """Writes the digits with a dataset.json, the format of StyleGAN's and EDM2's tools."""
    images, pairs = ImageFolder(digit_folder, 16), []
    for i in range(len(images)):
        name = f"00000/img{i:08d}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((digit_folder / images.name(i)).read_bytes())
        pairs.append([name, int(images.labels[i])])
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return folder


def write_zip(folder: Path, path: Path, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder))
    return path


def write_tar(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        archive.add(folder, ".")
    return path


def write_shards(folder: Path, out: Path, per_shard: int = 50, suffix: str = "cls") -> Path:
    """Writes a WebDataset: in each tar archive KEY.png and KEY.cls, with an index for `wids`."""
    images = ImageFolder(folder, 16)
    out.mkdir()
    entries = []
    for start in range(0, len(images), per_shard):
        shard = out / f"train-{start // per_shard:03d}.tar"
        with tarfile.open(shard, "w") as tar:
            for i in range(start, min(start + per_shard, len(images))):
                label = int(images.labels[i])
                beside = label if suffix == "cls" else {"label": label, "caption": "a digit"}
                for name, content in (
                    (images.name(i), (folder / images.name(i)).read_bytes()),
                    (images.name(i).replace("png", suffix), json.dumps(beside).encode()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        entries.append({"url": shard.name, "nsamples": min(per_shard, len(images) - start)})
    (out / "index.json").write_text(json.dumps({"__kind__": "wids-shard-index-v1", "shardlist": entries}))
    return out


def hugging_face(folder: Path, out: Path, **columns) -> Path:
    """Writes a data set of one parquet file with the images of a folder, their file names and their classes."""
    datasets = pytest.importorskip("datasets")
    images = ImageFolder(folder, 16)
    order = np.random.default_rng(0).permutation(len(images)).tolist()
    rows = {
        "image": [{"bytes": (folder / images.name(i)).read_bytes(), "path": images.name(i)} for i in order],
        "label": [int(images.labels[i]) for i in order],
    }
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(images.class_names))}
    out.mkdir()
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(
        out / "train-00000-of-00001.parquet"
    )
    return out


def same_images(folder: Path, work: Path, kind: str) -> str:
    """Returns the name of another place that holds the images of a folder."""
    if kind == "hf":
        return f"hf:{hugging_face(folder, work / 'data')}"
    if kind == "wids":
        return f"wids:{write_shards(folder, work / 'shards')}"
    return str({"zip": write_zip, "tar": write_tar}[kind](folder, work / f"images.{kind}"))


def assert_same(place: str, folder: Path) -> None:
    expected, images = ImageFolder(folder, 16), ImageFolder(place, 16)
    assert images.describe() == expected.describe() and images.class_names == expected.class_names
    for index in (0, 50, len(expected) - 1):
        assert torch.equal(images[index, True][0], expected[index, True][0])
    ours, theirs = open_image_set(place), open_image_set(str(folder))
    assert ours.content(0, 9) == theirs.content(0, 9) and torch.equal(ours.read(2, 9), theirs.read(2, 9))
    assert len(set(ours.labels)) == 10


@pytest.mark.parametrize("kind", ["zip", "packed zip", "tar"])
def test_archives_are_read_as_the_folder(kind, digit_folder, numbered, tmp_path):
    for folder in (digit_folder, numbered):
        if kind == "tar":
            path = write_tar(folder, tmp_path / f"{folder.name}.tar")
        else:
            path = write_zip(folder, tmp_path / f"{folder.name}.zip", zipfile.ZIP_DEFLATED * ("packed" in kind))
        assert_same(str(path), folder)


@pytest.mark.parametrize("place", ["shards", "shards/index.json", "shards/train-{000..002}.tar", "shards/*.tar"])
@pytest.mark.parametrize("suffix", ["cls", "json"])
def test_web_dataset(place, suffix, numbered, tmp_path):
    write_shards(numbered, tmp_path / "shards", suffix=suffix)
    assert_same(f"wids:{tmp_path / place}", numbered)


def test_samples_that_each_shard_numbers_anew(numbered, tmp_path):
    for number in range(2):
        write_shards(numbered, tmp_path / str(number), per_shard=60)
    (tmp_path / "1" / "train-001.tar").rename(tmp_path / "0" / "other.tar")
    images = ImageFolder(f"wids:{tmp_path / '0'}", 16)
    (index,) = images.find(["00000/other-img00000060.png"])
    assert len(images) == 180 and torch.equal(images[index, False][0], ImageFolder(numbered, 16)[60, False][0])


def test_the_list_of_a_tar_archive_is_kept_until_it_changes(digit_folder, tmp_path, cache, monkeypatch):
    path = write_tar(digit_folder, tmp_path / "a.tar")
    first = ImageFolder(path, 16)
    monkeypatch.setattr("sit_atconv.data.tar_archives._scan_tar", lambda path: pytest.fail("scanned again"))
    assert ImageFolder(path, 16).describe() == first.describe() and len(list(cache.iterdir())) == 1
    monkeypatch.undo()
    monkeypatch.setenv("SIT_ATCONV_CACHE", str(tmp_path / "cache"))
    with tarfile.open(path, "a") as tar:
        tar.add(digit_folder / first.name(0), "digit 0/more.png")
    assert len(ImageFolder(path, 16)) == 121


def test_links_in_a_tar_archive_are_the_files_they_name(digit_folder, tmp_path):
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        tar.add(digit_folder / "digit 0" / "000.png", "a/1.png")
        for kind, name, target in ((tarfile.LNKTYPE, "a/2.png", "a/1.png"), (tarfile.SYMTYPE, "a/3.png", "1.png")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
    images = ImageFolder(tmp_path / "links.tar", 16)
    assert len(images) == 3 and torch.equal(images[2, False][0], images[0, False][0])


def test_hugging_face(digit_folder, tmp_path):
    place = f"hf:{hugging_face(digit_folder, tmp_path / 'data')}"
    assert_same(place, digit_folder)
    assert ImageFolder(f"{place}:train:image=image,label=label", 16).describe() == ImageFolder(place, 16).describe()
    assert_same(f"hf:{tmp_path / 'data' / 'train-00000-of-00001.parquet'}", digit_folder)
    for wrong, said in (
        (f"{place}:test", "no split test: its splits are train"),
        (f"{place}:train:image=picture", "no column picture of images: name one of image"),
        (f"{place}:train:label=kind", "no column kind: its columns are image, label"),
        (f"{place}:train:colour=red", "is not hf:NAME_OR_PATH"),
        (f"hf:{tmp_path}/nowhere", "cannot be opened"),
    ):
        with pytest.raises(ValueError, match=said):
            ImageFolder(wrong, 16)


def test_a_saved_data_set_of_numbers_and_without_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    image = {"bytes": (b"P5 8 8 255\n" + bytes(range(64))), "path": None}
    rows = {"picture": [image] * 4, "kind": ["10", "9", "10", "9"]}
    data = datasets.Dataset.from_dict(
        rows, features=datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("string")})
    )
    data.select([3, 2, 0]).save_to_disk(tmp_path / "saved")
    images = ImageFolder(f"hf:{tmp_path / 'saved'}::label=kind", 8)
    assert images.class_names == ("9", "10") and images.labels.tolist() == [0, 1, 1] and images.name(2) == "00000002"
    assert ImageFolder(f"hf:{tmp_path / 'saved'}", 8).class_names == ("images",)
    damaged = datasets.Dataset.from_dict({"image": [image], "label": [-1]}).cast_column("image", datasets.Image())
    damaged.save_to_disk(tmp_path / "damaged")
    with pytest.raises(ValueError, match="has the label -1 in the column label: labels are whole numbers from 0"):
        ImageFolder(f"hf:{tmp_path / 'damaged'}", 8)


@pytest.mark.parametrize("kind", ["plain", "long numbers", "after other data", "with a comment", "written to a pipe"])
def test_any_zip_archive_is_listed_as_by_zipfile(kind, tmp_path, monkeypatch):
    if kind == "long numbers":
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    target = io.BytesIO(b"other data" if kind == "after other data" else b"")
    target.seek(0, 2)

    class Pipe(io.RawIOBase):
        def writable(self):
            return True

        def write(self, content):
            return target.write(content)

    with zipfile.ZipFile(Pipe() if "pipe" in kind else target, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, name in enumerate(("a.png", "ü/日本.png", "b/" + "c" * 200 + ".png")):
            archive.writestr(name, b"P5 4 2 255\n" + bytes([number] * 8))
        archive.mkdir("empty folder")
        archive.comment = b"a comment" if kind == "with a comment" else b""
    monkeypatch.undo()
    (tmp_path / "a.zip").write_bytes(target.getvalue())
    store = open_store(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        names = [info.filename for info in archive.infolist() if not info.is_dir()]
        assert sorted(store.names(lambda name: False)) == sorted(names) and len(names) == 3
        assert all(store.read(name) == archive.read(name) for name in names)


def test_digits_are_files_too():
    images, digits = ImageFolder("digits", 8), Digits()
    assert (
        torch.equal(images[7, False][0][:1], digits[7, False][0]) and images.labels.tolist() == digits.labels.tolist()
    )


def damage(path: Path, at: bytes, by: int = 200) -> None:
    content = bytearray(path.read_bytes())
    place = content.index(at) + by
    content[place] ^= 1
    path.write_bytes(content)


def test_damaged_archives(digit_folder, numbered, tmp_path):
    """Each fault is one line that names the file and the remedy."""
    zipped, tar = write_zip(digit_folder, tmp_path / "a.zip"), write_tar(digit_folder, tmp_path / "a.tar")
    whole = zipped.read_bytes()
    name = ImageFolder(zipped, 16).name(3)
    damage(zipped, name.encode(), 100)
    images = ImageFolder(zipped, 16)
    with pytest.raises(ValueError, match=rf"{name} cannot be read as an image: .*a\.zip is damaged there"):
        images[3, False]
    zipped.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.zip is no whole zip archive"):
        ImageFolder(zipped, 16)
    for size in (len(tar.read_bytes()) // 2, 512 * 100, 777):
        (tmp_path / "cut.tar").write_bytes(tar.read_bytes()[:size])
        with pytest.raises(
            ValueError, match=r"cut\.tar (is (truncated|no whole, uncompressed tar archive)|has \d+ bytes after)"
        ):
            ImageFolder(tmp_path / "cut.tar", 16)
    with pytest.raises(ValueError, match=r"there is no file .*none\.zip"):
        ImageFolder(tmp_path / "none.zip", 16)
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as archive:
        archive.writestr("readme.txt", "")
    with pytest.raises(ValueError, match=r"text\.zip holds no images, only 1 \.txt"):
        ImageFolder(tmp_path / "text.zip", 16)
    with zipfile.ZipFile(tmp_path / "lzma.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.png", "")
    with pytest.raises(ValueError, match=r"has packed a\.png by method 14, .* pack it again with zip -0"):
        ImageFolder(tmp_path / "lzma.zip", 16)
    shards = write_shards(numbered, tmp_path / "shards")
    (shards / "train-001.tar").unlink()
    with pytest.raises(ValueError, match=r"lists 1 archives that do not exist: .*train-001\.tar"):
        open_store(f"wids:{shards}/index.json")
    for label, said in (("-1", "gives the label -1"), ("cat", "gives the label b'cat'"), ("9999999", "to 999999")):
        with tarfile.open(tmp_path / "label.tar", "w") as archive:
            info = tarfile.TarInfo("a.cls")
            info.size = len(label)
            archive.addfile(info, io.BytesIO(label.encode()))
        with pytest.raises(ValueError, match=said):
            open_store(tmp_path / "label.tar")
    with pytest.raises(ValueError, match="names 1 archives that do not exist"):
        open_store(f"wids:{tmp_path / 'nowhere'}")


def test_an_image_without_a_label_and_a_class_without_images(numbered, tmp_path):
    shards = write_shards(numbered, tmp_path / "shards", per_shard=200)
    with tarfile.open(shards / "train-000.tar", "a") as tar:
        tar.add(numbered / "00000" / "img00000000.png", "more.png")
    with pytest.raises(ValueError, match=r"has no label \(KEY.cls\) for 1 images: more\.png"):
        ImageFolder(f"wids:{shards}", 16)
    with tarfile.open(shards / "train-000.tar", "a") as tar:
        info = tarfile.TarInfo("more.cls")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"12"))
    with pytest.raises(ValueError, match="has no images of the classes 10, 11: keep them with --keep-empty-classes"):
        ImageFolder(f"wids:{shards}", 16)
    assert len(ImageFolder(f"wids:{shards}", 16, keep_empty_classes=True).class_names) == 13


def test_pictures_in_archives_are_cropped_and_turned_upright(tmp_path):
    picture = Image.fromarray((np.arange(40 * 60 * 3) % 251).astype(np.uint8).reshape(40, 60, 3))
    exif = picture.getexif()
    exif[0x0112] = 6
    (tmp_path / "folder").mkdir()
    picture.save(tmp_path / "folder" / "turned.jpg", exif=exif)
    archive = ImageFolder(write_zip(tmp_path / "folder", tmp_path / "a.zip"), 32)
    image, size = archive.read_with_size(0)
    assert size == (60, 40) and torch.equal(image, ImageFolder(tmp_path / "folder", 32)[0, False][0])


def zip_of(path: Path, *names: str, content: bytes = b"P5 1 1 255\n9") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return path


def tar_of(path: Path, *entries: str | tarfile.TarInfo, **contents: bytes) -> Path:
    with tarfile.open(path, "w") as archive:
        for entry in entries:
            info = tarfile.TarInfo(entry) if isinstance(entry, str) else entry
            content = contents.get(info.name.rpartition(".")[2], b"P5 1 1 255\n9") if info.isfile() else b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_a_wrong_number_of_files_in_a_zip_archive(tmp_path):
    """Some tools keep 16 bits of it; anything else is a damage that would lose images."""
    content = zip_of(tmp_path / "a.zip", *(f"{i}.png" for i in range(66_000))).read_bytes()
    end = content.rindex(b"PK\x05\x06")
    record = content.rindex(b"PK\x06\x06")
    (tmp_path / "wrapped.zip").write_bytes(
        content[:record]
        + content[end : end + 8]
        + 2 * (66_000 % 2**16).to_bytes(2, "little")
        + int.from_bytes(content[record + 40 : record + 48], "little").to_bytes(4, "little")
        + int.from_bytes(content[record + 48 : record + 56], "little").to_bytes(4, "little")
        + bytes(2)
    )
    assert len(ImageFolder(tmp_path / "wrapped.zip", 1)) == 66_000
    few = bytearray(zip_of(tmp_path / "b.zip", "1.png", "2.png", "3.png").read_bytes())
    end = few.rindex(b"PK\x05\x06")
    few[end + 8 : end + 12] = bytes([1, 0, 1, 0])
    (tmp_path / "b.zip").write_bytes(few)
    with pytest.raises(ValueError, match="its list has 3 files, and its end says 1"):
        open_store(tmp_path / "b.zip")


def test_names_that_other_tools_write(tmp_path):
    content = bytearray(zip_of(tmp_path / "a.zip", "Koeln/a.png", "x/b.png").read_bytes())
    for old, new in ((b"Koeln", "Köl".encode() + b"n"), (b"x/b.png", b"x\\b.png")):
        content = content.replace(old, new)
    (tmp_path / "a.zip").write_bytes(content)
    assert ImageFolder(tmp_path / "a.zip", 1).class_names == ("Köln", "x")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_folder_in_an_archive(kind, tmp_path):
    names = ["top/train/cat/1.png", "top/train/dog/1.png", "top/val/cat/2.png"]
    path = (zip_of if kind == "zip" else tar_of)(tmp_path / f"a.{kind}", *names)
    with pytest.raises(ValueError, match=rf"holds everything in one folder, top: give .*a\.{kind}/top to read"):
        ImageFolder(path, 1)
    assert ImageFolder(path / "top", 1).class_names == ("train", "val")
    images = ImageFolder(path / "top" / "train", 1)
    assert images.class_names == ("cat", "dog") and images.name(1) == "dog/1.png" and len(images[1, False]) == 2
    with pytest.raises(ValueError, match=rf"a\.{kind}/nowhere holds no images"):
        ImageFolder(path / "nowhere", 1)
    one_class = (zip_of if kind == "zip" else tar_of)(tmp_path / f"one.{kind}", "cat/1.png")
    assert ImageFolder(one_class, 1).class_names == ("cat",)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_empty_classes_are_those_of_the_folder(kind, tmp_path):
    (tmp_path / "folder" / "ape").mkdir(parents=True)
    (tmp_path / "folder" / "cat").mkdir()
    (tmp_path / "folder" / "cat" / "1.png").write_bytes(b"P5 1 1 255\n9")
    place = tmp_path / "folder"
    if kind != "folder":
        place = {"zip": write_zip, "tar": write_tar}[kind](place, tmp_path / f"a.{kind}")
    with pytest.raises(ValueError, match="has classes without images: ape"):
        ImageFolder(place, 1)
    assert ImageFolder(place, 1, keep_empty_classes=True).class_names == ("ape", "cat")


def test_shards_without_labels_keep_their_folders(tmp_path):
    for number in range(2):
        tar_of(tmp_path / f"a-{number}.tar", "README.txt", "cat/0.png", "dog/0.png")
    images = ImageFolder(f"wids:{tmp_path}", 1)
    assert images.class_names == ("cat", "dog") and images.labels.tolist() == [0, 0, 1, 1]
    assert images.name(1) == "cat/a-1-0.png"


def test_archives_that_cannot_be_read_right(tmp_path):
    for number in (0, 1, 3):
        tar_of(tmp_path / f"t-{number}.tar", f"{number}.png")
    with pytest.raises(ValueError, match=r"names 1 archives that do not exist: .*t-2\.tar"):
        open_store(f"wids:{tmp_path}/t-{{0..3}}.tar")
    assert len(ImageFolder(tar_of(tmp_path / "x[1].tar", "1.png"), 1)) == 1
    both = (tmp_path / "t-0.tar").read_bytes() + (tmp_path / "t-1.tar").read_bytes()
    (tmp_path / "both.tar").write_bytes(both)
    with pytest.raises(ValueError, match=r"both\.tar has \d+ bytes after the file at which .* several archives"):
        open_store(tmp_path / "both.tar")
    (tmp_path / "begun.tar").write_bytes((tmp_path / "t-0.tar").read_bytes() + bytes(2**21))
    with pytest.raises(ValueError, match=r"begun\.tar has \d+ bytes after"):
        open_store(tmp_path / "begun.tar")
    sparse = tarfile.TarInfo("a.png")
    sparse.type = tarfile.GNUTYPE_SPARSE
    with pytest.raises(ValueError, match=r"holds the sparse file a\.png: pack it again without --sparse"):
        open_store(tar_of(tmp_path / "sparse.tar", sparse))
    with pytest.raises(ValueError, match=r"has 1 samples with several images \(0\): pack archives with one image each"):
        open_store(tar_of(tmp_path / "masks.tar", "0.png", "0.mask.png", "0.cls", cls=b"0"))
    link, label = tarfile.TarInfo("README"), tarfile.TarInfo("1.cls")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    label.type, label.linkname = tarfile.LNKTYPE, "0.cls"
    odd = tar_of(tmp_path / "odd.tar", "._0.cls", link, "0.cls", label, "0.png", "1.png", cls=b"0")
    assert ImageFolder(odd, 1).labels.tolist() == [0, 0]


def test_a_damaged_list_of_a_tar_archive_is_made_again(tmp_path, cache):
    path = tar_of(tmp_path / "a.tar", "1.png")
    ImageFolder(path, 1)
    for content in ("[]", "{", '{"names": []}'):
        next(cache.iterdir()).write_text(content)
        assert len(ImageFolder(path, 1)) == 1
