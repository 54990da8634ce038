"""Execution of tasks: why one failed, and the time left."""

import pytest

from sit_atconv.studies.execution import Task, _Board, _failure, in_words


@pytest.mark.parametrize(
    ("exitcode", "log", "reason"),
    [
        (0, "error: of before\n", None),
        (
            1,
            "10%|#\rerror: loss or gradient were not finite in step 7\nlast line\n",
            "loss or gradient were not finite",
        ),
        (1, "Traceback\nRuntimeError: CUDA out of memory\n", "RuntimeError: CUDA out of memory"),
        (3, "", "exit code 3"),
        (-9, "", "killed by SIGKILL, perhaps for lack of memory"),
        (-15, "", "killed by SIGTERM"),
    ],
)
def test_the_reason_of_a_failure(tmp_path, exitcode, log, reason):
    (tmp_path / "log").write_text(log)
    found = _failure(exitcode, tmp_path / "log")
    assert found is reason is None or found.startswith(reason)


def test_the_time_left_is_known_once_each_kind_was_measured(capsys):
    tasks = [Task(f"{kind} {i}", kind, [], print) for kind in ("training", "sampling") for i in range(3)]
    board = _Board(tasks, jobs=2)
    board.end(tasks[0], None, 100.0)
    assert board.time_left() == ""
    board.end(tasks[3], None, 20.0)
    assert board.time_left() == "2.0 min"  # (2 * 100 + 2 * 20) / 2
    board.end(tasks[1], "it broke", 1.0)  # not measured
    assert (
        board.time_left() == "70 s"
        and "training 1: FAILED: it broke; 3 tasks left, about 70 s" in capsys.readouterr().err
    )
    assert [in_words(seconds) for seconds in (7, 119, 130, 9000)] == ["7 s", "119 s", "2.2 min", "2.5 h"]
