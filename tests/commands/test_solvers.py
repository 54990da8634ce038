"""Command that compares solvers; tests/studies/test_solver_quality.py tests the comparison."""

from tests.conftest import load_command

SOLVERS = "eval/solvers.py"


def test_the_command_prints_the_result_and_its_files(tiny_run, tmp_path, capsys):
    load_command(SOLVERS).main(
        [
            "--ckpt",
            str(tiny_run),
            "--out",
            str(tmp_path / "out"),
            "--num-samples",
            "100",
            "--baseline",
            "4",
            "--solvers",
            "unipc",
            "--evaluations",
            "4",
            "--shifts",
            "1",
        ]
    )
    printed = capsys.readouterr().out
    assert "4 Euler steps" in printed and str(tmp_path / "out" / "solvers.png").split("/")[-1] in printed


def test_errors_name_the_remedy(fails, tiny_run, tmp_path):
    main = load_command(SOLVERS).main
    assert "neither a folder here" in fails(main, ["--ckpt", tmp_path / "nowhere", "--out", tmp_path / "out"])
    for name, error in (("rk9", "not 'rk9'"), ("dopri5", "chooses its own"), ("nowhere.X", "the module nowhere")):
        assert error in fails(main, ["--ckpt", tiny_run, "--out", tmp_path / "out", "--solvers", name])
    assert "'50' is not a whole number of at least 100" in fails(
        main, ["--ckpt", tiny_run, "--out", tmp_path / "out", "--num-samples", "50"]
    )
