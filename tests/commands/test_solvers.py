"""The command that compares solvers; how it compares is tested in tests/studies/test_solver_quality.py."""

from tests.conftest import load_command

SOLVERS = "eval/solvers.py"


def test_what_it_prints(tiny_run, tmp_path, capsys):
    load_command(SOLVERS).main([
        "--ckpt", str(tiny_run), "--out", str(tmp_path / "out"), "--num-samples", "100", "--baseline", "4",
        "--solvers", "unipc", "--evaluations", "4", "--shifts", "1"])
    printed = capsys.readouterr().out
    assert "4 Euler steps" in printed and str(tmp_path / "out" / "solvers.png").split("/")[-1] in printed


def test_errors(fails, tiny_run, tmp_path):
    main = load_command(SOLVERS).main
    assert "neither a folder here" in fails(main, ["--ckpt", tmp_path / "nowhere", "--out", tmp_path / "out"])
    for name, error in (("rk9", "not 'rk9'"), ("dopri5", "chooses its own"), ("nowhere.X", "the module nowhere")):
        assert error in fails(main, ["--ckpt", tiny_run, "--out", tmp_path / "out", "--solvers", name])
    assert "'50' is not a whole number of at least 100" in fails(
        main, ["--ckpt", tiny_run, "--out", tmp_path / "out", "--num-samples", "50"])
