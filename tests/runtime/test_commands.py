"""Helpers of the command line: errors, alone and as one of several processes, and Ctrl-C."""

import json
import os
import signal
import subprocess
import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from sit_atconv.runtime.commands import (
    ArgumentParser,
    add_import_option,
    fail,
    leave_on_ctrl_c,
    run_command,
    user_errors,
    wants_json,
)
from tests.conftest import ROOT, python


@pytest.fixture(autouse=True)
def interrupts():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_outside_of_a_commands_checks_is_one_line_too(capsys):
    def main():
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 130 and capsys.readouterr().err == "error: interrupted\n"


def test_ctrl_c_that_a_shell_ignores_in_the_background_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leave_on_ctrl_c()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


@pytest.mark.parametrize(("rank", "said"), [("0", "error: interrupted"), ("1", "")])
def test_no_library_that_is_imported_swallows_ctrl_c_and_one_process_of_several_speaks(tmp_path, rank, said):
    (tmp_path / "greedy.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n"
    )
    code = "from sit_atconv.runtime.commands import run_command\nrun_command(lambda: print(__import__('greedy')))"
    done = subprocess.run(
        python("-c", code),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"LOCAL_RANK": rank, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", said)


@pytest.mark.parametrize(
    ("flag", "is_terminal", "wanted"),
    [(False, True, False), (True, True, True), (False, False, True), (True, False, True)],
)
def test_a_table_is_for_terminals_and_json_for_pipes_or_by_option(flag, is_terminal, wanted, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    assert wants_json(flag) is wanted


def test_every_command_is_run_so():
    for path in [*(ROOT / "sample").glob("*.py"), *(ROOT / "eval").glob("*.py"), *(ROOT / "sit_atconv").glob("*.py")]:
        if 'if __name__ == "__main__":' in (text := path.read_text()):
            trains = path.name in ("train.py", "classify.py")
            assert ("run_command(main)" in text) != trains == ("leave_on_ctrl_c()" in text), path


def fail_as(rank, folder, monkeypatch):
    """What the launcher learns of a process `rank` that fails."""
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / f"{rank}.json"))
    with pytest.raises(SystemExit), user_errors():
        raise ValueError(f"file {rank} $is damaged:\ndelete it")
    return ProcessFailure(local_rank=rank, pid=1, exitcode=1, error_file=str(folder / f"{rank}.json"))


def test_a_launchers_report_ends_with_the_message(tmp_path, monkeypatch):
    """Also where only the second process fails, which prints nothing itself, and the first is ended for it."""
    ended = ProcessFailure(local_rank=0, pid=1, exitcode=-15, error_file="")
    failures = {0: ended, 1: fail_as(1, tmp_path, monkeypatch)}
    lines = str(ChildFailedError("eval/fid.py", failures)).splitlines()
    assert lines[-3].split(" : ")[1] == "error: file 1 $is damaged:"
    assert lines[-2].strip() == "delete it" and set(lines[-1]) == {"="}


def test_a_failure_is_also_printed(tmp_path, monkeypatch, capsys):
    fail_as(0, tmp_path, monkeypatch)
    assert capsys.readouterr().err == "error: file 0 $is damaged:\ndelete it\n"
    assert json.loads((tmp_path / "0.json").read_text())["message"]["message"].startswith("error: file 0")


def test_a_report_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    """Half a file would end the launcher in a traceback of its own."""

    def full(path, content):
        with open(path, "wb") as file:
            file.write(content[:9])
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit) as stop:
        fail("the disk is full", code=3)
    assert stop.value.code == 3 and capsys.readouterr().err == "error: the disk is full\n"
    assert not list(tmp_path.iterdir())


def test_import_option_imports_as_it_is_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_parts.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    add_import_option(parser := ArgumentParser(prog="command"))
    assert vars(parser.parse_args(["--import", "own_parts"])) == {} and sys.modules.pop("own_parts")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--import", "nowhere"])
    usage, error = capsys.readouterr().err.strip().split("\n")
    assert usage.startswith("usage") and error.startswith("error: the module nowhere cannot be imported (No module")
