"""Command that compares evaluations; tests/evaluation/test_comparison.py tests the comparison."""

import os
import subprocess

import pytest

from sit_atconv.evaluation.records import Evaluation
from sit_atconv.evaluation.scores import Score
from tests.conftest import ROOT, load_command, python

COMPARE = "eval/compare.py"


@pytest.fixture
def runs(tmp_path):
    for name, fid in (("ours", 2.0), ("theirs", 2.5)):
        (tmp_path / name).mkdir()
        protocol = {"samples": {"num": 50_000, "sampler": {"cfg": fid}}}
        subject = {"weights": name, "images_per_second": 10 * fid}
        Evaluation({"FID": Score(fid, 0.1)}, protocol, subject, {}).save(tmp_path / name / "scores-inception.json")
    return [tmp_path / "ours", tmp_path / "theirs" / "scores-inception.json"]


def test_the_command_prints_a_table_and_draws_without_torch(runs, tmp_path):
    code = (
        f"import runpy, sys\nsys.argv = {[COMPARE, *map(str, runs)]!r}\nsys.modules['torch'] = None\n"
        f"runpy.run_path({str(ROOT / COMPARE)!r}, run_name='__main__')"
    )
    done = subprocess.run(python("-c", code), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "runs" / "compare" / "compare.md").read_text()
    assert "| ours (baseline) | 2.00 ± 0.10 |" in done.stdout
    assert "| theirs | 2.50 ± 0.10 | **+0.50 ± 0.14** |" in done.stdout
    assert "warning: theirs differs from ours: cfg 2 → 2.5\n" in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "written: runs/compare/compare.md, runs/compare/compare.csv, runs/compare/compare.json, runs/compare/pareto.png"
    )


def test_a_terminal_without_arrows_gets_question_marks(runs, tmp_path):
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(python(ROOT / COMPARE, *runs), cwd=tmp_path, capture_output=True, text=True, env=ascii_only)
    assert done.returncode == 0 and "| theirs | 2.50 ? 0.10 |" in done.stdout, done.stderr


def test_errors_name_the_remedy(fails, runs, tmp_path):
    main = load_command(COMPARE).main
    assert "the following arguments are required: RUN" in fails(main, [])
    assert "nowhere does not exist" in fails(main, [tmp_path / "nowhere"])
    assert "1 names for 2 rows" in fails(main, [*runs, "--names", "a"])
    assert "no run 'c' to be the baseline" in fails(main, [*runs, "--names", "a", "b", "--baseline", "c"])
    assert "ours has no KID: give --metric one of FID, or" in fails(main, [*runs, "--metric", "KID"])
    assert "ours has no fvd: give --metric one of FID, or" in fails(main, [*runs, "--metric", "fvd"])
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    assert "empty contains neither scores-*.json nor samples" in fails(main, [tmp_path / "empty"])
    (tmp_path / "file").write_text("")
    assert "give another --out" in fails(main, [*runs, "--out", tmp_path / "file"])
