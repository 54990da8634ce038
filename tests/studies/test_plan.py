"""Plan of a sweep: its file, the runs and their command lines."""

from contextlib import nullcontext

import pytest
import yaml

from sit_atconv.evaluation.records import Evaluation
from sit_atconv.evaluation.scores import Score
from sit_atconv.runtime.installation import shipped_sweeps
from sit_atconv.studies.plan import read_sweep
from sit_atconv.studies.records import collect_scores, read_scores
from sit_atconv.studies.sweep import in_lines, missing_tasks

SWEEP = {
    "out": "runs/x",
    "train": "--config digits",
    "generate": "--cfg 1",
    "evaluate": "--reference digits",
    "axes": {
        "mixer": {"attention": {"train": "--model.mixer attention"}, "ATConv": {"train": "--model.mixer atconv"}},
        "seed": {"train": "--train.seed", "generate": "--seed"},
        "steps": {"generate": "--steps"},
        "ema": {"generate": "--ckpt {run}/checkpoints/step-{ema:07d}"},
    },
    "grid": {"mixer": ["attention", "ATConv"], "seed": [0, 1], "steps": [4]},
}


@pytest.fixture
def read(tmp_path):
    """read(entry=value, ...) reads SWEEP with other entries; None removes one."""

    def read_changed(**changes):
        content = {name: value for name, value in {**SWEEP, **changes}.items() if value is not None}
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return read_sweep(path)

    return read_changed


def test_a_grid_becomes_runs_with_leaves(read):
    runs = read(grid=[SWEEP["grid"], {"mixer": "ATConv", "seed": 0, "steps": 8}]).runs()
    assert [(run.name, [leaf.name for leaf in run.leaves]) for run in runs] == [
        ("attention-seed0", ["attention-seed0-steps4"]),
        ("attention-seed1", ["attention-seed1-steps4"]),
        ("ATConv-seed0", ["ATConv-seed0-steps4", "ATConv-seed0-steps8"]),
        ("ATConv-seed1", ["ATConv-seed1-steps4"]),
    ]
    leaf = runs[3].leaves[0]
    assert " ".join(runs[3].argv) == ("--config digits --model.mixer atconv --train.seed 1 --out runs/x/ATConv-seed1")
    assert " ".join(leaf.generate_argv) == (
        "--ckpt runs/x/ATConv-seed1 --cfg 1 --seed 1 --steps 4 --out runs/x/ATConv-seed1/samples/steps4"
    )
    assert leaf.evaluate_argv[:4] == ["--samples", "runs/x/ATConv-seed1/samples/steps4", "--reference", "digits"]
    assert leaf.run.sweep.label(leaf.settings) == "ATConv, steps 4"


def test_the_file_of_the_scores_changes_with_every_option(read):
    def scores(**changes):
        return read(**changes).runs()[0].leaves[0].scores.name

    others = [scores(train="--config digits-onestep"), scores(generate="--cfg 2"), scores(evaluate="--reference x")]
    assert len({scores(), *others}) == 4 and scores() == scores(report={"metric": "FD-digits"})


def test_options_name_the_values_of_other_axes_and_the_folders(read):
    sweep = read(grid={"mixer": "ATConv", "seed": 0, "ema": [200, 400]})
    assert "runs/x/ATConv-seed0/checkpoints/step-0000400" in sweep.runs()[0].leaves[1].generate_argv


def test_a_run_that_starts_from_another_one_waits_for_it(read):
    axes = {
        "seed": {"train": "--train.seed"},
        "start": {"none": {"train": "--train.lr 1e-3"}, "warm": {"train": "--init-from {out}/seed{seed}-none"}},
    }
    sweep = read(axes=axes, grid={"seed": [0, 1], "start": ["warm", "none"]}, evaluate=None, generate=None)
    tasks = {task.name: task for task in missing_tasks(sweep.runs(), jobs=1)}
    assert {name: set(task.needs) for name, task in tasks.items()} == {
        "seed0-warm.training": {"seed0-none.training"},
        "seed1-warm.training": {"seed1-none.training"},
        "seed0-none.training": set(),
        "seed1-none.training": set(),
    }


def test_commands_for_a_scheduler_are_one_line_for_each_training(read):
    lines = in_lines(missing_tasks(read().runs(), jobs=1))
    assert [[name for name, _ in line.steps] for line in lines] == [["train", "generate", "fid"]] * 4
    of_weights = read(train=None, ckpt="some/run", axes={"steps": {"generate": "--steps"}}, grid={"steps": [2, 4]})
    lines = in_lines(missing_tasks(of_weights.runs(), jobs=1))
    assert [[name for name, _ in line.steps] for line in lines] == [["generate", "fid"]] * 2
    assert lines[0].steps[0][1][:2] == ["--ckpt", "some/run"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trian": ""}, "unknown entry trian; known are"),
        ({"ckpt": "run"}, "give either train .* or ckpt"),
        ({"train": None, "ckpt": "run", "evaluate": None}, "with ckpt, give evaluate"),
        ({"generate": ["--cfg", 1]}, "generate is .*; give text"),
        ({"report": {"metrics": "FID"}}, "report takes baseline, metric, table"),
        ({"axes": {"seed": "train --train.seed"}}, "the axis seed must be STAGE: --option"),
        ({"axes": {"seed": {"training": "--train.seed"}}}, "the axis seed must be"),
        ({"axes": {"seed": {"train": "train.seed"}}}, "options 'train.seed'; they begin with --"),
        ({"grid": {"mixer": "conv"}}, "the axis mixer has no value 'conv'; known are attention, ATConv"),
        ({"grid": {"width": 3}}, "the grid names width, known axes are mixer, seed"),
        ({"grid": None}, "grid must be a mapping"),
        ({"report": {"baseline": {"mixer": "hybrid"}}}, "no run of the grid has the settings of report.baseline"),
        ({"report": {"table": ["mixer"]}}, "report.table must be"),
        ({"seeds": ["run"]}, "seeds names 'run', which is no axis"),
        ({"axes": {"a": {"x y": {"train": "-a"}, "x_y": {"train": "-b"}}}, "grid": {"a": ["x y", "x_y"]}}, "share"),
    ],
)
def test_faults_of_the_file_are_named(read, changes, message):
    with pytest.raises(ValueError, match=message):
        read(**changes)


@pytest.mark.parametrize("name", shipped_sweeps())
def test_shipped_sweeps_can_be_read(name):
    sweep = read_sweep(shipped_sweeps()[name])
    assert all(run.leaves for run in sweep.runs()) and str(sweep.out) == f"runs/{name}"


def test_scores_of_a_run_that_was_not_complete_are_refused(read, tmp_path, monkeypatch):
    """A scheduler may stop a training, which exits with 0, and then run the rest of the line."""
    monkeypatch.chdir(tmp_path)
    run = read().runs()[0]
    leaf = run.leaves[0]
    leaf.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text("train: {steps: 6}")
    for step, is_whole in ((3, False), (6, True)):
        Evaluation({"FD-digits-110": Score(1.0)}, {}, {"step": step, "seed": 0}, {}).save(leaf.scores)
        with nullcontext() if is_whole else pytest.raises(ValueError, match="are of step 3 of 6: delete"):
            collect_scores(leaf, jobs=1)
        assert leaf.record.exists() == is_whole
    leaf.record.write_text('{"scores": ')
    with pytest.raises(ValueError, match=r"attention-seed0-steps4\.json is damaged: delete it"):
        read_scores([leaf])
