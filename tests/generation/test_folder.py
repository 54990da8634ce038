"""The folder of samples: checks, missing samples, and samples.npz in little memory."""

import tracemalloc

import numpy as np
import pytest
import torch

from sit_atconv.generation.folder import SamplesFolder

SETTINGS = {"seed": 0}


@pytest.fixture
def folder(tmp_path):
    folder = SamplesFolder(tmp_path / "samples")
    folder.folder.mkdir()
    folder.begin(SETTINGS, {}, latents=True)
    return folder


def test_samples_without_an_image_or_a_latent_are_missing(folder):
    for i in (0, 2, 3):
        folder.write_sample(i, torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(1, 2, 2) if i != 3 else None)
    assert folder.missing(5) == [1, 4] and folder.missing(5, latents=True) == [1, 3, 4]


def test_begin_deletes_incomplete_files_of_a_killed_process(folder):
    (folder.images / ".partial-000001.png").write_bytes(b"half")
    folder.begin(SETTINGS, {})
    assert list(folder.images.iterdir()) == []


def test_the_npz_is_written_a_few_images_at_a_time(folder):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (600, 3, 64, 64), dtype=torch.uint8, generator=generator)
    for i, image in enumerate(images):
        folder.write_sample(i, image)
    tracemalloc.start()
    folder.write_npz(len(images))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < images.nbytes / 2
    assert np.array_equal(np.load(folder.npz)["arr_0"], images.permute(0, 2, 3, 1).numpy())


def test_errors_name_images_that_cannot_be_written_to_the_npz(folder):
    for i in range(3):
        folder.write_sample(i, torch.zeros(3, 4, 4, dtype=torch.uint8))
    whole = (folder.images / "000001.png").read_bytes()
    (folder.images / "000001.png").write_bytes(whole[:40] + b"\0" * 10 + whole[50:])  # the last chunk is still there
    with pytest.raises(ValueError, match=r"000001\.png cannot be read as an image: delete it"):
        folder.write_npz(3)
    folder.write_sample(1, torch.zeros(3, 6, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"000001\.png has another size: delete it"):
        folder.write_npz(3)
    assert not folder.npz.exists()


def test_a_folder_with_other_contents_is_refused(folder, tmp_path):
    folder.check(SETTINGS)
    with pytest.raises(ValueError, match=r"holds other samples \(seed 0 -> 1\): give another --out"):
        folder.check({"seed": 1})
    folder.begin({**SETTINGS, "guidance": "own.x"}, {})  # the settings of a command leave out the default guidance
    with pytest.raises(ValueError, match=r"holds other samples \(guidance own\.x -> None\)"):
        folder.check(SETTINGS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match=r"is not empty and has no manifest\.json"):
        SamplesFolder(tmp_path / "mine").check(SETTINGS)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        SamplesFolder(tmp_path / "file").check(SETTINGS)


def test_samples_can_be_added_and_the_old_npz_is_deleted(tmp_path):
    folder = SamplesFolder(tmp_path / "n2")
    folder.folder.mkdir()
    folder.begin({"seed": 0, "num_samples": 2}, {})
    for i in range(2):
        folder.write_sample(i, torch.full((3, 4, 4), i, dtype=torch.uint8))
    folder.write_npz(2)
    more = {"seed": 0, "num_samples": 3}
    folder.check(more)
    assert SamplesFolder(tmp_path / "n3").with_fewer(more) == folder.folder
    assert SamplesFolder(tmp_path / "n3").with_fewer(more | {"seed": 1}) is None
    folder.begin(more, {})
    assert not folder.npz.exists() and folder.read_manifest()["settings"] == more and folder.missing(3) == [2]
    with pytest.raises(ValueError, match=r"3 samples, more than --num-samples 2: .* them with --num-samples 3"):
        folder.check({"seed": 0, "num_samples": 2})
    with pytest.raises(ValueError, match=r"holds other samples \(seed 0 -> 1\)"):
        folder.check({"seed": 1, "num_samples": 4})


def test_a_folder_killed_before_its_manifest_is_accepted(tmp_path):
    folder = SamplesFolder(tmp_path / "samples")
    folder.folder.mkdir()
    for name in (".lock", ".partial-manifest.json"):
        (folder.folder / name).write_text("")
    folder.check(SETTINGS)
