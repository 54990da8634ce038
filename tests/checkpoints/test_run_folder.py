"""The log of a run."""

from sit_atconv.checkpoints.run_folder import append_stats, read_stats, rewind_stats


def test_lines_after_the_step_resumed_from_are_dropped(tmp_path):
    for step in (1, 2, 3):
        append_stats(tmp_path, {"step": step, "loss": 1 / step})
    with open(tmp_path / "stats.jsonl", "a") as file:
        file.write('12\n{"a": 1}\n{"step": 4, "lo')
    rewind_stats(tmp_path, 2)
    append_stats(tmp_path, {"step": 3, "loss": 0.5})
    assert [line["step"] for line in read_stats(tmp_path)] == [1, 2, 3] and read_stats(tmp_path)[-1]["loss"] == 0.5
