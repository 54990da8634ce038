"""The command that runs a sweep: from its file to the tables, with failures, kills and deleted records."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.conftest import ROOT, TINY_RUN, load_command

SWEEP = "eval/sweep.py"
SMALL = {
    "out": "out",
    "train": " ".join([*map(str, TINY_RUN), "--train.steps 2 --train.batch_size 64"]),
    "generate": "--num-samples 110 --cfg 1 --solver euler --labels balanced --no-npz",
    "evaluate": "--reference digits --extractor digits --metrics fid",
    "axes": {
        "mixer": {
            "attention": {"train": "--model.mixer attention"},
            "ATConv": {"train": "--model.mixer atconv"},
            "lost": {"train": "--data.images nowhere"},
        },
        "seed": {"train": "--train.seed", "generate": "--seed"},
        "steps": {"generate": "--steps"},
    },
    "grid": [{"mixer": "ATConv", "seed": [0, 1], "steps": [1, 2]}, {"mixer": "lost", "seed": 0, "steps": 1}],
    "report": {"baseline": {"steps": 2}},
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(entry=value, ...) writes SMALL with other entries to small.yaml in a new working directory."""
    monkeypatch.chdir(tmp_path)

    def write_changed(**changes):
        content = {name: value for name, value in {**SMALL, **changes}.items() if value is not None}
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return tmp_path / "out"

    return write_changed


def sweep(*argv):
    load_command(SWEEP).main(["small.yaml", *argv])


def facts(folder):
    """Everything in the records but speeds, dates and paths."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        for name in ("environment", "versions", "images_per_second", "jobs"):
            record.pop(name, None)
        for name in ("images_per_second", "sweep"):
            record.get("subject", {}).pop(name, None)
        found[path.name] = record
    return found


def test_a_sweep_from_its_file_to_the_tables(write, capfd):
    """A failing run is named and leaves the others complete; what is deleted is made again, and nothing else."""
    out = write()
    with pytest.raises(SystemExit) as stopped:
        sweep("--jobs", "2")
    printed = capfd.readouterr()
    assert stopped.value.code == 1 and "2 of 8 tasks failed" in printed.err
    assert "FAILED lost-seed0.training: data.images: nowhere is not a folder of images" in printed.err
    assert "FAILED lost-seed0-steps1: needs lost-seed0.training, which failed" in printed.err
    assert "| ATConv, steps 2 (baseline) | 2 |" in printed.out and "| ATConv, steps 1 | 2 |" in printed.out
    assert "Measured with 2 jobs at once" in printed.out
    assert (out / "fid-over-steps.png").exists() and (out / "pareto.png").exists()
    rows = json.loads((out / "compare.json").read_text())["rows"]
    assert len(rows) == 2 and rows[1]["seeds"] == 2 and "error of difference in FD-digits-110" in rows[1]

    # Weights that are equal up to the seed have the record of the run that the sweep started.
    before = facts(out / "records")
    assert len(before) == 6
    record = json.loads((out / "records" / "ATConv-seed1-steps1.json").read_text())["subject"]
    assert (
        record["training"]["train"]["seed"] == record["seed"] == 1 and record["sweep"]["settings"]["mixer"] == "ATConv"
    )
    assert record["path"] == "out/ATConv-seed1/samples/steps1"

    write(grid=SMALL["grid"][0])
    (out / "records" / "ATConv-seed1-steps1.json").unlink()
    sweep()
    assert "out: 0 tasks to run" in capfd.readouterr().out  # the scores were still there, and are collected
    for record in (out / "records").glob("ATConv-seed1*"):
        record.unlink()
    subprocess.run(["rm", "-r", out / "ATConv-seed1"], check=True)
    sweep("--jobs", "2")  # as many threads as before
    assert "out: 3 tasks to run" in capfd.readouterr().out and facts(out / "records") == before

    write(grid=SMALL["grid"][0], evaluate=SMALL["evaluate"] + " --num-samples 109")
    with pytest.raises(SystemExit):
        sweep()
    assert "was made with other options (options.evaluate" in capfd.readouterr().err


def test_wrong_options_are_named_before_anything_runs(write, capfd):
    out = write(generate="--cfg 1 --stpes 4")
    with pytest.raises(SystemExit):
        sweep()
    printed = capfd.readouterr()
    assert "unrecognized arguments: --stpes 4" in printed.err and not out.exists()
    assert "in the options of generate of ATConv-seed0-steps1" in printed.err
    for argv, message in (
        (["nowhere.yaml"], "there is no file nowhere.yaml"),
        (["small.yaml", "--jobs", "0"], "'0' is"),
    ):
        with pytest.raises(SystemExit):
            load_command(SWEEP).main(argv)
        assert message in capfd.readouterr().err


def test_time_and_commands_are_printed_without_running(write, capfd):
    out = write(grid={"mixer": "ATConv", "seed": [0, 1], "steps": [1, 2]})
    sweep("--dry-run")
    assert "| 2 x ATConv | " in (printed := capfd.readouterr().out) and "for one job; 6 tasks" in printed
    sweep("--print-commands")
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2 and [line.count(" && ") for line in lines] == [4, 4] and not out.exists()
    assert lines[1].split()[:2] == ["accelerate", "launch"] and "--train.seed 1 --out out/ATConv-seed1" in lines[1]


@pytest.mark.slow
def test_a_sweep_that_was_killed_three_times_ends_with_the_same_records(write, tmp_path):
    command = [sys.executable, str(ROOT / SWEEP), "small.yaml", "--jobs", "2"]
    grid = {"mixer": "ATConv", "seed": [0, 1], "steps": 1}
    out = write(grid=grid, report=None)
    assert subprocess.run(command).returncode == 0
    expected = facts(out / "records")
    assert len(expected) == 4
    out.rename(tmp_path / "whole")
    for number in (1, 2, 3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while len(list((out / "records").glob("*.json"))) < number and process.poll() is None:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert subprocess.run(command).returncode == 0
    assert facts(out / "records") == expected


@pytest.mark.slow
def test_printed_commands_can_be_run_by_a_shell_and_are_collected(write):
    out = write(grid={"mixer": "ATConv", "seed": 0, "steps": 1}, report=None)
    command = [sys.executable, str(ROOT / SWEEP), "small.yaml"]
    lines = subprocess.run([*command, "--print-commands"], text=True, stdout=subprocess.PIPE, check=True).stdout
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", lines], check=True, env=environment)
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True).stdout
    assert "out: 1 tasks to run" in done  # the training's record; it is complete
    assert len(facts(out / "records")) == 2
