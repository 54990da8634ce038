"""The quickstart shows commands, progress and a table; everything else is in its logs."""

import os
import sys

import pytest

from sit_atconv import quickstart


def test_lines_go_to_the_log_and_progress_bars_do_not(tmp_path):
    reader, writer = os.pipe()
    os.write(writer, b"note: one\n\r 10%|#   |\r100%|####|\n" + "± last".encode())
    os.close(writer)
    with open(tmp_path / "log", "wb", buffering=0) as log:
        quickstart._follow(reader, log)
    os.close(reader)
    assert (tmp_path / "log").read_text() == "note: one\n100%|####|\n± last"


def test_a_command_that_fails_shows_its_error_and_ends_the_tour(tmp_path, capfd):
    with pytest.raises(SystemExit) as left:
        quickstart.run_as_typed(tmp_path, "fid", "--samples", tmp_path / "nothing", "--reference", "digits")
    shown = capfd.readouterr()
    assert left.value.code == 1
    assert f"error: {tmp_path / 'nothing'} does not exist" in shown.err
    assert "fid.log" in shown.err.splitlines()[-1] and "$ " in shown.out


def test_a_long_error_is_shown_from_its_first_line(tmp_path, capfd, monkeypatch):
    lines = [f"line {i} of a traceback with long paths and names" for i in range(100)]
    code = f"import sys; sys.exit({chr(10).join(lines)!r})"
    monkeypatch.setattr(quickstart, "command_argv", lambda name: [sys.executable, "-c", code])
    with pytest.raises(SystemExit):
        quickstart.run_as_typed(tmp_path, "fid")
    assert capfd.readouterr().err.splitlines()[:100] == lines
