"""The training command: what it leaves, exact resume, and its errors."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from sit_atconv.models import SiT
from tests.conftest import ROOT, TINY_RUN, encode_argv, load_command, python, working_folder

TRAIN = "sit_atconv/train.py"
EXACT = [*TINY_RUN, "--train.accumulation", "2", "--train.lr", "1e-3", "--train.lr_decay", "cosine",
         "--train.warmup_steps", "1", "--flow.class_dropout_prob", "0.3", "--train.max_grad_norm", "1.0"]


def state_of(run: Path, step: int) -> dict:
    checkpoint = run / "checkpoints" / f"step-{step:07d}"
    tensors = {}
    for kind in ("model", "ema"):
        weights = load_file(checkpoint / kind / "diffusion_pytorch_model.safetensors")
        tensors |= {f"{kind}.{name}": tensor for name, tensor in weights.items()}
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)["optimizer"]
    for index, values in optimizer["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    return tensors


@pytest.mark.parametrize("processes", [1, 2])
def test_four_steps_are_two_and_a_kill_and_two(launch, tmp_path, processes):
    """An epoch has three steps, so the kill falls inside one and the end beyond it."""
    codes, output = launch(TRAIN, [*EXACT, "--out", tmp_path / "whole"], processes)
    assert codes == [0] * processes, output
    resumed = [*EXACT, "--out", tmp_path / "resumed"]
    codes, output = launch(TRAIN, resumed, processes, die="after the first checkpoint")
    assert codes == [-9] * processes, output
    assert [path.name for path in (tmp_path / "resumed" / "checkpoints").iterdir()] == ["step-0000002"]
    codes, output = launch(TRAIN, resumed, processes)
    assert codes == [0] * processes and "step 2 of 4" in output, output

    whole, again = state_of(tmp_path / "whole", 4), state_of(tmp_path / "resumed", 4)
    assert whole.keys() == again.keys() and any(name.startswith("optimizer") for name in whole)
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []
    half = state_of(tmp_path / "whole", 2)
    assert not torch.equal(whole["model.final_layer.linear.weight"], half["model.final_layer.linear.weight"])
    stats = [(tmp_path / run / "stats.jsonl").read_text().splitlines() for run in ("whole", "resumed")]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in stats]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_compiled_training_takes_the_same_steps(launch, tmp_path, processes, monkeypatch):
    monkeypatch.setenv("TORCH_LOGS", "graph_breaks")
    argv = [*TINY_RUN, "--train.accumulation", "2", "--model.depth", "1", "--train.steps", "2"]
    losses = {}
    for compiled in ("true", "false"):
        run = tmp_path / compiled
        codes, output = launch(TRAIN, [*argv, "--train.compile", compiled, "--out", run], processes)
        assert codes == [0] * processes and (", compiled" in output) == (compiled == "true"), output
        assert "graph break" not in output.lower()
        losses[compiled] = [json.loads(line)["loss"] for line in (run / "stats.jsonl").open()]
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-5)


def test_what_a_run_leaves(tiny_run):
    stats = [json.loads(line) for line in (tiny_run / "stats.jsonl").open()]
    assert [line["step"] for line in stats] == [1, 2, 3, 4] and all(line["loss"] > 0 for line in stats)
    for picture in (tiny_run / "loss.png", tiny_run / "samples" / "step-0000004.png"):
        assert min(Image.open(picture).size) > 150
    options = yaml.safe_load((tiny_run / "config.yaml").read_text())
    assert options["train"]["batch_size"] == 512 and options["model"]["mixer"] == "atconv"
    config = json.loads((tiny_run / "checkpoints" / "step-0000004" / "ema" / "config.json").read_text())
    assert (config["num_classes"], config["in_channels"], config["input_size"]) == (10, 1, 8)  # from the data
    recipe = json.loads((tiny_run / "checkpoints" / "step-0000004" / "ema" / "recipe.json").read_text())
    assert recipe["class_names"] == list("0123456789") and recipe["codec"]["kind"] == "identity"


def test_the_average_keeps_its_decay_of_what_it_was(launch, tmp_path):
    codes, output = launch(TRAIN, [*TINY_RUN, "--train.steps", 1, "--train.ema_decay", 0.75, "--out", tmp_path / "run"])
    assert codes == [0], output
    state = state_of(tmp_path / "run", 1)
    config = json.loads((tmp_path / "run/checkpoints/step-0000001/ema/config.json").read_text())
    torch.manual_seed(0)
    initial = SiT.from_config(config).state_dict()
    for name, before in initial.items():
        expected = 0.75 * before + 0.25 * state[f"model.{name}"]
        torch.testing.assert_close(state[f"ema.{name}"], expected, msg=name)
    moved = state["model.final_layer.linear.weight"] - initial["final_layer.linear.weight"]
    assert moved.abs().max() > 1e-6


def test_a_finished_run_says_so_and_where_it_lies(tiny_run, capsys):
    load_command(TRAIN).main([*TINY_RUN, "--out", str(tiny_run)])
    said = capsys.readouterr().out
    assert f"{tiny_run} is complete: 4 steps" in said and f"--ckpt {tiny_run}" in said


def test_as_typed_from_another_folder(tmp_path):
    """`accelerate launch` with the embedded default, cut to two steps."""
    command = python("-m", "accelerate.commands.launch", ROOT / TRAIN, "--train.steps", 2, "--train.log_every", 1)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "runs/digits is complete: 2 steps" in done.stdout
    assert (tmp_path / "runs" / "digits" / "loss.png").exists()


def test_images_of_ones_own(launch, vae, tmp_path):
    """A folder of class folders, through an autoencoder."""
    from sklearn.datasets import load_sample_image

    for name in ("china", "flower"):
        (tmp_path / "images" / name).mkdir(parents=True)
        picture = Image.fromarray(load_sample_image(f"{name}.jpg"))
        for i in range(2):
            picture.crop((i * 90, 40, i * 90 + 200, 240)).save(tmp_path / "images" / name / f"{i}.png")
    options = [*TINY_RUN, "--data.images", tmp_path / "images", "--data.image_size", 32, "--data.mirror", "true",
               "--train.batch_size", 4, "--train.steps", 2, "--out", tmp_path / "run", "--data.codec", vae]
    codes, output = launch(TRAIN, options)
    assert codes == [0], output
    weights = json.loads((tmp_path / "run" / "checkpoints" / "step-0000002" / "ema" / "config.json").read_text())
    assert (weights["num_classes"], weights["in_channels"], weights["input_size"]) == (2, 4, 16)
    codes, output = launch("sample/generate.py", ["--ckpt", tmp_path / "run", "--num-samples", 3, "--steps", 2])
    assert codes == [0], output
    picture = Image.open(next((tmp_path / "run").glob("samples/*cfg4*/images/000000.png")))
    assert picture.size == (32, 32) and picture.mode == "RGB"


def latent_options(latents, run, **options):
    options = {"train.batch_size": 20, "train.accumulation": 2, "train.steps": 4, "data.mirror": "true"} | options
    argv = [*TINY_RUN, "--data.latents", latents, "--out", run]
    return argv + [text for name, value in options.items() for text in (f"--{name}", value)]


def test_cached_latents_with_other_workers_after_a_kill(launch, latents, tmp_path):
    """An epoch of six steps, left in its middle; weights and losses bitwise those of an undisturbed run."""
    codes, output = launch(TRAIN, latent_options(latents, tmp_path / "whole"))
    assert codes == [0] and "120 images of 10 classes" in output, output
    resumed = tmp_path / "resumed"
    launch(TRAIN, latent_options(latents, resumed), die="after the first checkpoint")
    moved = shutil.copytree(latents, tmp_path / "moved")
    codes, output = launch(TRAIN, latent_options(moved, resumed, **{"data.num_workers": 2}))
    assert codes == [0] and "step 2 of 4" in output, output
    whole, again = state_of(tmp_path / "whole", 4), state_of(resumed, 4)
    assert whole.keys() == again.keys()
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []
    config = json.loads((resumed / "checkpoints" / "step-0000004" / "ema" / "config.json").read_text())
    assert (config["num_classes"], config["in_channels"], config["input_size"]) == (10, 4, 16)  # from the index
    codes, output = launch("sample/generate.py", ["--ckpt", resumed, "--num-samples", 2, "--steps", 2])
    assert codes == [0], output


def test_cached_latents_train_as_the_images_do(launch, latents, digit_folder, vae, tmp_path):
    """In float32 they are the same to rounding, mirror images too."""
    losses = []
    for name, options in (("cached", ["--data.latents", latents]),
                          ("images", ["--data.images", digit_folder, "--data.image_size", 32, "--data.codec", vae])):
        codes, output = launch(TRAIN, [*TINY_RUN, *options, "--data.mirror", "true", "--train.batch_size", 40,
                                       "--train.steps", 3, "--out", tmp_path / name])
        assert codes == [0], output
        losses.append([json.loads(line)["loss"] for line in (tmp_path / name / "stats.jsonl").open()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 3


def test_other_data_under_the_same_options_are_refused(launch, fails, latents, digit_folder, vae, make_vae, tmp_path):
    run, cached = tmp_path / "run", shutil.copytree(latents, tmp_path / "cached")
    argv = latent_options(cached, run)
    codes, output = launch(TRAIN, argv)
    assert codes == [0], output
    argv = [*argv, "--train.steps", 6]
    main = load_command(TRAIN).main
    assert "was encoded with" in fails(main, [*argv, "--data.codec", make_vae(1)])
    assert "was encoded at 32" in fails(main, [*argv, "--data.image_size", 64])
    assert "kind: latents -> digits" in fails(main, [*TINY_RUN, *argv[argv.index("--out"):]])
    shutil.rmtree(cached)
    codes, output = launch("sit_atconv/encode.py", [*encode_argv(digit_folder, vae, cached), "--dtype", "float16"])
    assert codes == [0], output
    assert f"{run} was started with other data (index: " in fails(main, argv)
    (cached / "shard-00001.safetensors").unlink()
    assert "shard-00001.safetensors is missing" in fails(main, argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.lr", "fast"], "train.lr"),
        (["--train.learning_rate", "1e-4"], "train.learning_rate"),
        (["--preset", "SiT-ATConv-XXL/2"], "SiT-ATConv-XL/2"),
        (["--train.precision", "fp16"], "use bf16"),
        (["--train.batch_size", "5000"], "batch_size 5000 exceeds the 1797 images"),
        (["--train.accumulation", "3"], "batch_size 64 is not divisible by accumulation 3"),
        (["--train.steps", "0"], "train.steps must be at least 1, not 0"),
        (["--model.patch_size", "3"], "8x8"),
        (["--model.mixer", "mamba"], "'mamba'"),
        (["--model.has_null_label", "false"], "flow.class_dropout_prob"),
        (["--data.images", "nowhere"], "nowhere is not a folder"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_errors_name_value_and_remedy(fails, argv, message, tmp_path):
    with working_folder(tmp_path):
        assert message in fails(load_command(TRAIN).main, argv)
        assert list(tmp_path.iterdir()) == []


def test_a_misspelt_key_in_a_yaml(fails, tmp_path):
    (tmp_path / "mine.yaml").write_text("train:\n  stepz: 3\n")
    assert "stepz" in fails(load_command(TRAIN).main, ["--config", tmp_path / "mine.yaml"])


def test_a_folder_without_images(fails, tmp_path):
    assert "holds no images" in fails(load_command(TRAIN).main, ["--data.images", tmp_path])


def test_resuming_with_other_options_shows_the_difference(fails, tiny_run):
    error = fails(load_command(TRAIN).main, [*TINY_RUN, "--out", tiny_run, "--train.lr", "0.5"])
    assert "train.lr: 0.003 -> 0.5" in error


def test_a_damaged_checkpoint_stops_before_anything_is_lost(fails, tiny_run, tmp_path):
    shutil.copytree(tiny_run, run := tmp_path / "run")
    (run / "checkpoints" / "step-0000004" / "optimizer.pt").write_bytes(b"cut")
    assert "delete it" in fails(load_command(TRAIN).main, [*TINY_RUN, "--train.steps", "6", "--out", run])


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_shipped_configs_parse(name):
    from sit_atconv.config import parse

    config = parse(["--config", str(ROOT / "configs" / name), "--train.precision", "bf16"])
    assert config.out.parts[0] == "runs"
