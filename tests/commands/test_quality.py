"""Frechet distances during training: equal to those of the commands, and without a trace in the weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sit_atconv.checkpoints.run_folder import best_step, checkpoint_step, list_checkpoints, quality_record
from tests.commands.test_train import TRAIN, state_of, stats_of
from tests.conftest import TINY_RUN, load_command

SAMPLES = 60
NAME = f"quality/FD-digits-{SAMPLES}"
SAMPLER = {"num_samples": SAMPLES, "solver": "euler", "num_steps": 2, "extractor": "digits", "batch_size": 20}


def quality_argv(features: Path, *more) -> list:
    options = [text for name, value in SAMPLER.items() for text in (f"--quality.{name}", value)]
    return [*TINY_RUN, "--train.evaluate_every", 2, *options, "--quality.features", features, *more]


@pytest.fixture(scope="module")
def measured(launch, tmp_path_factory):
    """A run with two evaluations, which keeps one checkpoint beside the best."""
    folder = tmp_path_factory.mktemp("measured")
    argv = quality_argv(folder / "features", "--train.keep_checkpoints", 1, "--train.keep_best", "true")
    codes, output = launch(TRAIN, [*argv, "--out", folder / "run"])
    assert codes == [0] and f"step 2: {NAME} " in output, output
    return folder / "run"


def score_of(checkpoint: Path, out: Path, capsys, *which) -> dict:
    """The scores that the commands give the samples of a checkpoint."""
    drawn = ["--num-samples", SAMPLES, "--labels", "balanced", "--solver", "euler", "--steps", 2, "--cfg", 1, *which]
    generate, fid = load_command("sample/generate.py"), load_command("eval/fid.py")
    generate.main([*map(str, ["--ckpt", checkpoint, *drawn, "--batch-size", 20, "--no-npz", "--out", out])])
    capsys.readouterr()
    scored = ["--reference", "digits", "--extractor", "digits", "--metrics", "fid", "--batch-size", 20]
    fid.main([*map(str, ["--samples", out, *scored, "--features", out / "features", "--json"])])
    return json.loads(capsys.readouterr().out)["scores"][f"FD-digits-{SAMPLES}"]


def test_the_bits_are_the_same_with_and_without(measured, tiny_run):
    one, two = state_of(measured, 4), state_of(tiny_run, 4)
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
    assert [line["loss"] for line in stats_of(measured)] == [line["loss"] for line in stats_of(tiny_run)]


def test_the_log_the_records_and_the_best(measured, capsys, tmp_path):
    lines = {line["step"]: line for line in stats_of(measured)}
    assert [NAME in lines[step] for step in (1, 2, 3, 4)] == [False, True, False, True]
    score = score_of(measured / "checkpoints" / "step-0000004", tmp_path / "samples", capsys)
    assert lines[4][NAME] == pytest.approx(score["value"], rel=1e-6)
    assert lines[4][f"{NAME}/error"] == pytest.approx(score["error"], rel=1e-6)
    assert sorted(path.name for path in (measured / "quality").iterdir()) == [
        f"step-000000{step}.{suffix}" for step in (2, 4) for suffix in ("json", "png")
    ]
    best = min((2, 4), key=lambda step: lines[step][NAME])
    assert best_step(measured) == best and (measured / "best").resolve().name == f"step-000000{best}"
    assert {best, 4} <= {checkpoint_step(path) for path in list_checkpoints(measured)}
    assert Image.open(measured / "loss.png").width > 1500  # with a third panel
    assert len(list((measured.parent / "features").iterdir())) == 2  # of the 1,797 digits, not of samples


@pytest.mark.parametrize("write", [5, *(pytest.param(write, marks=pytest.mark.slow) for write in (1, 40, 75, 160))])
def test_a_killed_evaluation_is_completed(launch, measured, tmp_path, write):
    run, argv = tmp_path / "run", quality_argv(measured.parent / "features")
    codes, output = launch(TRAIN, [*argv, "--out", run], die=write, work=run / "quality")
    assert codes == [-9], output
    codes, output = launch(TRAIN, [*argv, "--out", run])
    assert codes == [0] and "warning" not in output, output
    assert [line.get(NAME) for line in stats_of(run)] == [line.get(NAME) for line in stats_of(measured)]
    one, two = state_of(measured, 4), state_of(run, 4)
    assert all(one[name].equal(two[name]) for name in one)


def test_the_last_evaluation_is_completed_after_the_training(launch, measured, tmp_path):
    run, argv = tmp_path / "run", quality_argv(measured.parent / "features")
    shutil.copytree(measured, run, symlinks=True)
    (run / "quality" / "step-0000004.json").unlink()
    lines = [
        {name: value for name, value in line.items() if line["step"] < 4 or name != NAME} for line in stats_of(run)
    ]
    (run / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    codes, output = launch(TRAIN, [*argv, "--out", run])
    assert codes == [0] and "is complete" in output and "training" not in output, output
    assert stats_of(run)[-1][NAME] == stats_of(measured)[-1][NAME]


def test_two_processes_and_two_averages_equal_the_commands(launch, measured, tmp_path, capsys):
    run = tmp_path / "run"
    argv = quality_argv(measured.parent / "features", "--train.ema_decay", "[0.9,0.5]", "--train.steps", 2)
    codes, output = launch(TRAIN, [*argv, "--out", run], processes=2)
    assert codes == [0, 0], output
    line = stats_of(run)[-1]
    for decay, name in ((0.9, NAME), (0.5, NAME.replace("quality/", "quality/ema0.5/"))):
        score = score_of(run, tmp_path / f"samples{decay}", capsys, "--ema", decay)
        assert line[name] == pytest.approx(score["value"], rel=1e-6), name


def test_a_run_that_starts_again_forgets_the_scores_of_the_former(launch, measured, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(measured, run, symlinks=True)
    shutil.rmtree(run / "checkpoints")
    argv = quality_argv(measured.parent / "features", "--train.seed", 1)
    codes, output = launch(TRAIN, [*argv, "--out", run])
    assert codes == [0], output
    assert stats_of(run)[-1][NAME] != stats_of(measured)[-1][NAME]


def test_an_evaluation_that_fails_does_not_end_the_run(launch, tmp_path):
    (tmp_path / "few").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "few" / "1.png")
    (tmp_path / "few" / "2.png").write_bytes(b"damaged")
    argv = quality_argv(tmp_path / "features", "--quality.reference", tmp_path / "few", "--train.steps", 2)
    codes, output = launch(TRAIN, [*argv, "--out", tmp_path / "run"])
    assert codes == [0] and "warning: the quality of samples at step 2 is not known: " in output, output
    assert list((tmp_path / "run" / "quality").iterdir()) == []  # no samples are left behind


@pytest.mark.parametrize("number", [1, 2])
def test_a_failure_of_one_process_does_not_stop_the_others(launch, measured, tmp_path, number):
    """The records cannot be written, which only the first process does."""
    run = tmp_path / "run"
    (run / "quality" / ".partial-step-0000002.json").mkdir(parents=True)
    argv = quality_argv(measured.parent / "features", "--train.steps", 2)
    codes, output = launch(TRAIN, [*argv, "--out", run], processes=number, seconds=100)
    assert codes == [0] * number and "is not known" in output, output


def test_options_that_cannot_work(fails, latents, tmp_path):
    def error(*options):
        return fails(load_command(TRAIN).main, [*TINY_RUN, "--out", tmp_path / "run", *options])

    assert "train.keep_best keeps the best of several evaluations" in error("--train.keep_best", "true")
    every = ("--train.evaluate_every", 2)
    assert "quality.reference nowhere does not exist" in error(*every, "--quality.reference", "nowhere")
    assert "quality.num_samples must be at least 2" in error(*every, "--quality.num_samples", 1)
    assert "train.evaluate_every needs quality.reference" in error(*every, "--data.latents", latents)
    assert "quality: there is no extractor 'digts'" in error(*every, "--quality.extractor", "digts")
    assert "quality: there is no file nowhere" in error(*every, "--quality.weights", "nowhere", "--dry-run")
    assert "train.evaluate_every must be at least 1" in error("--train.evaluate_every", 0)


def test_the_default_reference_is_cropped_as_the_training_crops_it(launch, tmp_path):
    for i, size in enumerate([(20, 16), (16, 26)] * 30):
        (tmp_path / "images" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i % 2}" / f"{i}.png")
    argv = quality_argv(tmp_path / "features", "--data.images", tmp_path / "images", "--data.codec", "identity")
    more = ["--data.image_size", 8, "--train.batch_size", 20, "--train.steps", 2, "--out", tmp_path / "run"]
    codes, output = launch(TRAIN, [*argv, *more])
    assert codes == [0] and f"step 2: {NAME} " in output, output


def test_scores_of_other_settings_are_not_mixed_without_a_word(launch, measured, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(measured, run, symlinks=True)
    argv = quality_argv(measured.parent / "features", "--train.steps", 6, "--quality.seed", 5, "--quality.num_steps", 3)
    codes, output = launch(TRAIN, [*argv, "--out", run])
    said = "step 6 is measured in another way than step 4 (samples.sampler.steps 2 -> 3): do not compare them"
    assert codes == [0] and said in output, output


def test_options_of_quality_without_evaluations_are_pointed_out(tmp_path, capsys):
    load_command(TRAIN).main([*TINY_RUN, "--out", str(tmp_path), "--quality.extractor", "digits", "--dry-run"])
    assert "the options of quality do nothing without train.evaluate_every" in capsys.readouterr().err


def test_statistics_of_another_extractor_are_refused_at_the_start(fails, tmp_path, capsys):
    statistics = tmp_path / "statistics.npz"
    made = ["--make-reference", statistics, "--reference", "digits", "--extractor", "digits"]
    load_command("eval/fid.py").main([*map(str, made), "--features", str(tmp_path / "features")])
    capsys.readouterr()
    argv = [*TINY_RUN, "--out", tmp_path / "run", "--train.evaluate_every", 2, "--quality.reference", statistics]
    printed = fails(load_command(TRAIN).main, [*argv, "--quality.extractor", "fashion"])
    assert "quality: " in printed and "made with an extractor of name 'digits'" in printed


def test_only_scores_that_were_measured_alike_are_compared(tmp_path):
    for step, value, protocol in ((1, 80.0, "a"), (2, 1.0, "b"), (3, 60.0, "a"), (4, 70.0, "a")):
        (tmp_path / "checkpoints" / f"step-{step:07d}").mkdir(parents=True)
        quality_record(tmp_path, step).parent.mkdir(exist_ok=True)
        record = {"log": {"quality/FD": value}, "protocol": protocol}
        quality_record(tmp_path, step).write_text(json.dumps(record))
    assert best_step(tmp_path) == 3
    for content in ("{}", '{"log": {}, "protocol": {}}', "[]", "{"):
        quality_record(tmp_path, 4).write_text(content)
        with pytest.raises(ValueError, match=r"step-0000004\.json is damaged"):
            best_step(tmp_path)


def test_dry_run_tells_the_cost(tmp_path, capsys):
    load_command(TRAIN).main([*map(str, quality_argv(tmp_path)), "--dry-run"])
    assert f"2 times {SAMPLES} samples of 1 average, 2 forwards each: " in capsys.readouterr().out
