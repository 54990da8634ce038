"""The classification command: files of a run, exact resume, evaluation, and errors."""

import io
import json
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sit_atconv.models.attnet
from sit_atconv.classification.config import parse
from sit_atconv.classification.image_sets import open_images
from sit_atconv.data.digits import load_digits
from tests.conftest import ROOT, load_command, relative_error

CLASSIFY = "sit_atconv/classify.py"
TINY = [
    *["--model", "attnet_xxs", "--drop-path-rate", "0.2"],
    *["--data.cutmix", "1.0", "--data.mixup", "0.8", "--data.repeats", "2", "--data.erasing", "0.3"],
    *["--train.batch_size", "16", "--train.norm_batch", "4", "--train.steps", "4", "--train.warmup_epochs", "0"],
    *["--train.log_every", "1", "--train.eval_every", "100", "--train.checkpoint_every", "2"],
    *["--train.precision", "fp32", "--train.max_grad_norm", "1.0", "--train.ema_decay", "0.5"],
]


def tensors_of(run: Path, step: int) -> dict:
    checkpoint = run / "checkpoints" / f"step-{step:07d}"
    files = sorted(checkpoint.rglob("*.safetensors"))
    return {f"{file.relative_to(checkpoint)}/{name}": t for file in files for name, t in load_file(file).items()}


def stats_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "stats.jsonl").open()]


def assert_equal_runs(run: Path, other: Path, step: int):
    """Asserts that the last checkpoints, all logged losses and accuracies are bitwise equal."""
    mine, theirs = tensors_of(run, step), tensors_of(other, step)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    for a, b in zip(stats_of(run), stats_of(other), strict=True):
        assert {**a, "images_per_second": 0} == {**b, "images_per_second": 0}


