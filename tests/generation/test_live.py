"""Drawing while somebody watches: the same images as sample/generate.py, and what is shown on the way."""

import json
import shlex
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sit_atconv.checkpoints.exported import export_weights
from sit_atconv.checkpoints.weights import load_weights
from sit_atconv.generation.live import Drawn, Frame, LiveModel
from sit_atconv.sampling import Sampler
from tests.conftest import load_command

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tiny_run, tmp_path_factory):
    """Weights with a velocity far from zero, unlike those of a run of four steps."""
    loaded = load_weights(str(tiny_run))
    torch.manual_seed(0)
    for parameter in loaded.model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("weights") / "random"
    export_weights(loaded, folder)
    return folder


@pytest.fixture(scope="module")
def model(weights):
    return LiveModel(str(weights), CPU)


def draw(model: LiveModel, num_frames: int = 0, **wanted) -> tuple[list[Frame], Drawn]:
    *shown, drawn = model.draw(model.check(**wanted), num_frames)
    return [item for item in shown if isinstance(item, Frame)], drawn


@pytest.mark.parametrize(
    "options",
    [
        dict(classes=("label:3", "label:7"), num_samples=3, seed=5, sampler=Sampler(cfg=2.5, steps=3)),
        dict(num_samples=2, size=(12, 8), sampler=Sampler(cfg=2.0, cfg_interval=(0.25, 0.8), solver="heun", steps=4)),
        dict(num_samples=2, sampler=Sampler(solver="sde-euler", steps=5, shift=2.0, cfg=0.0)),
        dict(num_samples=2, dtype="bf16", sampler=Sampler(times=(0.0, 0.3, 1.0), cfg_schedule="linear")),
    ],
)
def test_the_command_draws_the_same_images(weights, tmp_path, options):
    model = LiveModel(str(weights), CPU, dtype=options.pop("dtype", "fp32"))
    _, drawn = draw(model, 5, **options)
    script, *words = shlex.split(drawn.command)[1:]
    assert script.endswith("sample/generate.py")
    load_command("sample/generate.py").main([*words, "--out", str(tmp_path), "--batch-size", "2", "--no-npz"])
    for index, image in enumerate(drawn.images):
        with Image.open(tmp_path / "images" / f"{index:06d}.png") as file:
            difference = np.abs(np.array(file).astype(int) - np.array(image))
        assert difference.max() <= 1
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["labels"] == drawn.labels and manifest["evaluations"] == drawn.evaluations


def test_frames_lead_from_the_noise_to_the_images_and_change_nothing(model):
    options = dict(classes=("label:3",), num_samples=2, sampler=Sampler(cfg=2.0, solver="euler", steps=8))
    frames, drawn = draw(model, 40, **options)
    assert [frame.t for frame in frames] == [step / 8 for step in range(8)]
    for part in (part for frame in frames for part in (frame.states, frame.expected)):
        assert part.shape == (2, 1, 8, 8) and part.dtype == torch.uint8
    last = torch.stack([torch.from_numpy(np.array(image))[..., 0] for image in drawn.images])
    assert (frames[-1].expected[:, 0].int() - last.int()).abs().max() <= 1  # Euler's last step leads to the image
    assert (frames[0].states[:, 0].int() - last.int()).abs().float().mean() > 20  # the noise
    fewer, same = draw(model, 3, **options)
    none, alone = draw(model, 0, **options)
    assert [frame.t for frame in fewer] == [0, 0.375, 0.75] and none == []
    for other in (same, alone):
        assert all(np.array_equal(a, b) for a, b in zip(drawn.images, other.images, strict=True))


def test_a_jump_shows_the_state_that_it_leads_to(launch, tmp_path):
    from tests.conftest import TINY_RUN

    flow = ["--flow.class_path", "MeanFlow", "--model.two_times", "true"]
    codes, output = launch("sit_atconv/train.py", [*TINY_RUN, *flow, "--out", tmp_path / "run", "--train.steps", 1])
    assert codes == [0], output
    model = LiveModel(str(tmp_path / "run"), CPU)
    for parameter in model.weights.model.parameters():  # a velocity far from zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    frames, drawn = draw(model, 9, num_samples=2, sampler=Sampler(solver="jump", steps=2))
    assert not torch.equal(frames[0].expected, frames[1].expected)
    assert [frame.t for frame in frames] == [0, 0.5]
    assert torch.equal(frames[0].expected, frames[1].states) and len(drawn.images) == 2


