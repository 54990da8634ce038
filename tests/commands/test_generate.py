"""The sampling command: its files, samples that do not depend on how they are drawn, resume, errors."""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sit_atconv.checkpoints.exported import save_weights
from sit_atconv.checkpoints.recipe import Recipe
from sit_atconv.flow.interpolants import DIFFUSION_FORMS
from sit_atconv.generation.generate import make_parser
from sit_atconv.models import SiT
from sit_atconv.runtime.files import exclusive
from tests.conftest import ROOT, load_command, python
from tests.models.test_sit import randomised

GENERATE = "sample/generate.py"


def options(run, out, *more):
    return ["--ckpt", run, "--cfg", 2, "--solver", "heun", "--steps", 3, "--num-samples", 20, "--out", out, *more]


@pytest.fixture(scope="module")
def samples(launch, tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("samples") / "out"
    codes, output = launch(GENERATE, options(tiny_run, out, "--batch-size", 64))
    assert codes == [0], output
    return out


def test_the_files_of_a_finished_command(samples, tiny_run):
    with np.load(samples / "samples.npz") as archive:
        assert archive.files == ["arr_0"]
        images = archive["arr_0"]
    assert images.dtype == np.uint8 and images.shape == (20, 8, 8, 3) and images.std() > 10
    for i in (0, 7, 19):
        assert np.array_equal(np.array(Image.open(samples / "images" / f"{i:06d}.png")), images[i])
    manifest = json.loads((samples / "manifest.json").read_text())
    assert manifest["complete"] and len(manifest["labels"]) == 20 and manifest["step"] == 4
    assert manifest["settings"]["cfg"] == 2 and manifest["settings"]["seed"] == 0
    assert {"weights", "uint8_rule", "solver", "steps", "dtype", "labels", "codec"} <= set(manifest["settings"])
    assert "guidance" not in manifest["settings"]  # as in manifests older than this option
    assert manifest["evaluations"] == 6 and manifest["forwards"] == 12  # Heun 3, both branches
    (session,) = manifest["sessions"]
    assert session["missing"] == 20 and {"sit_atconv", "torch", "diffusers"} <= set(session["versions"])
    assert min(Image.open(samples / "grid.png").size) > 100
    assert not [path for path in samples.rglob("*") if "partial" in path.name]


def assert_same_samples(folder, expected):
    """Asserts equal settings and labels, and images that differ by one grey level in at most 0.1% of values."""
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (folder, expected)]
    assert manifests[0]["complete"]
    assert manifests[0]["labels"] == manifests[1]["labels"] and manifests[0]["settings"] == manifests[1]["settings"]
    a, b = (np.load(path / "samples.npz")["arr_0"].astype(int) for path in (folder, expected))
    assert a.shape == b.shape and np.abs(a - b).max() <= 1 and (a != b).mean() <= 1e-3
    for i in range(len(a)):
        with Image.open(folder / "images" / f"{i:06d}.png") as image:
            assert np.array_equal(np.array(image), a[i])


