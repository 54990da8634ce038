"""Weights that --ckpt names."""

import pytest
import torch

from sit_atconv.checkpoints.run_folder import newest_checkpoint
from sit_atconv.checkpoints.training_state import save_checkpoint
from sit_atconv.checkpoints.weights import load_weights
from tests.checkpoints.conftest import recipe


def test_ema_weights_and_weights_as_trained_of_a_run_are_loaded(tmp_path, state):
    save_checkpoint(tmp_path, state, recipe(7), keep=2)
    averaged, online = load_weights(str(tmp_path)), load_weights(str(tmp_path), ema=False)
    assert averaged.recipe.ema_decay == 0.99 and online.recipe.ema_decay is None and averaged.home == tmp_path
    first, second = state.averages.values()
    assert all(torch.equal(a, b) for a, b in zip(averaged.model.parameters(), first.parameters(), strict=True))
    other = load_weights(str(newest_checkpoint(tmp_path) / "ema-0.9"))
    assert other.recipe.ema_decay == 0.9 and other.home == tmp_path
    assert all(torch.equal(a, b) for a, b in zip(other.model.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(online.model.parameters(), state.model.parameters(), strict=True))
    assert averaged.identity() != online.identity()


def test_an_ema_is_chosen_by_its_decay(tmp_path, state):
    checkpoint = save_checkpoint(tmp_path, state, recipe(7), keep=2)
    for ckpt in (tmp_path, checkpoint):
        for decay, folder in [(0.99, "ema"), (0.9, "ema-0.9"), (True, "ema"), (False, "model")]:
            assert load_weights(str(ckpt), ema=decay).path == checkpoint / folder
        with pytest.raises(ValueError, match=r"has no EMA of decay 0\.5: give one of 0\.99, 0\.9$"):
            load_weights(str(ckpt), ema=0.5)
    with pytest.raises(ValueError, match=r"has no EMA of decay 0\.5: it has none"):
        load_weights(str(checkpoint / "model"), ema=0.5)


def test_errors_say_why_nothing_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    (tmp_path / "file.bin").write_bytes(b"\x00" * 99)
    for ckpt, message in [
        (tmp_path / "nowhere", "neither a folder here"),
        (tmp_path / "empty", "is an empty folder"),
        (tmp_path / "other", "holds no weights"),
        (tmp_path / "file.bin", "is not a checkpoint"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_weights(str(ckpt))
