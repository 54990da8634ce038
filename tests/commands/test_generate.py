"""The sampling command: what it writes, that sample i is sample i, and its errors."""

import json
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, load_command, python

GENERATE = "sample/generate.py"


def options(run, out, *more):
    return ["--ckpt", run, "--cfg", 2, "--solver", "heun", "--steps", 3, "--num-samples", 20, "--out", out, *more]


@pytest.fixture(scope="module")
def samples(launch, tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("samples") / "out"
    codes, output = launch(GENERATE, options(tiny_run, out, "--batch-size", 64))
    assert codes == [0], output
    return out


def test_what_it_writes(samples, tiny_run):
    with np.load(samples / "samples.npz") as archive:
        assert archive.files == ["arr_0"]
        images = archive["arr_0"]
    assert images.dtype == np.uint8 and images.shape == (20, 8, 8, 3) and images.std() > 10
    for i in (0, 7, 19):
        assert np.array_equal(np.array(Image.open(samples / "images" / f"{i:06d}.png")), images[i])
    manifest = json.loads((samples / "manifest.json").read_text())
    assert manifest["complete"] and len(manifest["labels"]) == 20 and manifest["step"] == 4
    assert manifest["settings"]["cfg"] == 2 and manifest["settings"]["seed"] == 0
    assert {"weights", "uint8_rule", "solver", "steps", "dtype"} <= set(manifest["settings"])
    assert min(Image.open(samples / "grid.png").size) > 100
    assert not [path for path in samples.rglob("*") if "partial" in path.name]


@pytest.mark.parametrize(("batch_size", "processes"), [(1, 1), (7, 1), (7, 2)])
def test_samples_do_not_depend_on_batch_or_processes(launch, samples, tiny_run, tmp_path, batch_size, processes):
    codes, output = launch(GENERATE, options(tiny_run, tmp_path / "out", "--batch-size", batch_size), processes)
    assert codes == [0] * processes, output
    images, expected = (np.load(folder / "samples.npz")["arr_0"].astype(int) for folder in (tmp_path / "out", samples))
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (tmp_path / "out", samples)]
    assert manifests[0]["labels"] == manifests[1]["labels"] and manifests[0]["settings"] == manifests[1]["settings"]
    assert np.abs(images - expected).max() <= 1 and (images != expected).mean() <= 1e-3
    if processes == 2:
        assert manifests[0]["processes"] == 2


@pytest.mark.slow
def test_compiled_samples_are_the_same(launch, samples, tiny_run, tmp_path):
    codes, output = launch(GENERATE, options(tiny_run, tmp_path / "out", "--compile"))
    assert codes == [0], output
    images, expected = (np.load(folder / "samples.npz")["arr_0"].astype(int) for folder in (tmp_path / "out", samples))
    assert np.abs(images - expected).max() <= 1 and (images != expected).mean() <= 1e-3
    manifest, eager = (json.loads((folder / "manifest.json").read_text()) for folder in (tmp_path / "out", samples))
    assert manifest["settings"] == eager["settings"] | {"compile": True}


def test_a_kill_is_made_good_by_the_same_command(launch, samples, tiny_run, tmp_path, capsys):
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
        "step0000004-cfg4-euler1-balanced-seed0-n5", "step0000004-cfg4-euler1-classes3_7-seed0-n5",
    ]
    labels = [json.loads((folder / "manifest.json").read_text())["labels"] for folder in folders]
    assert len(set(labels[0])) == 5 and labels[1] == [3, 7, 3, 7, 3]


def test_as_typed_from_another_folder(tiny_run, tmp_path):
    command = python(ROOT / GENERATE, "--ckpt", tiny_run, "--cfg", "4.0", "--num-samples", 2, "--out", "s")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 samples" in done.stdout and (tmp_path / "s" / "grid.png").exists()


def test_errors_name_value_and_remedy(fails, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    main = load_command(GENERATE).main
    (tmp_path / "empty").mkdir()
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    out = tmp_path / "out"
    for argv, message in [
        (["--ckpt", tmp_path / "nowhere"], "neither a folder here"),
        (["--ckpt", "owner/no-such-model"], "owner/no-such-model"),
        (["--ckpt", tmp_path / "empty"], "is an empty folder"),
        (["--ckpt", tmp_path / "bytes"], "is no checkpoint"),
        (["--ckpt", tiny_run, "--classes", "3", "10"], "class 10 is out of range: the model knows 0 ... 9"),
        (["--ckpt", tiny_run, "--classes", "-1"], "class -1 is out of range"),
        (["--ckpt", tiny_run, "--cfg", "four"], "'four' is not a finite number"),
        (["--ckpt", tiny_run, "--cfg", "nan"], "'nan' is not a finite number"),
        (["--ckpt", tiny_run, "--steps", "0"], "'0' is not a whole number of at least 1"),
        (["--ckpt", tiny_run, "--solver", "rk9"], "rk9"),
        ([], "--ckpt"),
    ]:
        assert message in fails(main, [*argv, *(["--out", out] if argv else [])])
    assert not out.exists()


def test_other_settings_never_overwrite(fails, samples, tiny_run):
    before = (samples / "samples.npz").read_bytes()
    error = fails(load_command(GENERATE).main, [*options(tiny_run, samples), "--seed", 5])
    assert "seed 0 -> 5" in error and "another --out" in error
    assert (samples / "samples.npz").read_bytes() == before


def test_guidance_needs_a_null_label(fails, tmp_path):
    from sit_atconv.checkpointing.weights import Recipe, save_weights
    from tests.models.test_sit import randomised

    codec = {"kind": "identity", "channels": 4, "downsample": 1}
    recipe = Recipe("linear", "velocity", codec, list("0123456789"), 0)
    save_weights(randomised(has_null_label=False), recipe, tmp_path / "weights")
    error = fails(load_command(GENERATE).main, ["--ckpt", tmp_path / "weights", "--out", tmp_path / "out"])
    assert "cfg = 4.0 needs a null label" in error and "cfg = 1" in error