@pytest.fixture(scope="module")
def sde_samples(launch, tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("samples") / "sde"
    codes, output = launch(GENERATE, [*options(tiny_run, out), "--solver", "sde-heun", "--steps", 4])
    assert codes == [0], output
    return out


@pytest.mark.parametrize(("batch_size", "processes"), [(1, 1), (7, 1), (7, 2)])
def test_samples_do_not_depend_on_batch_or_processes(launch, samples, tiny_run, tmp_path, batch_size, processes):
    codes, output = launch(GENERATE, options(tiny_run, tmp_path / "out", "--batch-size", batch_size), processes)
    assert codes == [0] * processes, output
    assert_same_samples(tmp_path / "out", samples)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["sessions"][0]["processes"] == processes


def test_sde_samples_do_not_depend_on_batch_or_processes(launch, sde_samples, tiny_run, tmp_path):
    argv = [*options(tiny_run, tmp_path / "out", "--batch-size", 7), "--solver", "sde-heun", "--steps", 4]
    codes, output = launch(GENERATE, argv, 2)
    assert codes == [0, 0], output
    assert_same_samples(tmp_path / "out", sde_samples)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_command_killed_five_times_is_completed(launch, sde_samples, tiny_run, tmp_path, processes):
    """Kills it at random moments; the same command then draws the missing samples."""
    argv = [*options(tiny_run, tmp_path / "out", "--batch-size", 2), "--solver", "sde-heun", "--steps", 4]
    written = []
    for _ in range(5):
        missing = 20 - len(list((tmp_path / "out" / "images").glob("0*.png"))) if written else 20
        at = int(np.random.default_rng(len(written)).integers(0, max(1, missing // processes - 2)))
        codes, output = launch(GENERATE, argv, processes, kill_at=at)
        assert -9 in codes, output
        written.append(len(list((tmp_path / "out" / "images").glob("0*.png"))))
    assert written == sorted(written) and written[-1] > 0
    codes, output = launch(GENERATE, argv, processes)
    assert codes == [0] * processes, output
    assert_same_samples(tmp_path / "out", sde_samples)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("every", [pytest.param(7, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.scale)])
def test_a_kill_before_any_write_is_repaired(launch, sde_samples, tiny_run, tmp_path, processes, every):
    argv = [
        *options(tiny_run, tmp_path / "out", "--batch-size", 4, "--num-samples", 8),
        "--solver",
        "sde-heun",
        "--steps",
        4,
        "--latents",
    ]
    whole = [*options(tiny_run, tmp_path / "whole", "--num-samples", 8), "--solver", "sde-heun", "--steps", 4]
    codes, output = launch(GENERATE, whole)
    assert codes == [0], output
    for number in itertools.count(1, every):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        codes, output = launch(GENERATE, argv, processes, die=number)
        if codes == [0] * processes:
            break
        assert -9 in codes, output
        codes, output = launch(GENERATE, argv, processes)
        assert codes == [0] * processes, (number, output)
        assert_same_samples(tmp_path / "out", tmp_path / "whole")
        assert not list((tmp_path / "out").rglob(".partial*")), number
    assert number > 30


def test_a_kill_while_a_file_is_written(launch, samples, tiny_run, tmp_path):
    for death in ("before the second renaming", "after the second renaming"):
        out = tmp_path / death
        codes, _ = launch(GENERATE, options(tiny_run, out), die=death)
        assert codes == [-9]
        codes, output = launch(GENERATE, options(tiny_run, out))
        assert codes == [0], output
        assert_same_samples(out, samples)
        assert not list(out.rglob(".partial*"))


@pytest.mark.slow
def test_compiled_samples_are_the_same(launch, samples, tiny_run, tmp_path):
    codes, output = launch(GENERATE, options(tiny_run, tmp_path / "out", "--compile"))
    assert codes == [0], output
    images, expected = (np.load(folder / "samples.npz")["arr_0"].astype(int) for folder in (tmp_path / "out", samples))
    assert np.abs(images - expected).max() <= 1 and (images != expected).mean() <= 1e-3
    manifest, eager = (json.loads((folder / "manifest.json").read_text()) for folder in (tmp_path / "out", samples))
    assert manifest["settings"] == eager["settings"] | {"compile": True}


def test_the_same_command_restores_deleted_files_only(launch, samples, tiny_run, tmp_path):
    out = tmp_path / "out"
    launch(GENERATE, options(tiny_run, out))
    before = (out / "images" / "000003.png").stat().st_mtime_ns
    for lost in (out / "samples.npz", out / "images" / "000004.png"):
        lost.unlink()
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({"settings": manifest["settings"], "complete": False}))
    codes, output = launch(GENERATE, options(tiny_run, out))
    assert codes == [0] and (out / "images" / "000003.png").stat().st_mtime_ns == before, output
    assert np.array_equal(np.load(out / "samples.npz")["arr_0"], np.load(samples / "samples.npz")["arr_0"])


def test_classes_balanced_labels_and_the_default_folder(launch, tiny_run):
    for more in (["--classes", 3, 7], ["--labels", "balanced"]):
        codes, output = launch(GENERATE, ["--ckpt", tiny_run, "--num-samples", 5, "--steps", 1, *more])
        assert codes == [0], output
    folders = sorted(folder for folder in (tiny_run / "samples").iterdir() if folder.is_dir())
    assert [folder.name for folder in folders] == [
        "step0000004-cfg4-unipc1-balanced-seed0-n5",
        "step0000004-cfg4-unipc1-classes3_7-seed0-n5",
    ]
    labels = [json.loads((folder / "manifest.json").read_text())["labels"] for folder in folders]
    assert len(set(labels[0])) == 5 and labels[1] == [3, 7, 3, 7, 3]


def test_labels_from_a_file_and_classes_by_name(launch, tiny_run, tmp_path):
    (tmp_path / "labels.txt").write_text("\n".join(str(label) for label in (5, 5, 1, 9, 0, 2, 2)))
    argv = ["--ckpt", tiny_run, "--num-samples", 5, "--steps", 1]
    names = json.loads(next(tiny_run.glob("checkpoints/*/ema/recipe.json")).read_text())["class_names"]
    for more, expected in (
        (["--out", tmp_path / "a", "--labels", tmp_path / "labels.txt"], [5, 5, 1, 9, 0]),
        (["--out", tmp_path / "b", "--classes", names[8], "4"], [8, 4, 8, 4, 8]),
    ):
        codes, output = launch(GENERATE, [*argv, *more])
        assert codes == [0], output
        assert json.loads((more[1] / "manifest.json").read_text())["labels"] == expected


def test_latents_decode_to_the_images_and_the_npz_is_optional(launch, samples, tiny_run, tmp_path):
    out = tmp_path / "out"
    codes, output = launch(GENERATE, options(tiny_run, out, "--latents", "--no-npz"))
    assert codes == [0] and not (out / "samples.npz").exists() and str(out / "images") in output, output
    for i in (0, 19):
        latent = np.load(out / "latents" / f"{i:06d}.npy")
        assert latent.shape == (1, 8, 8) and latent.dtype == np.float32
        pixels = np.clip(127.5 * latent + 128, 0, 255).astype(np.uint8)
        assert np.array_equal(np.array(Image.open(out / "images" / f"{i:06d}.png"))[..., 0], pixels[0])
    (out / "latents" / "000007.npy").unlink()
    codes, output = launch(GENERATE, options(tiny_run, out, "--latents"))  # now with the npz
    assert codes == [0] and (out / "latents" / "000007.npy").exists(), output
    assert_same_samples(out, samples)


def test_size_interval_schedule_weak_model_and_times(launch, tiny_run, tmp_path):
    argv = [
        "--ckpt",
        tiny_run,
        "--num-samples",
        3,
        "--cfg",
        3,
        "--interval",
        0.3,
        0.8,
        "--weak",
        tiny_run,
        "--no-npz",
        "--cfg-schedule",
        "cosine",
        "--times",
        0,
        0.2,
        0.5,
        1,
        "--size",
        8,
        12,
        "--dtype",
        "bf16",
    ]
    codes, output = launch(GENERATE, argv)
    assert codes == [0], output
    folder = next(path for path in (tiny_run / "samples").iterdir() if "weak" in path.name)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert re.fullmatch(
        r"step0000004-cfg3-cosine-0.3to0.8-weak\w{8}-unipc0_0.2_0.5_1-random-seed0-n3-8x12-bf16", folder.name
    )
    assert Image.open(folder / "images" / "000000.png").size == (12, 8)
    assert manifest["evaluations"] == 3 and manifest["forwards"] == 4  # the weak model at t = 0.5 only
    assert manifest["settings"]["weak"] == manifest["settings"]["weights"]


OWN_MODULE = '''
import torch
from sit_atconv.sampling import GUIDANCE, SOLVERS, Guidance, Solver, guided


def midpoint(velocity, x, times):
    for t, t_next in zip(times[:-1], times[1:]):
        dt = t_next - t
        x = x + dt * velocity(x + dt / 2 * velocity(x, t), t + dt / 2)
    return x


class ZeroInit:
    """CFG-Zero* (arXiv 2503.18886) without its scale: zero velocity in the first step."""

    def __init__(self, model, y, sampler, weak):
        self.velocity = guided(model, y, cfg=sampler.cfg, weak=weak)

    def __call__(self, x, t, step, num_steps):
        return torch.zeros_like(x) if step == 0 else self.velocity(x, t)


MIDPOINT = SOLVERS.register("midpoint", Solver(midpoint, evaluations=2))
ZERO_INIT = GUIDANCE.register("zero-init", Guidance(ZeroInit, needs_null_label=True))
'''


def test_custom_solver_and_guidance(launch, fails, tiny_run, tmp_path):
    """Names them as registered or by path; after a kill, the same command completes the samples."""
    (tmp_path / "own_sampling.py").write_text(OWN_MODULE)
    argv = ["--ckpt", tiny_run, "--cfg", 2, "--steps", 3, "--num-samples", 6, "--batch-size", 4]
    by_name = [*argv, "--solver", "midpoint", "--guidance", "zero-init", "--import", "own_sampling"]
    by_name += ["--out", tmp_path / "a"]
    by_path = [*argv, "--solver", "own_sampling.MIDPOINT", "--guidance", "own_sampling.ZERO_INIT"]
    codes, output = launch(GENERATE, by_name, die="before the second renaming", folder=tmp_path)
    assert codes == [-9], output
    for command in (by_name, by_path):
        codes, output = launch(GENERATE, command, folder=tmp_path)
        assert codes == [0], output
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert (manifest["settings"]["solver"], manifest["settings"]["guidance"]) == ("midpoint", "zero-init")
    assert (manifest["evaluations"], manifest["forwards"]) == (4, 8)  # two of three steps, both branches
    assert {"guidance", "solver", "steps", "dtype"} <= {*manifest["sampler"]} and "seed" not in manifest["sampler"]
    assert manifest["complete"] and manifest["batches"] == "agree to one grey level"
    (folder,) = tiny_run.glob("samples/*own_sampling*")
    assert folder.name == "step0000004-own_sampling.ZERO_INIT-cfg2-own_sampling.MIDPOINT3-random-seed0-n6"
    a, b = (np.load(path / "samples.npz")["arr_0"].astype(int) for path in (tmp_path / "a", folder))
    assert np.abs(a - b).max() <= 1
    main = load_command(GENERATE).main
    assert "guidance zero-init -> None" in fails(main, [*argv, "--out", tmp_path / "a"])
    for name, error in (
        ("midpiont", "solver must be one of euler"),
        ("nowhere.X", "the module nowhere cannot be"),
        ("json.dumps", "solver json.dumps is not a Solver"),
    ):
        assert error in fails(main, [*argv, "--solver", name])
    assert "guidance must be one of cfg, two-branch, or your own as module.NAME, not 'apg'" in fails(
        main, [*argv, "--guidance", "apg"]
    )


def test_published_weights_are_sampled_directly(launch, tmp_path, vae, fails):
    """Samples from a file in SiT's format; the samples are written beside it."""
    model = SiT.from_preset("SiT-ATConv-Tiny/2", num_classes=5, input_size=8)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    content = {"model": {}, "ema": model.state_dict(), "args": argparse.Namespace(num_classes=5, image_size=16)}
    torch.save(content, tmp_path / "sit.pt")
    argv = ["--ckpt", tmp_path / "sit.pt", "--vae", vae, "--num-samples", 2, "--steps", 1]
    main = load_command(GENERATE).main
    assert "SiT-ATConv-Tiny/2" in fails(main, argv)
    assert "attn.qkv.weight" in fails(main, [*argv, "--model", "SiT-Tiny/2"])
    codes, output = launch(GENERATE, [*argv, "--model", "SiT-ATConv-Tiny/2"])
    assert codes == [0], output
    (folder,) = (tmp_path / "sit" / "samples").iterdir()
    assert np.load(folder / "samples.npz")["arr_0"].shape == (2, 16, 16, 3)


def test_the_disk_is_checked_before_anything_is_written(launch, tiny_run, tmp_path, monkeypatch, fails):
    main = load_command(GENERATE).main
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**6))
    error = fails(main, ["--ckpt", tiny_run, "--num-samples", 5000, "--out", tmp_path / "out"])
    assert f"{tmp_path / 'out'} needs 1.9 MB and its disk has 1.0 MB free" in error
    assert not (tmp_path / "out").exists()
    main(["--ckpt", str(tiny_run), "--num-samples", "2", "--steps", "1", "--out", str(tmp_path / "out")])


def test_a_full_disk_keeps_what_was_generated(launch, samples, tiny_run, tmp_path):
    """Allows files of at most 8,000 bytes: PNGs and manifest are smaller, the npz is larger."""
    out, argv = tmp_path / "out", [*options(tiny_run, tmp_path / "out"), "--num-samples", 60]
    codes, output = launch(GENERATE, argv, die="files of 8 kB are too large")
    assert codes == [1] and "samples.npz cannot be written" in output and "Traceback" not in output
    assert len(list((out / "images").glob("0*.png"))) == 60 and not (out / "samples.npz").exists()
    codes, output = launch(GENERATE, argv)
    assert codes == [0] and len(np.load(out / "samples.npz")["arr_0"]) == 60, output
    for path in (samples / "images").glob("0*.png"):
        assert (out / "images" / path.name).read_bytes() == path.read_bytes()


def test_two_commands_do_not_write_to_one_folder(launch, samples, tiny_run, tmp_path):
    shutil.copytree(samples, tmp_path / "out")
    (tmp_path / "out" / "samples.npz").unlink()
    with exclusive(tmp_path / "out"):  # held by this process
        codes, output = launch(GENERATE, options(tiny_run, tmp_path / "out"))
    assert codes == [1] and f"in use by process {os.getpid()}" in output


def test_the_default_solver_suits_the_interpolant(launch, tmp_path):
    for path, solver in (("linear", "unipc"), ("gvp", "heun")):
        recipe = Recipe(path, "velocity", {"kind": "identity", "channels": 1, "downsample": 1}, list("0123456789"), 0)
        save_weights(randomised(in_channels=1), recipe, tmp_path / path)
        codes, output = launch(GENERATE, ["--ckpt", tmp_path / path, "--num-samples", 1, "--out", tmp_path / solver])
        assert codes == [0], output
        settings = json.loads((tmp_path / solver / "manifest.json").read_text())["settings"]
        assert (settings["solver"], settings["steps"]) == (solver, 25)


def test_the_command_runs_from_another_folder(tiny_run, tmp_path):
    command = python(ROOT / GENERATE, "--ckpt", tiny_run, "--cfg", "4.0", "--num-samples", 2, "--out", "s")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 samples" in done.stdout and (tmp_path / "s" / "grid.png").exists()


def test_errors_name_the_value_and_the_remedy(fails, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    main = load_command(GENERATE).main
    (tmp_path / "empty").mkdir()
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    out = tmp_path / "out"
    for argv, message in [
        (["--ckpt", tmp_path / "nowhere"], "neither a folder here"),
        (["--ckpt", "owner/no-such-model"], "owner/no-such-model"),
        (["--ckpt", tmp_path / "empty"], "is an empty folder"),
        (["--ckpt", tmp_path / "bytes"], "is not a checkpoint"),
        (["--ckpt", tiny_run, "--classes", "3", "10"], "class 10 is out of range: the model knows 0 ... 9"),
        (["--ckpt", tiny_run, "--classes", "-1"], "class -1 is out of range"),
        (["--ckpt", tiny_run, "--cfg", "four"], "'four' is not a finite number"),
        (["--ckpt", tiny_run, "--cfg", "nan"], "'nan' is not a finite number"),
        (["--ckpt", tiny_run, "--steps", "0"], "'0' is not a whole number of at least 1"),
        (["--ckpt", tiny_run, "--solver", "rk9"], "rk9"),
        (["--ckpt", tiny_run, "--classes"], "expected at least one argument"),
        (["--ckpt", tiny_run, "--classes", "walrus"], "there is no class 'walrus'"),
        (["--ckpt", tiny_run, "--labels", "sorted"], "labels sorted cannot be read"),
        (["--ckpt", tiny_run, "--size", "9"], "size 9 is not divisible by 2"),
        (["--ckpt", tiny_run, "--size", "8", "8", "8"], "size takes one side or two, not 3"),
        (["--ckpt", tiny_run, "--interval", "0.8", "0.3"], "not [0.8, 0.3]"),
        (["--ckpt", tiny_run, "--times", "0", "1", "0.5"], "not [0.0, 1.0, 0.5]"),
        (["--ckpt", tiny_run, "--times", "0", "0.5"], "from 0 (noise) to 1 (data), not from 0 to 0.5"),
        (["--ckpt", tiny_run, "--cfg-channels", "3"], "--cfg-channels 3 is more than the model's 1 channels"),
        (["--ckpt", tiny_run, "--classes", "3", "--labels", "balanced"], "contradict each other"),
        (["--ckpt", tiny_run, "--num-samples", "1000000000000"], "needs 384000.0 GB"),
        (["--ckpt", tiny_run, "--model", "SiT-XL/2"], "--model SiT-XL/2 is for files"),
        (["--ckpt", tiny_run, "--ema", "0.5"], "no EMA of decay 0.5"),
        (["--ckpt", tiny_run, "--weak", tmp_path / "nowhere"], "neither a folder here"),
        ([], "--ckpt"),
    ]:
        assert message in fails(main, [*argv, *(["--out", out] if argv else [])])
    assert not out.exists()


def test_samples_that_are_not_finite_are_an_error(launch, tiny_run, tmp_path):
    codes, output = launch(GENERATE, ["--ckpt", tiny_run, "--cfg", "1e30", "--out", tmp_path / "out"])
    assert codes == [1] and "samples 0 ... 63 are not finite with --cfg 1e+30 and --dtype fp32" in output
    assert not list((tmp_path / "out" / "images").iterdir())


def test_damaged_images_are_drawn_again(launch, samples, tiny_run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(samples, out)
    os.truncate(out / "images" / "000002.png", 60)
    (out / "images" / "000003.png").write_bytes(b"")
    (out / "images" / "000004 copy.png").write_bytes(b"mine")
    codes, output = launch(GENERATE, options(tiny_run, out))
    assert codes == [0] and (out / "images" / "000004 copy.png").exists(), output
    assert_same_samples(out, samples)
    assert [session["missing"] for session in json.loads((out / "manifest.json").read_text())["sessions"]] == [20, 2]


def test_the_error_of_a_damaged_manifest_names_it(fails, samples, tiny_run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(samples, out)
    for content in ("", "{", "[]", '{"complete": true}'):
        (out / "manifest.json").write_text(content)
        assert f"{out / 'manifest.json'} is damaged" in fails(load_command(GENERATE).main, options(tiny_run, out))


def test_an_edited_recipe_or_config_counts_as_other_weights(fails, tmp_path, capsys):
    """They give other images, which must not be mixed with the existing ones."""
    recipe = Recipe("linear", "velocity", {"kind": "identity", "channels": 1, "downsample": 1}, list("0123456789"), 0)
    save_weights(randomised(in_channels=1), recipe, tmp_path / "weights")
    argv = ["--ckpt", tmp_path / "weights", "--num-samples", 1, "--steps", 1, "--out", tmp_path / "out"]
    main = load_command(GENERATE).main
    main(list(map(str, argv)))
    capsys.readouterr()
    for name, change in (("recipe.json", ('"velocity"', '"data"')), ("config.json", ('"gelu_tanh"', '"silu"'))):
        path = tmp_path / "weights" / name
        before = path.read_text()
        path.write_text(before.replace(*change))
        assert path.read_text() != before and "holds other samples" in fails(main, argv)
        path.write_text(before)


def test_the_help_lists_all_diffusion_forms():
    choices = {action.dest: action.choices for action in make_parser()._actions}
    assert choices["diffusion_form"] == DIFFUSION_FORMS


def test_other_settings_never_overwrite_samples(fails, samples, tiny_run):
    before = (samples / "samples.npz").read_bytes()
    error = fails(load_command(GENERATE).main, [*options(tiny_run, samples), "--seed", 5])
    assert "seed 0 -> 5" in error and "another --out" in error
    assert (samples / "samples.npz").read_bytes() == before


@pytest.mark.parametrize(
    ("has_null_label", "trained", "why"),
    [
        (False, None, "has no null label"),
        (True, False, "was trained without label dropout"),
        (True, None, None),
        (True, True, None),
    ],
)
def test_guidance_needs_a_null_label_that_was_trained(fails, tmp_path, capsys, has_null_label, trained, why):
    """Without one, the default is no guidance and a given scale is an error; unknown counts as trained."""
    codec = {"kind": "identity", "channels": 1, "downsample": 1}
    recipe = Recipe("linear", "velocity", codec, list("0123456789"), 0, null_label_trained=trained)
    save_weights(randomised(has_null_label=has_null_label, in_channels=1), recipe, tmp_path / "weights")
    main = load_command(GENERATE).main
    argv = ["--ckpt", str(tmp_path / "weights"), "--num-samples", "1", "--steps", "1", "--out", str(tmp_path / "out")]
    main(argv)
    note = f"note: samples are not guided (--cfg 1): the model {why}"
    assert (note in capsys.readouterr().err) == (why is not None)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["settings"]["cfg"], manifest["forwards"]) == ((1.0, 1) if why else (4.0, 2))
    if why:
        error = fails(main, [*argv[:-1], tmp_path / "other", "--cfg", 4])
        assert "cfg = 4.0 needs a null label" in error and "cfg = 1" in error


def test_a_weak_model_must_have_the_same_classes(fails, tmp_path, capsys):
    """Its labels are reordered by name if needed; other classes are refused."""
    codec, main = {"kind": "identity", "channels": 1, "downsample": 1}, load_command(GENERATE).main
    names, images = [f"class {i}" for i in range(10)], {}
    model, weak = randomised(in_channels=1), randomised(in_channels=1)
    save_weights(model, Recipe("linear", "velocity", codec, names, 0), tmp_path / "model")
    save_weights(weak, Recipe("linear", "velocity", codec, names, 0), tmp_path / "weak")
    table = weak.y_embedder.embedding_table.weight.data
    table[:10] = table[:10].flip(0)
    save_weights(weak, Recipe("linear", "velocity", codec, names[::-1], 0), tmp_path / "flipped")
    save_weights(weak, Recipe("linear", "velocity", codec, [*names[:9], "other"], 0), tmp_path / "other")
    argv = ["--ckpt", tmp_path / "model", "--classes", 2, "--num-samples", 1, "--steps", 1]
    for name in ("weak", "flipped"):
        main(list(map(str, [*argv, "--weak", tmp_path / name, "--out", tmp_path / "out" / name])))
        images[name] = (tmp_path / "out" / name / "images" / "000000.png").read_bytes()
    assert images["weak"] == images["flipped"]
    capsys.readouterr()
    error = fails(main, [*argv, "--weak", tmp_path / "other", "--out", tmp_path / "x"])
    assert "the weak model has other classes: label 9 is 'other' there, 'class 9' here" in error


def test_classes_without_training_images_are_drawn_only_if_named(tmp_path, capsys):
    codec = {"kind": "identity", "channels": 1, "downsample": 1}
    recipe = Recipe("linear", "velocity", codec, list("0123456789"), 0, empty_classes=[0, 1, 2, 3, 4, 5, 9])
    save_weights(randomised(in_channels=1), recipe, tmp_path / "weights")
    main, labels = load_command(GENERATE).main, {}
    for name, more in (("random", ()), ("balanced", ("--labels", "balanced")), ("asked", ("--classes", "9", "7"))):
        out = tmp_path / name
        main(["--ckpt", str(tmp_path / "weights"), "--num-samples", "30", "--steps", "1", "--out", str(out), *more])
        labels[name] = json.loads((out / "manifest.json").read_text())["labels"]
    assert set(labels["random"]) == {6, 7, 8} and labels["balanced"].count(7) == 10 == labels["balanced"].count(6)
    assert set(labels["asked"]) == {7, 9}
    said = capsys.readouterr().err
    assert said.count("training images") == 1 and "note: label 9 ('9') had no training images" in said


def test_20_samples_are_extended_to_30(launch, samples, tiny_run, tmp_path):
    """Keeps the first 20; after a kill, the same command completes the rest."""
    out = shutil.copytree(samples, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    argv = [*options(tiny_run, out), "--num-samples", 30, "--no-npz"]
    codes, output = launch(GENERATE, argv, die="before the second renaming")
    assert codes == [-9], output
    codes, output = launch(GENERATE, argv)
    assert codes == [0] and not (out / "samples.npz").exists(), output
    codes, output = launch(GENERATE, argv[:-1])
    assert codes == [0], output
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["complete"] and manifest["settings"]["num_samples"] == 30 == len(manifest["labels"])
    assert {name: (out / "images" / name).stat().st_mtime_ns for name in before} == before
    images, fewer = (np.load(folder / "samples.npz")["arr_0"] for folder in (out, samples))
    assert len(images) == 30 and np.array_equal(images[:20], fewer)
    codes, output = launch(GENERATE, options(tiny_run, out))
    assert codes == [1] and "of 30 samples, more than --num-samples 20: give another --out, or" in output
