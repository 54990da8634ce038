import json

import pytest

from sit_atconv.training.unreadable import Unreadable


def test_a_file_is_new_only_once_and_the_record_is_read_on_resuming(tmp_path):
    here, other = Unreadable(tmp_path, resumes=False), Unreadable(tmp_path, resumes=False)
    here.note({"b.png": "truncated"})
    here.note({"b.png": "truncated"})
    assert here.met == {"b.png": "truncated"}
    everyones = {"b.png": "truncated", "a.png": "no image"}
    assert here.record(everyones, write=True) == other.record(everyones, write=False) == everyones
    assert json.loads((tmp_path / "unreadable.json").read_text()) == everyones and here.met == {}
    here.note({"a.png": "no image"})
    assert here.met == {} and here.record({"a.png": "no image"}, write=True) == {}
    assert Unreadable(tmp_path, resumes=True).recorded == everyones
    assert Unreadable(tmp_path, resumes=False).recorded == {}
    (tmp_path / "unreadable.json").write_text("{")
    with pytest.raises(ValueError, match=r"unreadable\.json is damaged: delete it"):
        Unreadable(tmp_path, resumes=True)
