import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from sit_atconv.data.digits import load_digits
from sit_atconv.data.pixels import read_image
from sit_atconv.evaluation.image_sets import open_image_set
from sit_atconv.evaluation.references import open_reference

DIGITS = np.repeat(load_digits()[0][..., None], 3, axis=-1)


def all_of(images):
    return torch.cat([images.read(start, min(start + 3, len(images))) for start in range(0, len(images), 3)])


def write_pngs(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:06d}.png")


@pytest.fixture
def generated(tmp_path):
    """generated(**manifest) writes ten images, a manifest and a grid picture, as generate.py does."""

    def make(**manifest):
        write_pngs(tmp_path / "images", DIGITS[:10])
        Image.new("RGB", (90, 50)).save(tmp_path / "grid.png")
        manifest = {"complete": True, "settings": {"num_samples": 10}, "labels": [*range(10)]} | manifest
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        return tmp_path

    return make


def test_an_npz_stays_on_disk_and_a_compressed_one_gives_the_same_images(tmp_path):
    images = DIGITS[:10]
    np.savez(tmp_path / "second.npz", labels=np.arange(10), arr_0=images)
    np.savez_compressed(tmp_path / "compressed.npz", images)
    np.savez(tmp_path / "columns.npz", np.asfortranarray(images))
    for name, on_disk in [("second", True), ("compressed", False), ("columns", False)]:
        opened = open_image_set(str(tmp_path / f"{name}.npz"))
        assert isinstance(opened.images, np.memmap) == on_disk, name
        assert torch.equal(all_of(opened), torch.from_numpy(images).permute(0, 3, 1, 2)), name


def test_labels_of_an_npz(tmp_path):
    np.savez(tmp_path / "labelled.npz", DIGITS[:4], np.array([3, 1, 2, 1]))
    np.savez(tmp_path / "other.npz", DIGITS[:4], np.zeros((2, 2, 7)))
    assert open_image_set(str(tmp_path / "labelled.npz")).labels == [3, 1, 2, 1]
    other = open_image_set(str(tmp_path / "other.npz"))
    assert other.labels is None and other.warnings[0].endswith("arr_1 is float64 (2, 2, 7), not 4 integers")
    assert open_image_set(str(tmp_path / "labelled.npz")).first(2).labels == [3, 1]


def write_in(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(DIGITS[0]).save(folder / name)
    return open_image_set(str(folder))


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["cat/1.png", "cat/2.png", "dog/1.png"], [0, 0, 1]),
        (["10/a/1.png", "2/b/1.png", "2/c/1.png"], [0, 1, 1]),  # only the first level
        (["0/0001.png", "1/0002.png", "1/0003.png"], [0, 1, 1]),
        (["1.png", "2.png"], None),
        (["cat/1.png", "cat/2.png"], None),
        (["cat/1.png", "dog/1.png", "stray.png"], None),
        (["000000/000000.png", "000000/000999.png", "001000/001000.png"], None),  # EDM's --subdirs
        (["001000/001500.png", "002000/002000.png"], None),
    ],
)
def test_labels_of_subfolders(tmp_path, names, labels):
    assert write_in(tmp_path, *names).labels == labels


def test_labels_of_a_dataset_json(tmp_path):
    names = ["0/a.png", "0/b.png", "1/c.png"]
    for pairs, labels in (([5, 0, 5], [5, 0, 5]), ([1, 1, 1], None), (None, None)):
        pairs = pairs and list(map(list, zip(names, pairs, strict=True)))
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": pairs}))
        opened = write_in(tmp_path, *names)
        assert opened.labels == labels and opened.warnings == ()
    assert opened.first(2).images == names[:2] and opened.store.place == str(tmp_path)


