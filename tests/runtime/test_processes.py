"""Work that processes share; with several of them in the tests of the commands."""

import pytest
from accelerate import PartialState

from sit_atconv.runtime.files import exclusive
from sit_atconv.runtime.processes import held_by_main, share, together


@pytest.fixture
def state():
    yield PartialState(cpu=True)
    PartialState._reset_state()


def test_every_process_takes_every_nth(state):
    class Third:
        process_index, num_processes = 2, 3

    assert share(range(8), Third) == range(2, 8, 3) and share([4, 5], state) == [4, 5]


def test_what_any_process_met_is_raised_at_the_end(state):
    with pytest.raises(OSError, match=r"^a\nb\nthe disk is full$"), together() as faults:
        faults += ["b", "a", "b"]
        raise ValueError("the disk is full")
    with together():
        pass
    with pytest.raises(RuntimeError), together():
        raise RuntimeError


def test_a_folder_is_held_until_the_end(state, tmp_path, monkeypatch):
    with held_by_main(tmp_path, state):
        assert (tmp_path / ".lock").exists()
    assert not (tmp_path / ".lock").exists()
    monkeypatch.setattr("fcntl.lockf", lambda *args: (_ for _ in ()).throw(BlockingIOError))
    with pytest.raises(ValueError, match="in use"), exclusive(tmp_path):
        pass
    with pytest.raises(OSError, match="in use"), held_by_main(tmp_path, state):
        raise AssertionError("it was not held")
