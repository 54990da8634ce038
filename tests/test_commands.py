"""Helpers of the command line."""

import os
import signal
import subprocess

import pytest

from sit_atconv.commands import leave_on_ctrl_c, run_command
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
    (tmp_path / "greedy.py").write_text("import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n"
                                        "except BaseException:\n    pass\n")
    code = "from sit_atconv.commands import run_command\nrun_command(lambda: print(__import__('greedy')))"
    done = subprocess.run(python("-c", code), capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"LOCAL_RANK": rank, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", said)


def test_every_command_is_run_so():
    for path in [*(ROOT / "sample").glob("*.py"), *(ROOT / "eval").glob("*.py"),
                 *(ROOT / "sit_atconv").glob("*.py")]:
        if 'if __name__ == "__main__":' in (text := path.read_text()):
            assert ("run_command(main)" in text) != (path.name == "train.py") == ("leave_on_ctrl_c()" in text), path
