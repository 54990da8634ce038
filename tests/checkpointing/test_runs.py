import json

import pytest
import torch
from safetensors.torch import load_file

from sit_atconv.checkpointing.runs import (
    TrainingState,
    append_stats,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    read_stats,
    rewind_stats,
    save_checkpoint,
)
from sit_atconv.checkpointing.weights import Recipe, load_weights
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
    return TrainingState(model, ema, optimizer)


def test_what_is_saved_comes_back(tmp_path, state):
    checkpoint = save_checkpoint(tmp_path, state, recipe(7), ema_decay=0.99, keep=2)
    fresh = TrainingState(randomised(), randomised(), torch.optim.AdamW(randomised().parameters(), fused=True))
    assert load_checkpoint(checkpoint, fresh) == 7
    for before, after in [(state.model, fresh.model), (state.ema, fresh.ema)]:
        assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    moments = [optimizer.state_dict()["state"][0]["exp_avg"] for optimizer in (state.optimizer, fresh.optimizer)]
    assert torch.equal(*moments) and moments[0].any()


def test_weights_say_what_they_are(tmp_path, state):
    save_checkpoint(tmp_path, state, recipe(7), ema_decay=0.99, keep=2)
    averaged, online = load_weights(str(tmp_path)), load_weights(str(tmp_path), ema=False)
    assert averaged.recipe.ema_decay == 0.99 and online.recipe.ema_decay is None and averaged.home == tmp_path
    assert all(torch.equal(a, b) for a, b in zip(averaged.model.parameters(), state.ema.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(online.model.parameters(), state.model.parameters(), strict=True))
    assert averaged.identity() != online.identity()


def test_the_newest_are_kept_and_the_last_step_is_the_newest(tmp_path, state):
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, state, recipe(step), ema_decay=0.99, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-0000010", "step-0000011"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2  # and nothing half written


def test_a_checkpoint_cut_short_is_not_one(tmp_path, state, monkeypatch):
    save_checkpoint(tmp_path, state, recipe(1), ema_decay=0.99, keep=2)
    monkeypatch.setattr(torch, "save", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, state, recipe(2), ema_decay=0.99, keep=2)
    assert newest_checkpoint(tmp_path).name == "step-0000001" and load_weights(str(tmp_path)).recipe.step == 1
    monkeypatch.undo()
    assert save_checkpoint(tmp_path, state, recipe(2), ema_decay=0.99, keep=2) == newest_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", ["model/diffusion_pytorch_model.safetensors", "optimizer.pt", "state.json"])
def test_a_damaged_checkpoint_is_named(tmp_path, state, damage):
    checkpoint = save_checkpoint(tmp_path, state, recipe(3), ema_decay=0.99, keep=2)
    file = checkpoint / damage
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"step-0000003 cannot be resumed from .*delete it"):
        load_checkpoint(checkpoint, state)


def test_optimizer_files_are_read_without_unpickling_code(tmp_path, state):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    checkpoint = save_checkpoint(tmp_path, state, recipe(3), ema_decay=0.99, keep=2)
    torch.save({"optimizer": Payload(), "scaler": None}, checkpoint / "optimizer.pt")
    with pytest.raises(ValueError, match="cannot be resumed from"):
        load_checkpoint(checkpoint, state)
    assert not (tmp_path / "owned").exists()


def test_stats_are_rewound_to_the_step_resumed_from(tmp_path):
    for step in (1, 2, 3):
        append_stats(tmp_path, step=step, loss=1 / step)
    with open(tmp_path / "stats.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    rewind_stats(tmp_path, 2)
    append_stats(tmp_path, step=3, loss=0.5)
    assert [line["step"] for line in read_stats(tmp_path)] == [1, 2, 3] and read_stats(tmp_path)[-1]["loss"] == 0.5


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
    checkpoint = save_checkpoint(tmp_path, state, recipe(3), ema_decay=0.99, keep=2)
    break_it(checkpoint / "ema")
    with pytest.raises(ValueError, match=message):
        load_weights(str(tmp_path))


def test_tensors_that_do_not_fit_the_config_are_listed(tmp_path, state):
    folder = save_checkpoint(tmp_path, state, recipe(3), ema_decay=0.99, keep=2) / "ema"
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
        (tmp_path / "other", "holds no weights"), (tmp_path / "file.bin", "is a file"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_weights(str(ckpt))
