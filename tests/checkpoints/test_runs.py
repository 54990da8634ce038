import dataclasses
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sit_atconv.checkpoints.runs import (
    Resumable,
    TrainingState,
    append_stats,
    checkpoint_step,
    find_resumable,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    read_stats,
    rewind_stats,
    save_checkpoint,
    set_aside,
)
from sit_atconv.checkpoints.weights import Recipe, load_weights
from sit_atconv.models import SiT
from sit_atconv.runtime.files import sha256_of
from sit_atconv.training.ema import parameter_groups
from tests.conftest import working_folder
from tests.models.test_sit import randomised


def recipe(step: int) -> Recipe:
    codec = {"kind": "identity", "channels": 4, "downsample": 1}
    return Recipe("linear", "velocity", codec, [str(i) for i in range(10)], step)


@pytest.fixture
def state():
    model, ema = randomised(), randomised()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(1, 4, 8, 8), torch.rand(1), torch.tensor([1])).sum().backward()
    optimizer.step()
    return TrainingState(model, {0.99: ema, 0.9: randomised()}, optimizer)


def test_what_is_saved_comes_back(tmp_path, state):
    checkpoint = save_checkpoint(tmp_path, state, recipe(7), keep=2, computed_on={"processes": 3})
    model = randomised()
    groups = parameter_groups(model, 0.1)  # in another order than when it was saved
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


def test_a_scaler_comes_back(tmp_path, state):
    def with_scaler(scale):
        return dataclasses.replace(state, scaler=torch.amp.GradScaler("cpu", init_scale=scale))

    checkpoint = save_checkpoint(tmp_path, with_scaler(64.0), recipe(1), keep=2)
    assert load_checkpoint(checkpoint, again := with_scaler(2.0)) == {} and again.scaler.get_scale() == 64.0


def test_weights_say_what_they_are(tmp_path, state):
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


def test_the_newest_are_kept_and_the_last_step_is_the_newest(tmp_path, state):
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, state, recipe(step), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-0000010", "step-0000011"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2  # and nothing half written


def test_every_so_many_are_kept_for_good(tmp_path, state):
    for step in range(1, 8):
        save_checkpoint(tmp_path, state, recipe(step), keep=1, keep_every=3)
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [3, 6, 7]


def test_files_are_readable_by_whom_the_umask_allows(tmp_path, state):
    checkpoint = save_checkpoint(tmp_path, state, recipe(1), keep=1)
    modes = {path.stat().st_mode & 0o777 for path in checkpoint.rglob("*") if path.is_file()}
    assert len(modes) == 1 and modes != {0o600}


def test_a_checkpoint_cut_short_is_not_one(tmp_path, state, monkeypatch):
    save_checkpoint(tmp_path, state, recipe(1), keep=2)
    monkeypatch.setattr("sit_atconv.checkpoints.runs.flush", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
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
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, state, damage):
    sound = save_checkpoint(tmp_path, state, recipe(3), keep=2)
    DAMAGE[damage](newest := save_checkpoint(tmp_path, state, recipe(4), keep=2))
    found = find_resumable(tmp_path)
    assert (found.checkpoint, found.step, list(found.damaged)) == (sound, 3, [newest])
    assert any(word in found.damaged[newest] for word in ("missing", "damaged", "not as it was written"))
    for _ in range(2):  # once more with what was set aside before
        assert set_aside(newest).name == "damaged-step-0000004" and find_resumable(tmp_path).damaged == {}
        newest.write_text("")
    newest.unlink()
    assert newest_checkpoint(tmp_path) == sound