def test_labels_that_do_not_fit_the_images_give_a_warning(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["a.png", 1]]}))
    opened = write_in(tmp_path, "a.png", "b.png")
    assert opened.labels is None and len(opened) == 2
    assert opened.warnings[0].startswith(f"the labels of {tmp_path} are unknown: {tmp_path / 'dataset.json'} gives")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["preview.png", "index.json", "shard-00000.safetensors"], "is a folder of latents: give the folder of images"),
        (["preview.png", "shard-00000.safetensors"], "is a folder of latents"),  # incomplete
        (["loss.png", "samples/step-2.png", "checkpoints/step-0000002/state.json"], "is a training run: draw samples"),
        (
            ["step-2.png", "a/manifest.json", "a/grid.png", "a/images/000000.png"],
            "several sets of samples: give one of",
        ),
        (["ema/diffusion_pytorch_model.safetensors"], "is a checkpoint or an exported model: draw samples"),
        (["diffusion_pytorch_model.safetensors", "grid.png"], "is a checkpoint or an exported model"),
    ],
)
@pytest.mark.parametrize("open_source", [open_image_set, open_reference])
def test_folders_that_are_not_images_are_named(tmp_path, names, message, open_source):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(DIGITS[0]).save(tmp_path / name) if name.endswith("png") else (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"^{tmp_path} .*{message}"):
        open_source(str(tmp_path))


def test_a_stray_manifest_does_not_make_a_folder_of_samples(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(DIGITS[0]).save(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "manifest.json").touch()
    assert len(open_image_set(str(tmp_path))) == 1


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_are_not_images(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    torch.save({"a": torch.zeros(1)}, path)
    for open_source in (open_image_set, open_reference):
        with pytest.raises(ValueError, match=r"is a file of weights: draw samples from it with sample/generate\.py"):
            open_source(str(path))


def test_files_with_too_many_pixels_are_refused(tmp_path, monkeypatch):
    """Every function that opens images passes the limit on."""
    limits = []
    monkeypatch.setattr(
        "sit_atconv.evaluation.image_sets.read_image",
        lambda path, size, limit, background: limits.append(limit) or torch.zeros(3, 8, 8),
    )
    write_in(tmp_path / "flat", "a.png")
    write_in(tmp_path / "samples" / "images", "a.png")
    (tmp_path / "samples" / "manifest.json").write_text(json.dumps({"complete": True, "settings": {"num_samples": 1}}))
    for folder in ("flat", "samples"):
        open_image_set(str(tmp_path / folder), max_megapixels=9).read(0, 1)
        open_reference(str(tmp_path / folder), max_megapixels=7).images.read(0, 1)
    assert limits == [9, 7, 9, 7]


def test_an_array_larger_than_memory_is_an_error(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise MemoryError("Unable to allocate 9.8 GiB")

    np.savez_compressed(tmp_path / "x.npz", DIGITS[:2])
    monkeypatch.setattr(np, "load", full)
    with pytest.raises(ValueError, match=r"arr_0 of \S*x\.npz cannot be read \(Unable to allocate 9\.8 GiB\)"):
        open_image_set(str(tmp_path / "x.npz"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: np.savez(f, images=np.zeros((9, 8, 8, 3), np.uint8)), r"holds \['images'\] and no arr_0"),
        (lambda f: np.savez(f, np.zeros((9, 8, 8, 3), np.float32)), r"float32 \(9, 8, 8, 3\).*astype\(np.uint8\)"),
        (lambda f: np.savez(f, np.zeros((9, 3, 8, 8), np.uint8)), r"\(9, 3, 8, 8\)"),
        (lambda f: np.savez(f, np.zeros((9, 8, 8), np.uint8)), r"\(9, 8, 8\)"),
        (lambda f: f.write_bytes(b"no archive"), "cannot be read as an .npz"),
        (lambda f: np.savez(f, np.array([{}])), r"object \(1,\)"),
        (lambda f: damage(f), "cannot be read"),
    ],
)
def test_arrays_of_another_kind_are_named(tmp_path, make, message):
    make(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=message):
        open_image_set(str(tmp_path / "x.npz"))


def damage(path):
    """Writes a compressed npz whose middle is overwritten."""
    np.savez_compressed(path, np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    path.write_bytes(content)


def test_images_of_several_sizes_are_named_from_any_start(tmp_path):
    write_pngs(tmp_path, DIGITS[:3])
    Image.new("RGB", (9, 9)).save(tmp_path / "000003.png")
    images = open_image_set(str(tmp_path))
    for start in (0, 3):
        with pytest.raises(ValueError, match=r"000003\.png is 9x9, and the first 8x8.*--image-size"):
            images.read(start, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text", r"1\.png cannot be read as an image"),
        (None, r"1\.png cannot be read as an image"),  # cut short
    ],
)
def test_a_damaged_image_is_named(tmp_path, content, message):
    write_pngs(tmp_path, DIGITS[:2])
    path = tmp_path / "000001.png"
    path.write_bytes(content or path.read_bytes()[:60])
    with pytest.raises(ValueError, match=message):
        open_image_set(str(tmp_path)).read(0, 2)


def test_floating_point_images_are_named(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match=r"x\.tiff .*floating point"):
        open_image_set(str(tmp_path)).read(0, 1)


def test_a_folder_is_cropped_by_adms_rule(tmp_path):
    Image.fromarray(np.kron(DIGITS[0], np.ones((3, 5, 1), np.uint8))).save(tmp_path / "wide.png")
    images = open_image_set(str(tmp_path), crop_to=8)
    assert images.size == (8, 8) and torch.equal(images.read(0, 1)[0], read_image(tmp_path / "wide.png", 8))
    with pytest.raises(ValueError, match="--image-size crops files of images, and digits has none"):
        open_image_set("digits", crop_to=8)


def test_samples_of_generate_and_their_manifest(generated):
    folder = generated()
    for source in (folder, folder / "manifest.json"):
        images = open_image_set(str(source))
        assert len(images) == 10 and images.store.place.endswith("/images")  # not the grid picture
        assert images.labels == [*range(10)] and images.manifest["settings"] == {"num_samples": 10}
    np.savez(folder / "samples.npz", DIGITS[:10])
    assert isinstance(open_image_set(str(folder)).images, np.memmap)
    shutil.rmtree(folder / "images")  # not the remaining grid picture
    assert isinstance(open_image_set(str(folder)).images, np.memmap)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"complete": False}, "incomplete: run the same sample/generate.py again"),
        ({"settings": {"num_samples": 11}, "labels": []}, "holds 10 images, and its manifest says 11"),
        ({"settings": None}, "damaged"),
        ({"settings": {"num_samples": "many"}}, "damaged"),
        ({"labels": [1, 2]}, r"damaged \(2 labels for 10 samples\): give the folder images/ alone"),
        ({"labels": [None] * 10}, "damaged"),
        ({"labels": 3}, "damaged"),
        ({"sessions": {"a": 1}}, "damaged"),
        ({"sessions": ["x"]}, "damaged"),
    ],
)
def test_incomplete_samples_are_not_evaluated(generated, manifest, message):
    with pytest.raises(ValueError, match=message):
        open_image_set(str(generated(**manifest)))


