import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sit_atconv.models.mixers import MIXERS
from sit_atconv.speed.forms import FORMS, LEVELS
from tests.models.test_mixers import POOLING

SCRIPT = Path(__file__).parents[2] / "eval" / "speed.py"
QUICK = [
    "--preset",
    "Tiny/2",
    "--resolutions",
    "32",
    "--rounds",
    "2",
    "--device",
    "cpu",
    "--forms",
    "attention",
    "atconv",
]


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("speed_command", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)


def test_a_pipe_gets_json_and_the_folder_gets_all_files(main, tmp_path, capsys):
    main([*QUICK, "--out", "results/here"])
    out, err = capsys.readouterr()
    folder = tmp_path / "results" / "here"
    result = json.loads(out)
    assert result == json.loads((folder / "speed.json").read_text())
    assert [m["form"] for m in result["measurements"]] == ["attention", "atconv"] * 2
    assert result["options"]["resolutions"] == [32]
    table = (folder / "speed.md").read_text()
    assert "| atconv |" in table
    assert table in err
    with Image.open(folder / "speed.png") as picture:
        assert picture.width > 600


@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_a_terminal_gets_the_table_and_json_only_with_the_flag(main, tmp_path, capsys, monkeypatch, flag):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    main([*QUICK, "--levels", "op", *flag])
    out, err = capsys.readouterr()
    folder = tmp_path / "runs" / "speed"
    result, table = (folder / "speed.json").read_text(), (folder / "speed.md").read_text()
    assert [m["form"] for m in json.loads(result)["measurements"]].count("atconv") == 4
    if flag:
        assert out == result and table in err
    else:
        assert out.startswith(table) and out.endswith("chart: runs/speed/speed.png\n") and "chart" not in err


def test_token_mixers_of_a_users_module_are_forms(main, tmp_path, capsys, monkeypatch):
    """One mixer is registered by --import, one is named by its path; neither has a second computation."""
    (tmp_path / "my_mixers.py").write_text(POOLING)
    (tmp_path / "my_table.py").write_text(POOLING + "MIXERS.register('pooling', POOLING)\n")
    monkeypatch.setattr(MIXERS, "_entries", dict(MIXERS))
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        main(
            [
                *QUICK,
                "--import",
                "my_table",
                "--forms",
                "atconv",
                "pooling",
                "my_mixers.POOLING",
                "--baseline",
                "pooling",
                "--levels",
                "mixer",
                "block",
                "model",
                "train",
                "sampling",
                "--depth",
                "2",
            ]
        )
    finally:
        for module in ("my_mixers", "my_table"):
            sys.modules.pop(module, None)
    result = json.loads(capsys.readouterr().out)
    assert result["options"]["forms"] == ["atconv", "pooling", "my_mixers.POOLING"]
    table = (tmp_path / "runs/speed/speed.md").read_text()
    found = {(m["level"], m["quantity"], m["form"]): m for m in result["measurements"]}
    assert len(found) == 7 * 3
    for form in ("pooling", "my_mixers.POOLING"):
        assert found["mixer", "forward", form]["multiply_adds"] == 4 * 128**2  # of 2x2 tokens: the projection
        for level in ("block", "model", "train", "sampling"):
            counts = {m["form"]: m["multiply_adds"] for key, m in found.items() if key[0] == level}
            assert counts[form] < counts["atconv"]
        errors = [check["error"] for check in result["agreement"] if check["what"].startswith(form)]
        assert errors == [None] * 4  # the levels model and sampling have the same models
        assert f"Not checked: {form}, which has no second computation." in table
    assert {check["what"] for check in result["agreement"] if check["error"] is not None} == {
        "atconv and PublishedATConv with the same weights"
    }
    assert (tmp_path / "runs/speed/speed.png").exists()


def test_a_killed_run_leaves_the_results_of_finished_resolutions(main, tmp_path, monkeypatch):
    import sit_atconv.speed.benchmark as benchmark

    measure = benchmark.measure

    def interrupted(case, level, **options):
        if case.resolution == 64:
            raise KeyboardInterrupt
        return measure(case, level, **options)

    monkeypatch.setattr(benchmark, "measure", interrupted)
    with pytest.raises(SystemExit):
        main([*QUICK, "--resolutions", "32", "64", "--levels", "op"])
    folder = tmp_path / "runs" / "speed"
    result = json.loads((folder / "speed.json").read_text())
    assert {m["resolution"] for m in result["measurements"]} == {32} and result["agreement"]
    assert "| atconv |" in (folder / "speed.md").read_text()


def test_other_ranks_exit_without_output(main, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    main(QUICK)
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--resolutions", "250"], 1, "error: resolution 250 is not a multiple of 16"),
        (["--preset", "XXL/2"], 1, "error: there is no preset 'XXL/2'"),
        (["--dtypes", "fp8"], 2, "invalid choice: 'fp8'"),
        (["--forms", "attention", "mamba"], 1, "forms must be among attention, timm, "),
        (["--forms", "no_such_module.MIXER"], 1, "the module no_such_module cannot be imported"),
        (["--import", "no_such_module"], 2, "the module no_such_module cannot be imported"),
        (["--rounds", "0"], 2, "'0' is not a whole number"),
        (["--cfg", "much"], 2, "'much' is not a finite number"),
        (["--out", "taken"], 1, "taken"),
    ],
)
def test_errors_are_short_and_leave_nothing_on_stdout(main, tmp_path, capsys, arguments, code, message):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    out, err = capsys.readouterr()
    assert exit.value.code == code
    assert message in err
    assert out == ""
    assert len(err.splitlines()) <= 3


def test_help_answers_before_torch_is_imported(tmp_path):
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['speed.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "finally:\n"
        "    print('torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    text = "".join(done.stdout.split())  # long names are broken at their hyphens
    assert all(name in text for name in ("--resolutions", *FORMS, *LEVELS))
    assert done.stderr == "False\n"
