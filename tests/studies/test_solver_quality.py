"""Comparison of solvers: its table, its resume, and the solvers that are enough."""

import json

import pytest
from PIL import Image

from sit_atconv.studies.solver_quality import Options, Point, compare_solvers, is_enough, plan, table
from sit_atconv.studies.solvers import make_parser


def options(**given) -> Options:
    """Returns the default options of the command, changed by `given`."""
    return Options(**vars(make_parser().parse_args(["--ckpt", "run", "--out", "out"])) | given)


def point(distance, error=0.1, solver="euler", shift=1.0, steps=8, evaluations=8):
    return Point(solver, shift, steps, evaluations, distance, error, 10.0)


def test_enough_is_within_two_standard_errors_of_the_baseline():
    baseline = point(2.0, 0.1)
    assert [is_enough(point(d), baseline) for d in (1.5, 2.19, 2.21)] == [True, True, False]


def test_solvers_get_equal_nfe():
    samplers = list(plan(options(solvers=("euler", "heun"), evaluations=(1, 8), shifts=(1.0, 2.0))))
    assert [(s.solver, s.steps, s.shift) for s in samplers] == [
        ("euler", 250, 1.0),
        ("euler", 1, 1.0),
        ("euler", 8, 1.0),
        ("euler", 1, 2.0),
        ("euler", 8, 2.0),
        ("heun", 4, 1.0),
        ("heun", 4, 2.0),
    ]


def test_the_table_marks_solvers_that_are_enough():
    points = [point(2.0, steps=250, evaluations=250), point(3.0), point(2.1, solver="heun", shift=2.0, evaluations=12)]
    lines = table(points).splitlines()
    assert lines[0] == "Euler, 250 steps: 2.00 +- 0.10, 10.0 images/s"
    assert lines[2:] == [
        "| solver | shift | 8 | 12 |",
        "|---|---|---|---|",
        "| euler | 1 | 3.00 |  |",
        "| heun | 2 |  | **2.10** |",
    ]


def test_an_interrupted_comparison_resumes(tiny_run, tmp_path):
    same = dict(ckpt=str(tiny_run), out=str(tmp_path / "out"), num_samples=100, baseline=6, shifts=(1.0,))
    first = compare_solvers(options(solvers=("heun",), evaluations=(4,), **same))
    assert [(p["solver"], p["steps"], p["evaluations"]) for p in first["points"]] == [("euler", 6, 6), ("heun", 2, 4)]
    assert all(p["distance"] > 0 and p["error"] > 0 and p["images_per_second"] > 0 for p in first["points"])
    second = compare_solvers(options(solvers=("heun", "sde-euler"), evaluations=(4,), **same))
    assert second["points"][:2] == first["points"] and second["points"][2]["evaluations"] == 4
    assert json.loads((tmp_path / "out" / "solvers.json").read_text()) == second
    assert "| sde-euler | 1 |" in (tmp_path / "out" / "solvers.md").read_text()
    assert min(Image.open(tmp_path / "out" / "solvers.png").size) > 200
    with pytest.raises(ValueError, match=r"holds another comparison \(cfg 2\.0 -> 3\.0\): give another --out"):
        compare_solvers(options(cfg=3.0, **same))
