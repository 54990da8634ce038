"""Files that an earlier version wrote are read, completed and resumed.

tests/fixtures/README.md says how they were made. Everything is copied elsewhere first, and the commands are those that
users would type after an update.
"""

import json
import lzma
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from sit_atconv.checkpoints.weights import load_weights
from sit_atconv.evaluation.records import protocol_differences, read_evaluation
from sit_atconv.pipeline import SiTPipeline
from tests.conftest import load_command, relative_error

FIXTURES = Path(__file__).parent / "fixtures"
TRAIN, GENERATE, ENCODE = "sit_atconv/train.py", "sample/generate.py", "sit_atconv/encode.py"
TINY = [
    "--preset",
    "SiT-ATConv-Tiny/2",
    "--model.hidden_size",
    "12",
    "--model.depth",
    "2",
    "--model.num_heads",
    "2",
    "--train.precision",
    "fp32",
    "--train.lr",
    "1e-2",
    "--train.warmup_steps",
    "4",
    "--preview.num_steps",
    "2",
    "--preview.per_class",
    "1",
]
TRAINING = [
    *TINY,
    "--train.batch_size",
    "64",
    "--train.steps",
    "48",
    "--train.checkpoint_every",
    "40",
    "--train.keep_checkpoints",
    "1",
    "--train.log_every",
    "4",
    "--train.held_out_every",
    "8",
    "--train.ema_decay",
    "[0.9,0.5]",
    "--train.max_grad_norm",
    "1.0",
    "--train.weight_decay",
    "0.1",
]
HEUN = [
    "--ckpt",
    "finished",
    "--cfg",
    2,
    "--solver",
    "heun",
    "--steps",
    4,
    "--num-samples",
    100,
    "--labels",
    "balanced",
    "--seed",
    1,
]
ENCODING = [
    "--images",
    "images",
    "--vae",
    "vae",
    "--out",
    "latents",
    "--image-size",
    16,
    "--batch-size",
    4,
    "--shard-mib",
    0.01,
    "--num-workers",
    0,
    "--cpu-threads",
    1,
]


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the old files; it is the working folder."""
    folder = shutil.copytree(FIXTURES, tmp_path / "old")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(capsys):
    """run(command, argv) -> stdout and stderr of the command, run in this process."""
    threads = torch.get_num_threads()

    def run(command: str, argv: list) -> tuple[str, str]:
        capsys.readouterr()
        load_command(command).main(list(map(str, argv)))
        return capsys.readouterr()

    yield run
    torch.set_num_threads(threads)
    PartialState._reset_state()


def assert_same_images(images: np.ndarray, expected: np.ndarray) -> None:
    """Allows a difference of one grey level."""
    assert images.shape == expected.shape and np.abs(images.astype(int) - expected).max() <= 1


def read_npz(path: Path) -> np.ndarray:
    with np.load(path) as archive:
        return archive["arr_0"]


def read_images(folder: Path) -> np.ndarray:
    return np.stack([np.array(Image.open(path)) for path in sorted((folder / "images").glob("*.png"))])


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = sorted(checkpoint.rglob("*.safetensors"))
    return {f"{file.relative_to(checkpoint)}/{name}": t for file in files for name, t in load_file(file).items()}


# ---------------------------------------------------------------------------------------------------------- runs


def test_a_half_finished_run_resumes_to_the_same_weights(launch, old):
    """The run was killed at step 44, after the checkpoint of step 40; the same command resumes it."""
    codes, output = launch(TRAIN, [*TRAINING, "--out", "half"])
    assert codes == [0] and "step 40 of 48" in output and "half is complete: 48 steps" in output, output
    ours, theirs = (tensors_of(old / run / "checkpoints" / "step-0000048") for run in ("half", "finished"))
    assert ours.keys() == theirs.keys() and len(theirs) > 200
    before = tensors_of(FIXTURES / "half" / "checkpoints" / "step-0000040")
    assert len([name for name in theirs if not torch.equal(theirs[name], before[name])]) > 150
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor) or relative_error(ours[name], tensor) < 1e-5, name
    ours, theirs = ([json.loads(line) for line in (old / run / "stats.jsonl").open()] for run in ("half", "finished"))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(4, 49, 4))
    for name in ("loss", "grad_norm", "held_out_loss"):
        assert [line.get(name, 0) for line in ours] == pytest.approx([line.get(name, 0) for line in theirs], rel=1e-5)


def test_a_run_of_a_later_version_is_refused_with_its_number(old, fails):
    """Its checkpoint is not set aside as damaged."""
    file = old / "half" / "checkpoints" / "step-0000040" / "state.json"
    state = json.loads(file.read_text())
    state["digests"] = state.pop("sha256")
    file.write_text(json.dumps(state | {"versions": {"sit_atconv": "9.1"}}))
    error = fails(load_command(TRAIN).main, [*TRAINING, "--out", "half"])
    assert "has digests" in error and "it was written by 9.1; install that version or a later one" in error
    assert file.is_file()


def test_the_options_of_an_old_run_are_compared(old, run, fails):
    output, _ = run(TRAIN, [*TRAINING, "--out", "finished"])
    assert "finished is complete: 48 steps" in output
    argv = [*TRAINING, "--out", "half", "--flow.class_dropout_prob", 0.1]
    assert re.search(r"class_dropout_prob:? 0\.2 -> 0\.1\)", fails(load_command(TRAIN).main, argv))
    argv = [*TRAINING, "--out", "half", "--data.held_out", 134]
    assert re.search(r"held_out:? 133 -> 134\)", fails(load_command(TRAIN).main, argv))


# ------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize(
    "name, argv",
    [
        ("unipc", ["--ckpt", "finished", "--cfg", 2]),
        ("sde", ["--ckpt", "finished", "--ema", 0.5, "--solver", "sde-euler", "--cfg", 4, "--interval", 0.2, 0.8]),
        ("hybrid", ["--ckpt", "hybrid", "--cfg", 1, "--steps", 24, "--shift", 30]),  # on path gvp, predicting noise
        ("sit", ["--ckpt", "sit.pt"]),
    ],
)
def test_old_weights_give_the_same_images(old, run, name, argv):
    if name == "sit":
        (old / "sit.pt").write_bytes(lzma.decompress((old / "sit.pt.xz").read_bytes()))
    run(GENERATE, ["--num-samples", 12, "--steps", 6, "--out", "drawn", *argv])
    assert_same_images(read_npz(old / "drawn" / "samples.npz"), read_npz(old / "expected" / f"{name}.npz"))


def test_weights_of_a_later_version_are_refused_with_its_number(old, fails):
    file = old / "hybrid" / "recipe.json"
    recipe = json.loads(file.read_text())
    file.write_text(json.dumps(recipe | {"sigma_data": 0.5, "versions": {"sit_atconv": "9.1"}}))
    error = fails(load_command(GENERATE).main, ["--ckpt", "hybrid"])
    assert "has sigma_data" in error and "it was written by 9.1; install that version or a later one" in error


def test_an_old_pipeline_gives_the_same_images(old):
    pipeline = SiTPipeline.from_pretrained(old / "pipeline")
    images = pipeline(
        class_labels=[3, 7], guidance_scale=2.0, num_inference_steps=4, generator=torch.Generator().manual_seed(0)
    ).images
    assert_same_images(np.stack([np.array(image) for image in images]), read_npz(old / "expected" / "pipeline.npz"))
    weights = load_weights(str(old / "pipeline"))
    assert weights.recipe.step == 40 and weights.recipe.ema_decay == 0.99 and weights.recipe.codec["scale"] == 0.5
    assert weights.recipe.null_label_trained and weights.recipe.class_names[7] == "digit 7"


def test_a_partial_folder_of_samples_is_completed(old, run):
    """It is found by its settings, and equals a folder that was never interrupted."""
    [folder] = (old / "finished" / "samples").iterdir()
    before = {path.name: path.read_bytes() for path in (folder / "images").iterdir()}
    assert len(before) == 37
    run(GENERATE, HEUN)
    assert [*(old / "finished" / "samples").iterdir()] == [folder]
    assert {name: (folder / "images" / name).read_bytes() for name in before} == before
    assert_same_images(read_images(folder), read_images(old / "samples"))
    assert_same_images(read_npz(folder / "samples.npz"), read_npz(old / "samples" / "samples.npz"))
    ours, theirs = (json.loads((f / "manifest.json").read_text()) for f in (folder, old / "samples"))
    assert ours["complete"] and [session["missing"] for session in ours["sessions"]] == [100, 63]
    assert all(ours[key] == theirs[key] for key in ("settings", "labels", "step", "evaluations", "forwards"))


def test_an_old_record_compares_with_a_new_evaluation(old, run):
    run(
        "eval/fid.py",
        [
            "--samples",
            "samples",
            "--reference",
            "digits",
            "--extractor",
            "digits",
            "--features",
            "features",
            "--out",
            "new.json",
        ],
    )
    [record] = (old / "samples").glob("scores-digits-*.json")
    theirs, ours = read_evaluation(record), read_evaluation(old / "new.json")
    differences = protocol_differences(theirs, ours)
    assert {name for name in differences if not name.startswith("versions.")} == set()  # of libraries
    assert ours.subject["content"] == theirs.subject["content"] and ours.subject["weights"] == theirs.subject["weights"]
    assert ours.scores.keys() == theirs.scores.keys() and len(theirs.scores) == 5
    for name, score in theirs.scores.items():
        assert ours.scores[name].value == pytest.approx(score.value, rel=1e-6), name
        assert ours.scores[name].without_group == pytest.approx(score.without_group, rel=1e-6), name


# ------------------------------------------------------------------------------------------------------- latents


def test_old_latents_are_verified_and_trained_on(launch, old, run):
    output, _ = run(ENCODE, ["--verify", "latents"])
    assert "latents is intact: 24 images of 10 classes in 6 shards" in output
    codes, output = launch(
        TRAIN,
        [
            *TINY,
            "--data.latents",
            "latents",
            "--data.codec",
            "vae",
            "--data.mirror",
            "true",
            "--data.held_out",
            0,
            "--train.batch_size",
            24,
            "--train.steps",
            1,
            "--out",
            "run",
        ],
    )
    assert codes == [0] and "24 images of 10 classes as 4x8x8" in output and "run is complete" in output, output


def test_partial_latents_are_completed(old, run):
    latents, lost = old / "latents", old / "latents" / "shard-00003.safetensors"
    (latents / "index.json").unlink()
    lost.unlink()
    run(ENCODE, ENCODING)
    for theirs in sorted((FIXTURES / "latents").glob("shard-*")):
        ours = latents / theirs.name
        assert ours == lost or ours.read_bytes() == theirs.read_bytes()
    with safe_open(lost, "pt") as ours, safe_open(FIXTURES / "latents" / lost.name, "pt") as theirs:
        said = [json.loads(shard.metadata()["latents"])["content"] for shard in (ours, theirs)]
        assert said[0] == said[1] and ours.keys() == theirs.keys()
        for name in theirs.keys():  # noqa: SIM118
            assert relative_error(ours.get_tensor(name), theirs.get_tensor(name)) < 1e-3, name  # float16
    ours, theirs = (json.loads((folder / "latents" / "index.json").read_text()) for folder in (old, FIXTURES))
    assert ours["settings"] == theirs["settings"] and ours["class_counts"] == theirs["class_counts"]
