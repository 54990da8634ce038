import numpy as np
import pytest

from sit_atconv.data.digits import Digits
from sit_atconv.data.images import ImageFolder
from sit_atconv.data.latents import CachedLatents
from sit_atconv.data.sources import DataConfig


def test_classes_whose_images_are_all_held_out_are_refused_unless_kept(digit_folder):
    data = ImageFolder(digit_folder, 16)
    held_out = np.concatenate([np.flatnonzero(data.labels == label) for label in (3, 7)])
    config = DataConfig(images=str(digit_folder), held_out=len(held_out))
    message = rf"held_out {len(held_out)} takes all images of 2 classes: 3 \('digit 3'\), 7 \('digit 7'\): lower it, or"
    with pytest.raises(ValueError, match=message + ".*--data.keep_empty_classes true"):
        config.find_empty_classes(data, held_out, exists=False)
    kept = DataConfig(images=str(digit_folder), held_out=len(held_out), keep_empty_classes=True)
    assert kept.find_empty_classes(data, held_out, exists=False) == [3, 7]
    assert config.find_empty_classes(data, held_out, exists=True) == [3, 7]  # such a run can resume


def test_one_remaining_image_of_a_class_is_enough():
    data = Digits()
    held_out = np.flatnonzero(data.labels == 3)[1:]
    assert DataConfig(held_out=len(held_out)).find_empty_classes(data, held_out, exists=False) == []
    assert DataConfig().find_empty_classes(data, held_out[:0], exists=False) == []


def test_cached_latents_know_all_their_labels(latents, digit_folder):
    data = CachedLatents(latents)
    assert data.labels.tolist() == ImageFolder(digit_folder, 16).labels.tolist()
    assert data.labels[77] == data[77, False][1]


def test_a_folder_hidden_by_a_builtin_name_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    DataConfig().open()
    assert capsys.readouterr().err == ""
    (tmp_path / "digits").mkdir()
    data, _ = DataConfig().open()
    assert len(data) == 1797
    assert "warning: data.images digits is built-in data, not the digits in this folder: write ./digits" in (
        capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="holds no images"):
        DataConfig(images="./digits").open()