def test_odd_things_among_checkpoints_do_not_end_a_save(tmp_path, state):
    folder = save_checkpoint(tmp_path, state, recipe(1), keep=1).parent
    (folder / "step-0000001").rename(tmp_path / "elsewhere")
    (folder / "step-0000001").symlink_to(tmp_path / "elsewhere")
    (folder / ".partial-junk").write_text("")
    save_checkpoint(tmp_path, state, recipe(2), keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-0000002"] and (tmp_path / "elsewhere").is_dir()


def test_a_checkpoint_that_cannot_be_read_is_damaged(tmp_path, state, monkeypatch):
    for step in (3, 4):
        save_checkpoint(tmp_path, state, recipe(step), keep=2)

    def read(path):
        if "step-0000004" in str(path):
            raise OSError(5, "Input/output error")
        return sha256_of(path)

    monkeypatch.setattr("sit_atconv.checkpoints.runs.sha256_of", read)
    found = find_resumable(tmp_path)
    assert found.step == 3 and "cannot be read (Input/output error)" in next(iter(found.damaged.values()))


def test_where_none_is_sound_nothing_begins_afresh(tmp_path, state):
    for step in (3, 4):
        cut(save_checkpoint(tmp_path, state, recipe(step), keep=2) / "optimizer.safetensors")
    with pytest.raises(ValueError, match=r"no checkpoint of .*step-0000004: optimizer.safetensors is not as it was"):
        find_resumable(tmp_path)
    assert find_resumable(tmp_path / "elsewhere") == Resumable(None, 0, {})


def test_a_checkpoint_of_another_model_is_refused(tmp_path, state):
    checkpoint = save_checkpoint(tmp_path, state, recipe(3), keep=2)
    other = SiT(**{**state.model.config, "hidden_size": 64})
    with pytest.raises(ValueError, match="step-0000003 does not fit this model"):
        load_checkpoint(checkpoint, dataclasses.replace(state, model=other))


def test_stats_are_rewound_to_the_step_resumed_from(tmp_path):
    for step in (1, 2, 3):
        append_stats(tmp_path, {"step": step, "loss": 1 / step})
    with open(tmp_path / "stats.jsonl", "a") as file:
        file.write('12\n{"a": 1}\n{"step": 4, "lo')
    rewind_stats(tmp_path, 2)
    append_stats(tmp_path, {"step": 3, "loss": 0.5})
    assert [line["step"] for line in read_stats(tmp_path)] == [1, 2, 3] and read_stats(tmp_path)[-1]["loss"] == 0.5


def test_one_of_several_averages(tmp_path, state):
    checkpoint = save_checkpoint(tmp_path, state, recipe(7), keep=2)
    for ckpt in (tmp_path, checkpoint):
        for decay, folder in [(0.99, "ema"), (0.9, "ema-0.9"), (True, "ema"), (False, "model")]:
            assert load_weights(str(ckpt), ema=decay).path == checkpoint / folder
        with pytest.raises(ValueError, match=r"has no average of decay 0\.5: give one of 0\.99, 0\.9$"):
            load_weights(str(ckpt), ema=0.5)
    with pytest.raises(ValueError, match=r"has no average of decay 0\.5: it has none"):
        load_weights(str(checkpoint / "model"), ema=0.5)


@pytest.mark.parametrize(("options", "null_label"), [
    ({"flow": {"class_dropout_prob": 0.0}, "init_from": None}, None),
    ({"flow": {"class_dropout_prob": 0.1}, "init_from": None}, 10),
    ({"flow": {"class_dropout_prob": 0.0}, "init_from": "weights"}, 10),  # whose null label may be trained
    ("damaged", 10)])
def test_runs_older_than_the_recipes_field_say_whether_labels_were_dropped(tmp_path, state, options, null_label):
    save_checkpoint(tmp_path, state, recipe(7), keep=2)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    assert load_weights(str(tmp_path)).null_label == null_label
    with working_folder(tmp_path / "checkpoints" / "step-0000007"):
        assert load_weights("ema").null_label == null_label
    save_checkpoint(tmp_path, state, dataclasses.replace(recipe(8), null_label_trained=True), keep=2)
    assert load_weights(str(tmp_path)).null_label == 10


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "diffusion_pytorch_model.safetensors").write_bytes(b"\x93" * 4000), "incomplete or damaged"),
        (lambda f: (f / "diffusion_pytorch_model.safetensors").unlink(), "incomplete or damaged"),
        (lambda f: (f / "recipe.json").unlink(), "incomplete or damaged"),
        (lambda f: (f / "config.json").write_text("{"), "incomplete or damaged"),
        (lambda f: (f / "config.json").unlink(), "incomplete or damaged"),
    ],
)
def test_damaged_weights_are_named(tmp_path, state, break_it, message):
    checkpoint = save_checkpoint(tmp_path, state, recipe(3), keep=2)
    break_it(checkpoint / "ema")
    with pytest.raises(ValueError, match=message):
        load_weights(str(tmp_path))


def test_tensors_that_do_not_fit_the_config_are_listed(tmp_path, state):
    folder = save_checkpoint(tmp_path, state, recipe(3), keep=2) / "ema"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"depth": 3}))
    with pytest.raises(ValueError, match=r"blocks\.2|damaged"):
        load_weights(str(folder))
    assert "blocks.1.attn.proj.weight" in load_file(folder / "diffusion_pytorch_model.safetensors")


def test_where_there_is_nothing_to_load(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    (tmp_path / "file.bin").write_bytes(b"\x00" * 99)
    for ckpt, message in [
        (tmp_path / "nowhere", "neither a folder here"), (tmp_path / "empty", "is an empty folder"),
        (tmp_path / "other", "holds no weights"), (tmp_path / "file.bin", "is no checkpoint"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_weights(str(ckpt))
