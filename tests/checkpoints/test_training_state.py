"""Checkpoints are restored exactly, damaged ones are found, and a kill leaves the previous one intact."""

import dataclasses
import itertools
import json
import shutil
from unittest.mock import Mock

import pytest
import torch

from sit_atconv.checkpoints.run_folder import checkpoint_step, list_checkpoints, newest_checkpoint, quality_record
from sit_atconv.checkpoints.training_state import (
    Resumable,
    TrainingState,
    checkpoint_bytes,
    checkpoints_at_once,
    find_resumable,
    load_checkpoint,
    save_checkpoint,
    set_aside,
)
from sit_atconv.checkpoints.weights import load_weights
from sit_atconv.models import SiT
from sit_atconv.runtime.files import sha256_of
from sit_atconv.training.optimizers import parameter_groups
from tests.checkpoints.conftest import recipe
from tests.models.test_sit import randomised


def test_a_saved_state_is_restored(tmp_path, state):
    checkpoint = save_checkpoint(tmp_path, state, recipe(7), keep=2, computed_on={"processes": 3})
    model = randomised()
    groups = parameter_groups([model], 0.1)  # in another order than when it was saved
    fresh = TrainingState(model, {0.99: randomised(), 0.9: randomised()}, torch.optim.AdamW(groups, fused=True))
    assert load_checkpoint(checkpoint, fresh) == {"processes": 3}
    fresh_models, models = [fresh.model, *fresh.averages.values()], [state.model, *state.averages.values()]
    for before, after in zip(models, fresh_models, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    pairs = list(zip(state.model.parameters(), model.parameters(), strict=True))
    assert sum(len(fresh.optimizer.state[after]) for _, after in pairs) > 30
    for before, after in pairs:
        for key, value in state.optimizer.state.get(before, {}).items():
            assert torch.equal(value, fresh.optimizer.state[after][key])
    assert fresh.optimizer.param_groups[0]["weight_decay"] == 0.1


def test_a_scaler_is_restored(tmp_path, state):
    def with_scaler(scale):
        return dataclasses.replace(state, scaler=torch.amp.GradScaler("cpu", init_scale=scale))

    checkpoint = save_checkpoint(tmp_path, with_scaler(64.0), recipe(1), keep=2)
    assert load_checkpoint(checkpoint, again := with_scaler(2.0)) == {} and again.scaler.get_scale() == 64.0


def test_the_newest_checkpoints_are_kept(tmp_path, state):
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, state, recipe(step), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-0000010", "step-0000011"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2  # and nothing half written


def test_checkpoints_of_keep_every_are_kept_permanently(tmp_path, state):
    for step in range(1, 8):
        save_checkpoint(tmp_path, state, recipe(step), keep=1, keep_every=3)
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [3, 6, 7]


def test_the_checkpoint_with_the_best_score_is_kept(tmp_path, state):
    for step, distance in ((1, 9.0), (2, 3.0), (3, 5.0), (4, 4.0)):
        save_checkpoint(tmp_path, state, recipe(step), keep=1, keep_best=True)
        quality_record(tmp_path, step).parent.mkdir(exist_ok=True)
        quality_record(tmp_path, step).write_text(json.dumps({"log": {"quality/FD": distance}, "protocol": {}}))
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [2, 4]
    save_checkpoint(tmp_path, state, recipe(5), keep=1)
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [5]


def test_file_permissions_follow_the_umask(tmp_path, state):
    checkpoint = save_checkpoint(tmp_path, state, recipe(1), keep=1)
    modes = {path.stat().st_mode & 0o777 for path in checkpoint.rglob("*") if path.is_file()}
    assert len(modes) == 1 and modes != {0o600}


def test_an_interrupted_checkpoint_is_not_used(tmp_path, state, monkeypatch):
    save_checkpoint(tmp_path, state, recipe(1), keep=2)
    monkeypatch.setattr("sit_atconv.checkpoints.training_state.flush", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, state, recipe(2), keep=2)
    assert newest_checkpoint(tmp_path).name == "step-0000001" and load_weights(str(tmp_path)).recipe.step == 1
    monkeypatch.undo()
    assert save_checkpoint(tmp_path, state, recipe(2), keep=2) == newest_checkpoint(tmp_path)


DAMAGE = {
    "a flipped byte in the weights": lambda f: flip(f / "model" / "diffusion_pytorch_model.safetensors"),
    "an average cut short": lambda f: cut(f / "ema-0.9" / "diffusion_pytorch_model.safetensors"),
    "a flipped byte in the optimizer": lambda f: flip(f / "optimizer.safetensors"),
    "no optimizer": lambda f: (f / "optimizer.safetensors").unlink(),
    "state cut short": lambda f: cut(f / "state.json"),
    "no state": lambda f: (f / "state.json").unlink(),
    "an older format": lambda f: (f / "state.json").write_text('{"step": 4}'),
    "a list": lambda f: (f / "state.json").write_text("[]"),
    "checksums of nothing": lambda f: (f / "state.json").write_text('{"step": 4, "sha256": {}, "computed_on": {}}'),
    "another's state": lambda f: shutil.copy(f.with_name("step-0000003") / "state.json", f),
    "a file instead of it": lambda f: (shutil.rmtree(f), f.write_text("")),
    "a link to nowhere": lambda f: (shutil.rmtree(f), f.symlink_to("nowhere")),
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(tmp_path, state, damage):
    sound = save_checkpoint(tmp_path, state, recipe(3), keep=2)
    DAMAGE[damage](newest := save_checkpoint(tmp_path, state, recipe(4), keep=2))
    found = find_resumable(tmp_path)
    assert (found.checkpoint, found.step, list(found.damaged)) == (sound, 3, [newest])
    words = ("missing", "damaged", "not as it was written", "is of step 3")
    assert any(word in found.damaged[newest] for word in words)
    for _ in range(2):  # once more with what was set aside before
        assert set_aside(newest).name == "damaged-step-0000004" and find_resumable(tmp_path).damaged == {}
        newest.write_text("")
    newest.unlink()
    assert newest_checkpoint(tmp_path) == sound


def test_links_and_stray_files_do_not_stop_a_save(tmp_path, state):
    folder = save_checkpoint(tmp_path, state, recipe(1), keep=1).parent
    (folder / "step-0000001").rename(tmp_path / "elsewhere")
    (folder / "step-0000001").symlink_to(tmp_path / "elsewhere")
    (folder / ".partial-junk").write_text("")
    save_checkpoint(tmp_path, state, recipe(2), keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-0000002"] and (tmp_path / "elsewhere").is_dir()


def test_a_checkpoint_that_cannot_be_read_counts_as_damaged(tmp_path, state, monkeypatch):
    for step in (3, 4):
        save_checkpoint(tmp_path, state, recipe(step), keep=2)

    def read(path):
        if "step-0000004" in str(path):
            raise OSError(5, "Input/output error")
        return sha256_of(path)

    monkeypatch.setattr("sit_atconv.checkpoints.training_state.sha256_of", read)
    found = find_resumable(tmp_path)
    assert found.step == 3 and "cannot be read (Input/output error)" in next(iter(found.damaged.values()))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(tmp_path, state):
    for step in (3, 4):
        cut(save_checkpoint(tmp_path, state, recipe(step), keep=2) / "optimizer.safetensors")
    with pytest.raises(ValueError, match=r"no checkpoint of .*step-0000004: optimizer.safetensors is not as it was"):
        find_resumable(tmp_path)
    assert find_resumable(tmp_path / "elsewhere") == Resumable(None, 0, {})


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"shards": 2}, "has shards, which"),
        ({"computed_on": None}, "has no computed_on, which"),
        ({"sha256": {"model/0.safetensors": ""}}, "has no model/diffusion_pytorch_model.safetensors, which"),
    ],
)
def test_a_checkpoint_of_a_later_version_is_refused_not_damaged(tmp_path, state, fields, fault):
    save_checkpoint(tmp_path, state, recipe(3), keep=2)
    file = save_checkpoint(tmp_path, state, recipe(4), keep=2) / "state.json"
    content = json.loads(file.read_text()) | {"versions": {"sit_atconv": "9.1"}} | fields
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    with pytest.raises(ValueError, match=rf"step-0000004/state\.json {fault} .* by 9\.1; install that version or a l"):
        find_resumable(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path, state):
    checkpoint = save_checkpoint(tmp_path, state, recipe(3), keep=2)
    other = SiT(**{**state.model.config, "hidden_size": 64})
    with pytest.raises(ValueError, match="step-0000003 does not fit this model"):
        load_checkpoint(checkpoint, dataclasses.replace(state, model=other))


def test_the_computed_size_of_a_checkpoint_is_that_of_its_files(tmp_path, state):
    alone = dataclasses.replace(state, averages={0.9: state.model})
    folder = save_checkpoint(tmp_path, alone, recipe(1), keep=1)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert checkpoint_bytes(state.model, 1) == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("steps", [90, 100, 250, 1000])
@pytest.mark.parametrize(("keep", "keep_every"), itertools.product([1, 3], [None, 100, 200]))
def test_checkpoints_at_once_is_the_largest_number_during_a_run(steps, keep, keep_every):
    kept, most = [], 0
    for step in [*range(100, steps, 100), steps]:
        most = max(most, len(kept) + 1)
        kept.append(step)
        kept = [s for s in kept if s in kept[-keep:] or (keep_every and s % keep_every == 0)]
    assert checkpoints_at_once(steps, 100, keep, keep_every) == most