def test_images_carry_their_settings(model):
    _, drawn = draw(model, classes=("label:3",), num_samples=2, seed=9, sampler=Sampler(cfg=2.0, steps=2))
    info = drawn.images[1].info
    settings = json.loads(info["settings"])
    assert info["command"] == drawn.command and info["Software"].startswith("sit_atconv ")
    expected = {"seed": 9, "index": 1, "label": 3, "class": "3", "cfg": 2.0, "steps": 2, "size": [8, 8], "step": 4}
    assert {name: settings[name] for name in expected} == expected
    assert settings["weights"] == model.weights.identity()


def wait_until_idle() -> None:
    for thread in threading.enumerate():
        if thread.name == "drawing":
            thread.join(60)
            assert not thread.is_alive()


def test_nobody_watches_any_more(model):
    evaluations = []
    hook = model.weights.model.register_forward_hook(lambda *_: evaluations.append(0))
    shown = model.draw(model.check(Sampler(solver="euler", steps=5000)), 40)
    next(shown)
    shown.close()  # as Gradio does when a page is closed, or by Stop
    wait_until_idle()
    hook.remove()
    assert 0 < len(evaluations) < 1000
    assert isinstance(draw(model, sampler=Sampler(steps=2))[1], Drawn)


def test_a_drawing_that_waits_in_vain_is_never_begun(model):
    evaluations = []
    hook = model.weights.model.register_forward_hook(lambda *_: evaluations.append(0))
    with model.lock:  # another drawing is under way
        shown = model.draw(model.check(Sampler(solver="heun", steps=7)), 0)
        assert next(shown).t == 0
        shown.close()
    wait_until_idle()
    hook.remove()
    assert evaluations == []


def test_as_many_frames_as_asked_for_at_most(model):
    frames, _ = draw(model, 3, sampler=Sampler(solver="dopri5"))
    assert 1 < len(frames) <= 3 and frames == sorted(frames, key=lambda frame: frame.t)
    frames, _ = draw(model, 40, sampler=Sampler(solver="heun", steps=4))  # whose second evaluations are no steps
    assert [frame.t for frame in frames] == [0, 0.25, 0.5, 0.75]
    frames, drawn = draw(model, 2, num_samples=10, sampler=Sampler(solver="euler", steps=2))
    assert len(frames[0].states) == 8 and len(drawn.images) == 10


def test_faults_are_one_error(model):
    with pytest.raises(ValueError, match="height 9 is not divisible by 2"):
        model.check(Sampler(), size=(9, 8))
    with pytest.raises(ValueError, match="no class 'ten'"):
        model.check(Sampler(), classes=("ten",))
    with pytest.raises(ValueError, match="not finite"):
        draw(model, num_samples=1, sampler=Sampler(cfg=1e39, steps=2))


def test_classes_are_typed_so_that_they_mean_one_class(model):
    names = ["1", "0", "tench", "tench", "great white", "-x", "name:2"]
    recipe = replace(model.weights.recipe, class_names=names + ["7", "8", "9"])
    drawing = replace(
        model.check(Sampler()),
        options=replace(model.options, ckpt="a run"),
        weights=replace(model.weights, recipe=recipe),
        given=list(range(7)),
    )
    from sit_atconv.generation.labels import typed_label
    from sit_atconv.generation.live import command_line

    words = shlex.split(command_line(drawing, ["my_parts"]))
    first = words.index("--classes") + 1
    assert [typed_label(word, recipe.class_names) for word in words[first : first + 7]] == list(range(7))
    assert words[first + 4] == "great white" and words[first + 5] == "label:5"
    assert words[2:6] == ["--ckpt", "a run", "--import", "my_parts"]


def test_the_command_names_the_checkpoint_that_was_loaded(tiny_run):
    _, drawn = draw(LiveModel(str(tiny_run), CPU), sampler=Sampler(steps=2))
    assert f"--ckpt {tiny_run}/checkpoints/step-0000004 " in drawn.command  # the run may train on
    _, drawn = draw(LiveModel(str(tiny_run), CPU, ema=False), sampler=Sampler(steps=2))
    assert "--no-ema" in drawn.command