@pytest.fixture(scope="session")
def whole(launch, tmp_path_factory):
    """A finished run of four steps on the digits."""
    run = tmp_path_factory.mktemp("classify") / "run"
    codes, output = launch(CLASSIFY, [*TINY, "--out", run])
    assert codes == [0], output
    return run, output


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory):
    """100 digits as PNGs in class folders, and the same as one webdataset shard."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "0000.tar", "w") as tar:
        for i, (pixels, label) in enumerate(zip(*(array[:100] for array in load_digits()), strict=True)):
            path = folder / "folders" / str(label) / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
            for name, content in ((f"{i:03d}.png", path.read_bytes()), (f"{i:03d}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


def test_files_of_a_run(whole):
    run, output = whole
    assert {path.name for path in run.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "data.json",
        "loss.png",
        "provenance.json",
        "stats.jsonl",
    }
    lines = stats_of(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"val_raw_top1", "val_raw_top5", "val_ema_top1", "val_ema_top5"} <= lines[-1].keys()
    assert "train_top1" not in lines[0]  # images are mixed
    assert f"{run} is complete: 4 steps" in output and f"--config {run}/config.yaml --eval-only" in output


def test_timm_loads_a_checkpoint(whole):
    folder = whole[0] / "checkpoints" / "step-0000004" / "ema"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == timm.create_model("attnet_xxs").state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 10)
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["crop_pct"], [*data["mean"]]) == ((1, 32, 32), 1.0, [0.5])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_bitwise(launch, whole, tmp_path, workers):
    argv = [*TINY, "--out", tmp_path / "run", "--data.num_workers", workers]
    codes, output = launch(CLASSIFY, argv, kill_at=3)
    assert codes == [-signal.SIGKILL], output
    codes, output = launch(CLASSIFY, argv)
    assert codes == [0] and "resuming" in output, output
    assert_equal_runs(tmp_path / "run", whole[0], 4)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_a_run_killed_at_five_places_resumes_bitwise(launch, tmp_path, processes, accumulation):
    argv = [*TINY, "--train.steps", "12", "--train.accumulation", accumulation]
    codes, output = launch(CLASSIFY, [*argv, "--out", tmp_path / "whole"], processes)
    assert codes == [0] * processes, output
    for kill_at in (1, 4, 6, 9, 11):
        run = tmp_path / f"killed-at-{kill_at}"
        codes, output = launch(CLASSIFY, [*argv, "--out", run], processes, kill_at=kill_at)
        assert -signal.SIGKILL in codes, output
        codes, output = launch(CLASSIFY, [*argv, "--out", run], processes)
        assert codes == [0] * processes, output
        assert_equal_runs(run, tmp_path / "whole", 12)


@pytest.mark.parametrize(
    ("processes", "accumulation"),
    [(2, 2), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(1, 2, marks=pytest.mark.slow)],
)
def test_processes_and_micro_batches_change_only_roundings(launch, whole, tmp_path, processes, accumulation):
    argv = [*TINY, "--out", tmp_path / "run", "--train.accumulation", accumulation]
    codes, output = launch(CLASSIFY, argv, processes)
    assert codes == [0] * processes, output
    for a, b in zip(stats_of(tmp_path / "run"), stats_of(whole[0]), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    mine, theirs = tensors_of(tmp_path / "run", 4), tensors_of(whole[0], 4)
    for name in (name for name in mine if "running" in name):
        assert relative_error(mine[name], theirs[name]) < 1e-4, name


def test_a_signal_saves_and_the_run_resumes_bitwise(launch, whole, tmp_path):
    argv = [*TINY, "--out", tmp_path / "run", "--train.checkpoint_every", "100"]
    codes, output = launch(CLASSIFY, argv, kill_at=1, kill_with=signal.SIGTERM)
    assert codes == [0] and "stopped by SIGTERM" in output, output
    codes, output = launch(CLASSIFY, argv)
    assert codes == [0], output
    assert_equal_runs(tmp_path / "run", whole[0], 4)


def test_a_loss_that_is_not_finite_ends_the_run(launch, tmp_path):
    argv = [*TINY, "--out", tmp_path / "run"]
    codes, output = launch(CLASSIFY, argv, die="the third loss of a classifier is not a number")
    assert codes == [1] and "not finite in step 3, which changed no weights; last good checkpoint: " in output, output
    assert "step-0000002. Start" in output and [line["step"] for line in stats_of(tmp_path / "run")] == [1, 2]


def test_evaluation_records_accuracy(launch, whole, tmp_path, class_folders):
    run = whole[0]
    codes, output = launch(CLASSIFY, ["--config", run / "config.yaml", "--eval-only", "--data.num_workers", "0"], 2)
    assert codes == [0, 0], output
    record = json.loads((run / "evaluation-step-0000004.json").read_text())
    last = stats_of(run)[-1]
    for kind in ("raw", "ema"):
        assert record["accuracy"][kind]["top1"] == pytest.approx(last[f"val_{kind}_top1"], abs=1e-6)
    share = record["accuracy"]["raw"]["top5"]
    assert record["accuracy"]["raw"]["top5_error"] == pytest.approx((share * (1 - share) / 360) ** 0.5)
    assert record["num_images"] == 360 and record["crop_ratio"] == 1.0 and record["versions"]["timm"]
    (run / "evaluation-step-0000004.json").unlink()

    weights = run / "checkpoints" / "step-0000004" / "model" / "model.safetensors"
    argv = ["--config", run / "config.yaml", "--eval-only", "--init-from", weights, "--out", tmp_path]
    codes, output = launch(CLASSIFY, [*argv, "--data.val", class_folders / "folders"])
    assert codes == [0] and "100 images" in output, output
    assert json.loads((tmp_path / "evaluation.json").read_text())["num_images"] == 100


def test_classes_with_numbers_for_names_are_in_the_order_of_their_labels(tmp_path):
    for name in range(12):
        (tmp_path / str(name)).mkdir()
        Image.fromarray(np.full((8, 8), name, np.uint8)).save(tmp_path / str(name) / "0.png")
    images = open_images(str(tmp_path), "train", 1)
    assert images.class_names == [str(name) for name in range(12)]
    assert [(np.array(image).max(), label) for image, label in map(images.read, range(12))] == [
        (i, i) for i in range(12)
    ]


def test_shards_hold_what_class_folders_hold(class_folders):
    sets = [open_images(name, "validation", 1) for name in (f"{class_folders}/folders", f"wds/{class_folders}/shards")]
    folders, shards = ([images.read(i) for i in range(len(images))] for images in sets)
    assert len(shards) == 100 and sets[0].labels == sets[1].labels
    assert sorted((x.tobytes(), y) for x, y in folders) == sorted((x.tobytes(), y) for x, y in shards)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("attnet-*.yaml")))
def test_shipped_configs_parse(name):
    config = parse(["--config", str(ROOT / "configs" / name), "--train.precision", "bf16"])
    assert config.out == Path("runs") / Path(name).stem and timm.is_model(config.model)
    if name != "attnet-digits.yaml":
        train, data = config.train, config.data
        assert config.model == Path(name).stem.replace("-", "_")
        assert (train.batch_size, train.lr, train.epochs, train.max_grad_norm) == (4096, 4e-3, 300, None)
        assert (data.cutmix, data.smoothing, data.repeats, data.crop_ratio) == (1.0, 0.1, 3, 0.875)
        assert (data.randaugment is None) == (name in ("attnet-xxs.yaml", "attnet-xs.yaml"))


# ------------------------------------------------------------------------------------------------------ bad input


def one_class(folder: Path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save((folder / "only").mkdir(parents=True) or folder / "only" / "0.png")


def no_classes(folder: Path):
    folder.mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "0.png")


def empty(folder: Path):
    folder.mkdir()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (one_class, "has one class only (only)"),
        (no_classes, "has images outside of class folders"),
        (empty, "holds no images in class folders"),
        (lambda folder: None, "there is no folder"),
    ],
)
def test_a_folder_without_classes_is_refused(fails, tmp_path, class_folders, make, message):
    make(tmp_path / "bad")
    argv = ["--data.train", tmp_path / "bad", "--data.val", class_folders / "folders"]
    assert message in fails(load_command(CLASSIFY).main, argv)


def test_other_classes_of_val_are_refused(fails, tmp_path, class_folders):
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name / "0.png")
    argv = ["--data.train", class_folders / "folders", "--data.val", tmp_path]
    error = fails(load_command(CLASSIFY).main, argv)
    assert "has 2 classes" in error and "has 10" in error and "do not match: a, b" in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "attnet_t9"], "there is no model attnet_t9: give one that timm or AttNet has, such as attnet_t"),
        (["--data.mean", "[0.5,0.5,0.5]"], "data.mean has 3 numbers, and the images have 1 channels"),
        (["--data.train", "x"], "none to evaluate on: give --data.val, too"),
        (["--data.val", "x"], "none to train on: give --data.train"),
        (["--data.crop_ratio", "1.2"], "data.crop_ratio must be in (0, 1], not 1.2"),
        (["--data.randaugment", "strong"], "data.randaugment strong is not timm's notation"),
        (["--data.colour", "1"], "data.colour"),
        (["--train.lr", "-1"], "train.lr must be finite and not negative, not -1"),
        (["--train.epochs", "2"], "train.warmup_epochs 2 makes 44 steps of warm-up, and the run has 44: lower it"),
        (["--train.norm_batch", "48"], "makes 64 images each, which are no whole groups of train.norm_batch 48"),
        (["--train.batch_size", "2000"], "batch_size 2000 exceeds the 1437 images"),
        (["--data.mixup", "1", "--train.norm_batch", "1"], "train.norm_batch 1 is odd"),
        (["--drop-path-rate", "1"], "drop_path_rate must be in [0, 1), not 1"),
        (["--init-from", "nowhere"], "nowhere does not exist"),
        (["--eval-only", "--out", "nowhere"], "nowhere has no checkpoint to evaluate"),
    ],
)
def test_bad_options_are_one_line(fails, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(load_command(CLASSIFY).main, argv)


def test_weights_that_do_not_fit_are_refused(fails, tmp_path, capsys):
    main = load_command(CLASSIFY).main
    save_file({"x_embedder.proj.weight": torch.ones(1), "y_embedder.embedding_table.weight": torch.ones(1)},
              tmp_path / "sit.safetensors")  # fmt: skip
    assert "a generator of images (SiT)" in fails(main, ["--init-from", tmp_path / "sit.safetensors"])
    model = timm.create_model("attnet_xxs", num_classes=7, in_chans=1)
    torch.save({"model": sit_atconv.models.attnet.official_state_dict(model)}, tmp_path / "official.pth")
    argv = ["--init-from", tmp_path / "official.pth", "--dry-run"]
    assert "has 7 classes and the data 10: give --reset-head true" in fails(main, argv)
    main([*map(str, argv), "--reset-head", "true"])
    assert capsys.readouterr().err == f"started from {tmp_path / 'official.pth'}\n"
    (tmp_path / "text.pth").write_text("no weights")
    assert "text.pth cannot be read as weights (it holds other" in fails(main, ["--init-from", tmp_path / "text.pth"])
    torch.save(timm.create_model("attnet_xs", num_classes=10, in_chans=1).state_dict(), tmp_path / "xs.pth")
    assert "does not fit attnet_xxs: stem.0.0.weight" in fails(main, ["--init-from", tmp_path / "xs.pth"])


def test_other_classes_are_reported(fails, whole, tmp_path, class_folders, capsys):
    """Their number is the same: only the names beside the weights tell them apart."""
    for label in range(10):
        (tmp_path / "named" / f"digit {label}").mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "named" / f"digit {label}" / "0.png")
    main, config = load_command(CLASSIFY).main, whole[0] / "config.yaml"
    error = fails(main, ["--config", config, "--eval-only", "--data.val", tmp_path / "named"])
    assert "trained on other classes: label 0 is 0 there and digit 0 in the data: give --data.val" in error
    for name, warned in ((tmp_path / "named", True), (class_folders / "folders", False)):
        argv = ["--config", config, "--data.train", name, "--data.val", name, "--train.batch_size", 8, "--dry-run"]
        main([*map(str, argv), "--init-from", str(whole[0]), "--out", str(tmp_path / "run")])
        said = capsys.readouterr().err
        assert f"started from {whole[0]}" in said and ("label 0 is 0 there and digit 0" in said) == warned


@pytest.mark.slow
def test_the_default_run_learns_the_digits(launch, tmp_path):
    codes, output = launch(CLASSIFY, ["--out", tmp_path / "run"])
    assert codes == [0], output
    last = stats_of(tmp_path / "run")[-1]
    # 99.2% and 98.3% on two kinds of CPU, whose rounding differs; the standard error of 360 digits is 0.6 points
    assert min(last["val_raw_top1"], last["val_ema_top1"]) >= 0.97, last


def test_resuming_with_other_options_shows_the_difference(fails, whole):
    error = fails(load_command(CLASSIFY).main, [*TINY, "--out", whole[0], "--train.lr", "0.5"])
    assert "train.lr 0.002 -> 0.5" in error
