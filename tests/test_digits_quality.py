"""Tests that the check of generated digits refuses cheats, and (slow) that trained models pass it."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import yaml
from PIL import Image

from sit_atconv.data.digits import load_digits
from sit_atconv.runtime.installation import shipped_sweeps
from sit_atconv.training.config import parse
from tests.conftest import ROOT, python
from tests.digits_quality import measure_quality

real_images, real_labels = load_digits()
WANTED = np.arange(1000) % 10
SLOW = [("vp", "noise"), ("vp", "score")]  # 52.5% and 13.5% in a third of the steps: docs/training.md explains it


def test_class_means_fail():
    """A classifier reads every class mean, but their distribution and spread are wrong."""
    means = np.stack([real_images[real_labels == c].mean(0) for c in range(10)]).astype(np.uint8)
    quality = measure_quality(means[WANTED], WANTED)
    assert quality.accuracy == 1.0 and {"frechet_to_half", "spread"} <= set(quality.failures())


def test_copies_of_training_images_fail():
    """Only the distance to the nearest training image shows it."""
    copies = np.stack([real_images[real_labels == label][i // 10] for i, label in enumerate(WANTED)])
    assert measure_quality(copies, WANTED).failures() == ["nearest"]


PAIRS = [
    [("vp", "velocity"), ("linear", "velocity")],
    [("gvp", "velocity"), ("linear", "noise")],
    [("gvp", "score"), ("vp", "data")],
]
OTHERS = [("gvp", "noise"), ("linear", "score"), ("linear", "data"), ("gvp", "data")]


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: " and ".join("-".join(kind) for kind in pair))
def test_every_path_and_every_prediction_learns_the_digits(launch, tmp_path, pair):
    """A third of the quickstart's steps is enough."""
    assert_learn(launch, tmp_path, pair, parse([]).train.steps // 3)


@pytest.mark.scale
def test_every_other_combination_learns_the_digits(launch, tmp_path):
    assert_learn(launch, tmp_path, OTHERS, parse([]).train.steps // 3)


@pytest.mark.scale
def test_every_slow_combination_learns_the_digits_in_all_steps(launch, tmp_path):
    assert_learn(launch, tmp_path, SLOW, parse([]).train.steps)


def assert_learn(launch, folder, kinds, steps):
    """Trains each (path, prediction), two at a time, since each run uses one core."""
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda kind: learn(launch, folder / "-".join(kind), *kind, steps), kinds))
    for (path, prediction), quality in zip(kinds, found, strict=True):
        print(f"\n| {path} | {prediction} | {quality.accuracy:.1%} | {quality.frechet_to_half:.2f} |")
    assert min(quality.accuracy for quality in found) >= 0.9


def learn(launch, folder, path, prediction, steps):
    """Trains, samples and measures the quality of the samples."""
    run, samples = folder / "run", folder / "samples"
    codes, output = launch(
        "sit_atconv/train.py",
        ["--train.steps", steps, "--flow.path", path, "--flow.prediction", prediction, "--out", run],
        seconds=1200,
    )
    assert codes == [0], output
    codes, output = launch(
        "sample/generate.py",
        [
            "--ckpt",
            run,
            "--cfg",
            2,
            "--num-samples",
            200,
            "--labels",
            "balanced",
            "--steps",
            100,
            "--batch-size",
            200,
            "--out",
            samples,
        ],
        seconds=1200,
    )
    assert codes == [0], output
    labels = np.array(json.loads((samples / "manifest.json").read_text())["labels"])
    return measure_quality(np.load(samples / "samples.npz")["arr_0"][..., 0], labels)


@pytest.mark.slow
def test_the_quickstarts_digits_are_good(tmp_path):
    """The tour trains, generates, evaluates, compares speed and classifies, as a user runs it."""
    done = subprocess.run(
        python("-m", "sit_atconv.quickstart", "--out", "tour"), cwd=tmp_path, text=True, stdout=subprocess.PIPE
    )
    assert done.returncode == 0
    print(done.stdout)
    samples = tmp_path / "tour" / "samples"
    images = np.load(samples / "samples.npz")["arr_0"]
    labels = np.array(json.loads((samples / "manifest.json").read_text())["labels"])
    assert images.shape == (1000, 8, 8, 3) and (np.bincount(labels) == 100).all()
    quality = measure_quality(images[..., 0], labels)
    print(quality)
    assert quality.failures() == []

    scores = json.loads((tmp_path / "tour" / "scores.json").read_text())
    found = {name: score["value"] for name, score in scores["scores"].items()}
    assert 0 < found["FD-digits-1000"] < 5 and found["precision-digits"] > 0.5
    speed = json.loads((tmp_path / "tour" / "speed" / "speed.json").read_text())
    assert len(speed["measurements"]) == 8
    last = json.loads((tmp_path / "tour" / "classifier" / "stats.jsonl").read_text().splitlines()[-1])
    assert last["val_raw_top1"] >= 0.94
    for picture in ("run/loss.png", "samples/grid.png", "speed/speed.png", "classifier/loss.png"):
        assert f"tour/{picture}" in done.stdout and min(Image.open(tmp_path / "tour" / picture).size) > 200
    for command in ("accelerate launch", "sample/generate.py", "eval/fid.py", "eval/speed.py", "classify.py"):
        assert command in done.stdout


@pytest.mark.slow
def test_the_digits_of_one_step_are_good(launch, tmp_path):
    """Distances without guidance, beside that of flow matching with Heun and NFE 24 (docs/one-step.md: three seeds)."""
    flow, error = 0.43, 0.04
    study = yaml.safe_load(shipped_sweeps()["digits-one-step"].read_text())
    samplers = ["1 step", "4 steps", "Heun, NFE 24"]
    study |= {"out": str(tmp_path / "out"), "grid": {"objective": "MeanFlow", "seed": 0, "sampler": samplers}}
    del study["report"]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    subprocess.run(python(ROOT / "eval/sweep.py", tmp_path / "study.yaml"), check=True)
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    one, four, heun = (row["FD-digits-1000"] for row in rows)
    print(one, four, heun)
    assert one <= 2 * flow and four <= 1.3 * flow
    assert abs(heun - flow) <= 2 * (error**2 + rows[2]["error of FD-digits-1000"] ** 2) ** 0.5
    argv = ["--ckpt", tmp_path / "out/MeanFlow-seed0", "--num-samples", 1000, "--labels", "balanced"]
    codes, output = launch("sample/generate.py", [*argv, "--out", tmp_path / "one"])
    assert codes == [0], output
    labels = np.array(json.loads((tmp_path / "one" / "manifest.json").read_text())["labels"])
    quality = measure_quality(np.load(tmp_path / "one" / "samples.npz")["arr_0"][..., 0], labels)
    print(quality)
    assert quality.failures() == []