def test_the_digest_depends_on_every_image(tmp_path):
    """One pixel changes while size and date of the file stay."""
    import os

    write_pngs(tmp_path / "a", DIGITS[:4])
    folder = open_image_set(str(tmp_path / "a"))
    np.savez(tmp_path / "a.npz", DIGITS[:4])
    npz = open_image_set(str(tmp_path / "a.npz"))
    before = [folder.content(0, 4), npz.content(0, 4), npz.content(0, 3), npz.content(1, 4)]
    assert len(set(before)) == 4
    assert folder.content(0, 4) == before[0] and npz.content(0, 4) == before[1]
    changed = DIGITS[:4].copy()
    changed[2, 3, 3, 1] ^= 1
    for path, write in [
        (tmp_path / "a" / "000002.png", lambda p: Image.fromarray(changed[2]).save(p)),
        (tmp_path / "a.npz", lambda p: np.savez(p, changed)),
    ]:
        date = path.stat().st_mtime_ns
        write(path)
        os.utime(path, ns=(date, date))
    assert open_image_set(str(tmp_path / "a")).content(0, 4) != before[0]
    assert open_image_set(str(tmp_path / "a.npz")).content(0, 4) != before[1]
    contents = {open_image_set(str(tmp_path / "a"), crop_to=side).content(0, 4) for side in (None, 7, 8)}
    assert len(contents) == 3


def test_too_few_images_for_num_samples(generated):
    with pytest.raises(ValueError, match="holds 10 images, fewer than --num-samples 11"):
        open_image_set(str(generated())).first(11)


def test_an_npz_cut_short_is_named(tmp_path):
    """Its header declares more images than the file has."""
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (99, 8, 8, 3)})
        file.write(bytes(100))
    with pytest.raises(ValueError, match=r"x\.npz cannot be read as an \.npz: arr_0 is cut short"):
        open_image_set(str(path))
